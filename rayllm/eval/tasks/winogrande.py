"""WinoGrande (Sakaguchi et al. 2020): which of two names fills the blank, by the likelihood of what follows it."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from rayllm.eval.data import Data, Packaged, Table
from rayllm.eval.task import TARGET_DELIMITER, Document, Loglikelihood, Request, ShotOrder
from rayllm.eval.tasks.multiple_choice import MultipleChoice


class WinoGrande(MultipleChoice):
    """The choices are contexts, and the continuation is the same for both."""

    name = "winogrande"
    version = "1.0"
    metrics: tuple[str, ...] = ("acc",)
    shot_order: ClassVar[ShotOrder] = ShotOrder.RANDOM_OTHERS

    def documents(self, data: Data) -> Sequence[Document]:
        return data.documents(_table("validation"))

    def shots(self, data: Data) -> Mapping[str, Sequence[Document]]:
        return {"": data.documents(_table("train"))}

    def question(self, document: Document) -> str:
        """As a shot has it: up to the blank, filled in rightly. What is scored has either name in it."""
        return super().target(document)

    def prompt(self, document: Document, shots: Sequence[Document]) -> str:
        return "".join(map(self.example, shots))

    def choices(self, document: Document) -> Sequence[str]:
        before, _, _ = document.fields["sentence"].partition("_")
        return [before + document.fields[option] for option in ("option1", "option2")]

    def gold(self, document: Document) -> int:
        return int(document.fields["answer"]) - 1

    def target(self, document: Document) -> str:
        _, _, after = document.fields["sentence"].partition("_")
        return str(after).strip()

    def requests(self, document: Document, prompt: str) -> Sequence[Request]:
        continuation = TARGET_DELIMITER + self.target(document)
        return [Loglikelihood(context=prompt + choice, continuation=continuation) for choice in self.choices(document)]


def _table(split: str) -> Table:
    stored = Packaged(path="hf_datasets/winogrande/winogrande_xl/validation/*.arrow")
    return Table(
        name="allenai/winogrande",
        config="winogrande_xl",
        split=split,
        columns=("sentence", "option1", "option2", "answer"),
        packaged=stored if split == "validation" else None,
    )
