"""How well a reward model tells answers that keep a rule, of questions it has not learnt from.

    python -m tests.real_runs.reward runs/rm/checkpoints/step-00000024 --policy runs/sft/checkpoints/step-00000016 \\
        --questions runs-data/questions/held-out.jsonl --pairs runs-data/questions/pairs-held-out.jsonl \\
        --rule words:12 --output docs/runs/rm/measured.jsonl

A line of JSON: accuracy, the share of held-out pairs whose chosen answer has the higher score, and the mean margin;
auc, of the policy's own answers: the share of couples, one finished answer that keeps the rule and one that breaks it,
to whichever questions, in which the former has the higher score. The policy learns from such scores, not from pairs.
Scores are those of transformers in float32.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from rayllm.core.tokenizer import Tokenizer
from tests.preference_pairs import parse_rule
from tests.real_runs.alignment import Answered, draw, mean, read_pairs, read_questions


@torch.no_grad()
def answer_score(model: PreTrainedModel, sequence: Answered) -> float:
    return float(model(torch.tensor([sequence.tokens])).logits[0, 0])


def auc(high: Sequence[float], low: Sequence[float]) -> float:
    """The share of couples in which the first is higher; equal ones count half."""
    wins = sum((one > other) + 0.5 * (one == other) for one in high for other in low)
    return wins / (len(high) * len(low))


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy of a reward model on held-out pairs and on drawn answers.")
    parser.add_argument("reward_model", type=Path)
    parser.add_argument("--policy", type=Path, required=True, help="whose answers are scored")
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--rule", type=parse_rule, required=True)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    model = AutoModelForSequenceClassification.from_pretrained(arguments.reward_model, dtype=torch.float32).eval()
    pairs = list(read_pairs(arguments.pairs, Tokenizer.load(arguments.policy)))
    margins = [answer_score(model, chosen) - answer_score(model, rejected) for chosen, rejected in pairs]
    questions = read_questions(arguments.questions)
    drawn = draw(arguments.policy, questions, arguments.rule, samples=1, max_tokens=arguments.max_tokens)
    scored = [(one.keeps, answer_score(model, one.sequence)) for one in drawn if one.finished]
    keeping = [score for keeps, score in scored if keeps]
    breaking = [score for keeps, score in scored if not keeps]
    accuracy, accuracy_error = mean([float(margin > 0) for margin in margins])
    margin, margin_error = mean(margins)
    figures = {
        "checkpoint": arguments.reward_model.name,
        "pairs": len(pairs),
        "accuracy": accuracy,
        "accuracy_error": accuracy_error,
        "margin": margin,
        "margin_error": margin_error,
        "keeping": len(keeping),
        "breaking": len(breaking),
        "keeping_score": mean(keeping)[0],
        "breaking_score": mean(breaking)[0],
        "auc": auc(keeping, breaking),
    }
    arguments.output.write_text(json.dumps(figures) + "\n", encoding="utf-8")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
