"""PIQA (Bisk et al. 2020): which of two ways reaches a goal."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from rayllm.eval.data import Data, Packaged, Table
from rayllm.eval.task import Document, ShotOrder
from rayllm.eval.tasks.multiple_choice import MultipleChoice


class Piqa(MultipleChoice):
    name = "piqa"
    version = "1.0"
    shot_order: ClassVar[ShotOrder] = ShotOrder.RANDOM_OTHERS

    def documents(self, data: Data) -> Sequence[Document]:
        return data.documents(_table("validation"))

    def shots(self, data: Data) -> Mapping[str, Sequence[Document]]:
        return {"": data.documents(_table("train"))}

    def question(self, document: Document) -> str:
        return f"Question: {document.fields['goal']}\nAnswer:"

    def choices(self, document: Document) -> Sequence[str]:
        return [document.fields["sol1"], document.fields["sol2"]]

    def gold(self, document: Document) -> int:
        return int(document.fields["label"])


def _table(split: str) -> Table:
    stored = Packaged(path="hf_datasets/piqa/plain_text/validation/*.arrow")
    return Table(
        name="baber/piqa",
        split=split,
        columns=("goal", "sol1", "sol2", "label"),
        packaged=stored if split == "validation" else None,
    )
