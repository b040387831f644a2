"""MATH with Minerva's four shots: the answer is in the last sentence, and compared by algebra.

`exact_match` reads that sentence; `math_verify` lets the library of that name find an answer anywhere.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from rayllm.eval.answers import minerva
from rayllm.eval.answers.boxed import last_boxed
from rayllm.eval.answers.math_check import shared_checker
from rayllm.eval.data import Data, documents_of
from rayllm.eval.task import Document, Score, ShotOrder
from rayllm.eval.tasks.generation import Generation
from rayllm.eval.tasks.math_data import SUBJECTS, math_documents
from rayllm.eval.tasks.minerva_shots import SHOTS


class MinervaMath(Generation):
    version = "3.1"
    metrics: tuple[str, ...] = ("exact_match", "math_verify")
    num_fewshot: ClassVar[int] = 4
    shot_order: ClassVar[ShotOrder] = ShotOrder.FIRST
    until: ClassVar[tuple[str, ...]] = ("Problem:",)

    def __init__(self, name: str, subjects: Sequence[str] = tuple(SUBJECTS)) -> None:
        self.name = name
        self._subjects = subjects

    def documents(self, data: Data) -> Sequence[Document]:
        return math_documents(data, self._subjects, "test")

    def shots(self, data: Data) -> Mapping[str, Sequence[Document]]:
        return {subject: documents_of([dict(shot) for shot in SHOTS], subject) for subject in self._subjects}

    def question(self, document: Document) -> str:
        return f"Problem:\n{document.fields['problem']}\n\nSolution:"

    def target(self, document: Document) -> str:
        return gold_answer(document)

    def example(self, document: Document) -> str:
        return f"{self.question(document)} {document.fields['solution']}\n\n"

    def score_texts(self, document: Document, texts: Sequence[str]) -> Score:
        checker = shared_checker()
        answer = checker.read_answer(texts[0])
        equal = answer is not None and checker.equal(answer, gold_answer(document))
        verified = checker.verify(document.fields["solution"], texts[0])
        return Score(values={"exact_match": float(equal), "math_verify": float(verified)}, extracted=answer)


def gold_answer(document: Document) -> str:
    """Of the solution, in normal form."""
    return minerva.normalize(last_boxed(document.fields["solution"]) or "")
