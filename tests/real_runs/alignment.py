"""How well a model keeps a rule when it answers freely, and how far it is from the model it began as.

    python -m tests.real_runs.alignment START CHECKPOINT... --questions runs-data/questions/held-out.jsonl \\
        --pairs runs-data/questions/pairs-held-out.jsonl --rule words:12 --output docs/runs/dpo.jsonl

For each checkpoint a line of JSON: the rule's rate among answers drawn by the engine at temperature 1 (one that is cut
off keeps no rule); KL(policy || start) of an answer, in nats; accuracy, the share of held-out pairs in which training
has raised the chosen answer's log-probability by more than the rejected one's. KL is exact at each token of the drawn
answers and summed over them: the mean over answers is an unbiased estimate of the answers' own. Letters: T tokens, V
vocabulary.
"""

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rayllm.core.config import EngineConfig, ModelConfig
from rayllm.core.tokenizer import Tokenizer
from rayllm.core.types import SamplingParams
from rayllm.engine.llm import LLM
from rayllm.models.checkpoint import Checkpoint
from rayllm.models.context import DenseContext
from rayllm.models.decoder import Decoder
from rayllm.models.hub import resolve_model
from rayllm.parallel.load import load_shard
from rayllm.parallel.mesh import Mesh
from rayllm.train.data.documents import preference_pair
from rayllm.train.data.rows import Kind, PreferenceRow, parse_row
from tests.preference_pairs import Rule, parse_rule


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """Token ids; `start`: where the answer begins."""

    tokens: list[int]
    start: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """`finished`: it ends by itself; `keeps`: it does, and keeps the rule."""

    sequence: Answered
    finished: bool
    keeps: bool


def load(directory: Path) -> Decoder:
    return load_shard(Checkpoint.open(directory), Mesh.single(), dtype=torch.float32, device=torch.device("cpu"))


@torch.no_grad()
def answer_distributions(decoder: Decoder, sequence: Answered) -> Tensor:
    """Log-probabilities [T, V] of each token of the answer."""
    context = DenseContext([0, len(sequence.tokens)])
    hidden_TD = decoder(torch.tensor(sequence.tokens), context.positions_T, context)
    return decoder.logits(hidden_TD[sequence.start - 1 : -1]).float().log_softmax(-1)


def answer_kl(policy: Decoder, reference: Decoder, sequence: Answered) -> float:
    """The sum over the answer's tokens of KL(policy || reference) of the next token, in nats."""
    log_p_TV, log_q_TV = (answer_distributions(model, sequence) for model in (policy, reference))
    return float((log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(dtype=torch.float64))


def answer_log_prob(decoder: Decoder, sequence: Answered) -> float:
    log_p_TV = answer_distributions(decoder, sequence)
    answer_T1 = torch.tensor(sequence.tokens[sequence.start :])[:, None]
    return float(log_p_TV.gather(1, answer_T1).sum(dtype=torch.float64))


def draw(directory: Path, questions: Sequence[str], rule: Rule, *, samples: int, max_tokens: int) -> list[Drawn]:
    """Seeds are those of questions and samples, so every checkpoint is asked with the same ones."""
    drawn = []
    with LLM.from_config(EngineConfig(model=ModelConfig(model=str(directory), dtype="bfloat16"))) as llm:
        prompts = [llm.tokenizer.chat([{"role": "user", "content": question}]) for question in questions]
        params = [
            SamplingParams(n=samples, temperature=1.0, max_tokens=max_tokens, seed=1000 + index)
            for index in range(len(questions))
        ]
        for prompt, output in zip(prompts, llm.generate(prompts, params), strict=True):
            for answer in output.outputs:
                sequence = Answered(tokens=[*prompt, *answer.token_ids], start=len(prompt))
                finished = answer.finish_reason == "stop"
                drawn.append(Drawn(sequence=sequence, finished=finished, keeps=finished and rule.holds(answer.text)))
    return drawn


def read_questions(path: Path) -> list[str]:
    return [json.loads(line)["question"] for line in path.read_text(encoding="utf-8").splitlines()]


def read_pairs(path: Path, tokenizer: Tokenizer) -> Iterator[tuple[Answered, Answered]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        row = parse_row(json.loads(line), Kind.PREFERENCE)
        assert isinstance(row, PreferenceRow)
        pair = preference_pair(tokenizer, row)
        start = len(pair.prompt)
        yield (
            Answered(tokens=pair.prompt + pair.chosen, start=start),
            Answered(tokens=pair.prompt + pair.rejected, start=start),
        )


def mean(values: Sequence[float]) -> tuple[float, float]:
    """And its standard error."""
    average = math.fsum(values) / len(values)
    spread = math.fsum((value - average) ** 2 for value in values) / max(1, len(values) - 1)
    return average, math.sqrt(spread / len(values))


def main() -> None:
    parser = argparse.ArgumentParser(description="Rule, KL and preference accuracy of checkpoints.")
    parser.add_argument("start", help="the model that training began with")
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--limit", type=int, help="the first questions alone are answered; pairs are read whole")
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--rule", type=parse_rule, required=True)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    start = resolve_model(arguments.start)
    reference = load(start)
    questions = read_questions(arguments.questions)[: arguments.limit]
    pairs = list(read_pairs(arguments.pairs, Tokenizer.load(start)))
    before = [[answer_log_prob(reference, answer) for answer in pair] for pair in pairs]
    with arguments.output.open("w", encoding="utf-8") as file:
        for checkpoint in [start, *arguments.checkpoints]:
            policy = reference if checkpoint == start else load(checkpoint)
            drawn = draw(
                checkpoint, questions, arguments.rule, samples=arguments.samples, max_tokens=arguments.max_tokens
            )
            rate, rate_error = mean([float(one.keeps) for one in drawn])
            kl, kl_error = 0.0, 0.0
            accuracy = None
            if policy is not reference:
                kl, kl_error = mean([answer_kl(policy, reference, one.sequence) for one in drawn])
                after = [[answer_log_prob(policy, answer) for answer in pair] for pair in pairs]
                raised = [(c - old_c) - (r - old_r) for (c, r), (old_c, old_r) in zip(after, before, strict=True)]
                accuracy = mean([float(margin > 0) for margin in raised])[0]
            figures = {
                "checkpoint": "start" if checkpoint == start else checkpoint.name,
                "answers": len(drawn),
                "rule_rate": rate,
                "rule_rate_error": rate_error,
                "kl": kl,
                "kl_error": kl_error,
                "pairs": len(pairs),
                "accuracy": accuracy,
            }
            file.write(json.dumps(figures) + "\n")
            file.flush()
            print(json.dumps(figures))


if __name__ == "__main__":
    main()
