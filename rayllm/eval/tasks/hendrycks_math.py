"""MATH as its authors score it: the answer between dollar signs, compared as a string. Instruction models, which box
their answers, get about 0; `math_boxed` is for them."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from rayllm.eval.answers import hendrycks
from rayllm.eval.answers.boxed import last_boxed
from rayllm.eval.data import Data
from rayllm.eval.task import Document, Score
from rayllm.eval.tasks.generation import Generation
from rayllm.eval.tasks.math_data import SUBJECTS, math_documents


class HendrycksMath(Generation):
    version = "1.0"
    metrics: tuple[str, ...] = ("exact_match",)
    until: ClassVar[tuple[str, ...]] = ("Problem:",)

    def __init__(self, name: str, subjects: Sequence[str] = tuple(SUBJECTS)) -> None:
        self.name = name
        self._subjects = subjects

    def documents(self, data: Data) -> Sequence[Document]:
        return math_documents(data, self._subjects, "test")

    def shots(self, data: Data) -> Mapping[str, Sequence[Document]]:
        return {subject: math_documents(data, [subject], "train") for subject in self._subjects}

    def question(self, document: Document) -> str:
        return f"Problem: {document.fields['problem']}\nAnswer:"

    def target(self, document: Document) -> str:
        return last_boxed(document.fields["solution"]) or ""

    def score_texts(self, document: Document, texts: Sequence[str]) -> Score:
        answer = hendrycks.extract_answer(texts[0])
        right = hendrycks.is_equiv(answer, last_boxed(document.fields["solution"]))
        return Score(values={"exact_match": float(right)}, extracted=answer)
