r"""MATH for instruction models: no shots, by the chat template, the answer in \boxed{...}. No task of lm-eval.

`math_verify` compares the last box with the solution's by the library of that name; `exact_match` compares the two as
`minerva_math` does. An answer that is not in a box is wrong in both.
"""

from collections.abc import Sequence
from typing import ClassVar

from rayllm.eval.answers.boxed import last_boxed
from rayllm.eval.answers.math_check import shared_checker
from rayllm.eval.data import Data
from rayllm.eval.task import Document, Score
from rayllm.eval.tasks.generation import Generation
from rayllm.eval.tasks.math_data import SUBJECTS, math_documents
from rayllm.eval.tasks.minerva_math import gold_answer

_INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."


class MathBoxed(Generation):
    version = "1.0"
    metrics: tuple[str, ...] = ("math_verify", "exact_match")
    max_tokens: ClassVar[int] = 1024
    chat = True

    def __init__(self, name: str, subjects: Sequence[str] = tuple(SUBJECTS)) -> None:
        self.name = name
        self._subjects = subjects

    def documents(self, data: Data) -> Sequence[Document]:
        return math_documents(data, self._subjects, "test")

    def question(self, document: Document) -> str:
        return f"{document.fields['problem']}\n\n{_INSTRUCTION}"

    def target(self, document: Document) -> str:
        return str(document.fields["solution"])

    def score_texts(self, document: Document, texts: Sequence[str]) -> Score:
        answer = last_boxed(texts[0])
        if answer is None:
            return Score(values={"math_verify": 0.0, "exact_match": 0.0})
        checker = shared_checker()
        normal = checker.normalize(answer)
        return Score(
            values={
                "math_verify": float(checker.verify(document.fields["solution"], rf"\boxed{{{answer}}}")),
                "exact_match": float(normal is not None and checker.equal(normal, gold_answer(document))),
            },
            extracted=answer,
        )
