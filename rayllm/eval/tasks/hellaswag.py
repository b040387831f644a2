"""HellaSwag (Zellers et al. 2019): which of four endings follows."""

import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

from rayllm.eval.data import Data, Packaged, Table
from rayllm.eval.task import Document, ShotOrder
from rayllm.eval.tasks.multiple_choice import MultipleChoice


class HellaSwag(MultipleChoice):
    name = "hellaswag"
    version = "1.0"
    shot_order: ClassVar[ShotOrder] = ShotOrder.RANDOM_OTHERS

    def documents(self, data: Data) -> Sequence[Document]:
        return data.documents(_table("validation"))

    def shots(self, data: Data) -> Mapping[str, Sequence[Document]]:
        return {"": data.documents(_table("train"))}

    def question(self, document: Document) -> str:
        fields = document.fields
        return _cleaned(f"{fields['activity_label']}: {fields['ctx_a']} {fields['ctx_b'].capitalize()}")

    def choices(self, document: Document) -> Sequence[str]:
        return [_cleaned(ending) for ending in document.fields["endings"]]

    def gold(self, document: Document) -> int:
        return int(document.fields["label"])


def _cleaned(text: str) -> str:
    """Without what WikiHow's pages left in brackets."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _table(split: str) -> Table:
    stored = Packaged(path="hf_datasets/hellaswag/none/validation/*.arrow")
    return Table(
        name="Rowan/hellaswag",
        split=split,
        columns=("activity_label", "ctx_a", "ctx_b", "endings", "label"),
        packaged=stored if split == "validation" else None,
    )
