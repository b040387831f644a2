"""Pairs by a rule that can be checked: a model's own answers, one that keeps the rule and one that does not.

    python -m tests.preference_pairs smollm2-135m questions.jsonl pairs.jsonl --rule words:12
    python -m tests.preference_pairs smollm2-135m questions.jsonl pairs.jsonl --rule ends:!
    rayllm data pack pairs.jsonl --kind preference --output pairs --tokenizer smollm2-135m --sequence-length 512

Answers that break the rule are drawn as the model gives them, those that keep it after an instruction that the pair
does not hold: what is to be learnt is to answer so unasked. A question for which only one kind was drawn gives no pair.
`questions.jsonl` has the column `question`. The same seed gives the same pairs.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rayllm.core.config import EngineConfig, ModelConfig
from rayllm.core.types import SamplingParams
from rayllm.engine.llm import LLM
from rayllm.models.hub import resolve_model


@dataclass(frozen=True, kw_only=True)
class Rule:
    """`holds` says of an answer whether it keeps the rule; an empty one never does."""

    name: str
    instruction: str
    holds: Callable[[str], bool]


def at_most_words(most: int) -> Rule:
    return Rule(
        name=f"words:{most}",
        instruction=f"Answer in one short sentence of at most {most} words.",
        holds=lambda answer: 0 < len(answer.split()) <= most,
    )


def ends_with(mark: str) -> Rule:
    return Rule(
        name=f"ends:{mark}",
        instruction=f'End your answer with "{mark}".',
        holds=lambda answer: answer.rstrip().endswith(mark),
    )


def parse_rule(text: str) -> Rule:
    kind, _, value = text.partition(":")
    if kind == "words" and value.isdecimal() and int(value) > 0:
        return at_most_words(int(value))
    if kind == "ends" and value:
        return ends_with(value)
    raise argparse.ArgumentTypeError(f"{text!r} is neither words:N nor ends:MARK")


def draw(
    llm: LLM, conversations: Sequence[list[dict[str, str]]], *, samples: int, max_tokens: int, seed: int
) -> list[list[str]]:
    """`samples` answers to each, less those that were cut off by `max_tokens` and those that no text file may hold."""
    params = [
        SamplingParams(n=samples, temperature=1.0, max_tokens=max_tokens, seed=seed + index)
        for index in range(len(conversations))
    ]
    prompts = [llm.tokenizer.chat(messages) for messages in conversations]
    return [
        [
            completion.text
            for completion in output.outputs
            if completion.finish_reason == "stop" and "\0" not in completion.text
        ]
        for output in llm.generate(prompts, params)
    ]


def make_pairs(
    llm: LLM, questions: Sequence[str], rule: Rule, *, samples: int, max_tokens: int, seed: int
) -> Iterator[dict[str, object]]:
    asked = [[{"role": "user", "content": question}] for question in questions]
    told = [[{"role": "user", "content": f"{question}\n{rule.instruction}"}] for question in questions]
    drawn = draw(llm, asked + told, samples=samples, max_tokens=max_tokens, seed=seed)
    for messages, plain, instructed in zip(asked, drawn[: len(asked)], drawn[len(asked) :], strict=True):
        keeping = next((answer for answer in instructed + plain if rule.holds(answer)), None)
        breaking = next((answer for answer in plain + instructed if answer.strip() and not rule.holds(answer)), None)
        if keeping is not None and breaking is not None:
            answers = {"chosen": keeping, "rejected": breaking}
            yield {
                "prompt": messages,
                **{name: [{"role": "assistant", "content": text}] for name, text in answers.items()},
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("questions", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--rule", type=parse_rule, required=True)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    lines = arguments.questions.read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line)["question"] for line in lines if line.strip()]
    config = EngineConfig(model=ModelConfig(model=str(resolve_model(arguments.model))))
    count = 0
    with LLM.from_config(config) as llm, arguments.output.open("w", encoding="utf-8") as file:
        for pair in make_pairs(
            llm,
            questions,
            arguments.rule,
            samples=arguments.samples,
            max_tokens=arguments.max_tokens,
            seed=arguments.seed,
        ):
            file.write(json.dumps(pair, ensure_ascii=False) + "\n")
            count += 1
    print(f"{count} pairs of {len(questions)} questions by the rule {arguments.rule.name}")


if __name__ == "__main__":
    main()
