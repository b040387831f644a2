"""KMMLU (Son et al. 2024): 45 Korean subjects, four choices, scored by their letters or by what is written."""

import math
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from rayllm.eval.data import Data, Table, documents_of
from rayllm.eval.task import (
    Document,
    Generate,
    Generated,
    Metric,
    Request,
    Response,
    Score,
    Scored,
    ShotOrder,
    Task,
)
from rayllm.eval.tasks.multiple_choice import LETTERS, LetteredChoice

GROUPS: Mapping[str, tuple[str, ...]] = {
    "stem": (
        "Biology",
        "Chemical-Engineering",
        "Chemistry",
        "Civil-Engineering",
        "Computer-Science",
        "Ecology",
        "Electrical-Engineering",
        "Information-Technology",
        "Materials-Engineering",
        "Math",
        "Mechanical-Engineering",
    ),
    "other": (
        "Agricultural-Sciences",
        "Construction",
        "Fashion",
        "Food-Processing",
        "Health",
        "Interior-Architecture-and-Design",
        "Marketing",
        "Patent",
        "Public-Safety",
        "Real-Estate",
        "Refrigerating-Machinery",
    ),
    "applied_science": (
        "Aviation-Engineering-and-Maintenance",
        "Electronics-Engineering",
        "Energy-Management",
        "Environmental-Science",
        "Gas-Technology-and-Engineering",
        "Geomatics",
        "Industrial-Engineer",
        "Machine-Design-and-Manufacturing",
        "Maritime-Engineering",
        "Nondestructive-Testing",
        "Railway-and-Automotive-Engineering",
        "Telecommunications-and-Wireless-Technology",
    ),
    "humss": (
        "Accounting",
        "Criminal-Law",
        "Economics",
        "Education",
        "Korean-History",
        "Law",
        "Management",
        "Political-Science-and-Sociology",
        "Psychology",
        "Social-Welfare",
        "Taxation",
    ),
}
GROUP_OF = {subject: group for group, subjects in GROUPS.items() for subject in subjects}
COLUMNS = ("question", "answer", *LETTERS)
_LM_EVAL = "lm-eval==0.4.13"
_INVALID = "[invalid]"
_ANSWER_BEGINS, _ANSWER_ENDS = re.compile(r"(?<=정답은)\s*[(]?([ABCD])"), "입니다"
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class _KmmluTask(Task):
    """The subjects, and the averages: micro over all questions, macro over the subjects, as the paper has it."""

    version = "2.0"
    hub_name: ClassVar[str] = "HAERAE-HUB/KMMLU"

    def __init__(self, name: str, subjects: Sequence[str] = tuple(GROUP_OF)) -> None:
        self.name = name
        self._subjects = subjects

    def documents(self, data: Data) -> Sequence[Document]:
        return [document for subject in self._subjects for document in self._read(data, subject, "test")]

    def shots(self, data: Data) -> Mapping[str, Sequence[Document]]:
        return {subject: self._read(data, subject, "dev") for subject in self._subjects}

    def groups(self, document: Document) -> Sequence[str]:
        return (GROUP_OF[document.subject], document.subject)

    def question(self, document: Document) -> str:
        fields = document.fields
        lines = [f"{letter}. {fields[letter]}" for letter in LETTERS]
        return "\n".join([fields["question"].strip(), *lines, "정답："])  # noqa: RUF001

    def aggregate(self, scored: Sequence[Scored]) -> list[Metric]:
        metrics = super().aggregate(scored)
        name = self.metrics[0]
        return [*metrics, _macro(name, [m for m in metrics if m.name == name and m.group in GROUP_OF])]

    def _read(self, data: Data, subject: str, split: str) -> list[Document]:
        return data.documents(Table(name=self.hub_name, config=subject, split=split, columns=COLUMNS), subject)


class Kmmlu(_KmmluTask, LetteredChoice):
    def gold(self, document: Document) -> int:
        return int(document.fields["answer"]) - 1


class KmmluDev(Kmmlu):
    """The five questions of each subject that lm-eval carries as shots of `kmmlu_cot_hard`: KMMLU's development split,
    with which a run can be tried offline. It is not KMMLU, and its figures must not be called so."""

    def documents(self, data: Data) -> Sequence[Document]:
        return [
            document
            for subject in self._subjects
            for document in documents_of([_as_row(shot) for shot in _cot_config(data, subject)["shots"]], subject)
        ]

    def shots(self, data: Data) -> Mapping[str, Sequence[Document]]:
        return {}


class KmmluDirect(_KmmluTask):
    """The model writes the letter."""

    metrics = ("exact_match",)
    until: ClassVar[tuple[str, ...]] = ("Q:", "\n\n", "</s>", ".")

    def target(self, document: Document) -> str:
        return _letter(document.fields["answer"])

    def requests(self, document: Document, prompt: str) -> Sequence[Request]:
        return [Generate(prompt=prompt, until=self.until)]

    def score(self, document: Document, responses: Sequence[Response]) -> Score:
        answer = _bare(_text(responses).replace(" ", ""))
        return Score(values={"exact_match": float(answer == _bare(self.target(document)))}, extracted=answer)


class KmmluCotHard(_KmmluTask):
    """The hard questions, with five worked solutions before each. Those and the wording are read from lm-eval's own
    files; the model reasons, and the letter after 정답은 is its answer."""

    metrics = ("exact_match",)
    hub_name = "HAERAE-HUB/KMMLU-HARD"
    num_fewshot: ClassVar[int] = 5
    shot_order: ClassVar[ShotOrder] = ShotOrder.FIRST
    until: ClassVar[tuple[str, ...]] = ("질문:",)

    def __init__(self, name: str, subjects: Sequence[str] = tuple(GROUP_OF)) -> None:
        super().__init__(name, subjects)
        self._wording: dict[str, str] = {}

    def documents(self, data: Data) -> Sequence[Document]:
        self._wording = {subject: _cot_config(data, subject)["question"] for subject in self._subjects}
        return super().documents(data)

    def shots(self, data: Data) -> Mapping[str, Sequence[Document]]:
        return {subject: documents_of(_cot_config(data, subject)["shots"], subject) for subject in self._subjects}

    def question(self, document: Document) -> str:
        return re.sub(r"\{\{(\w+)\}\}", lambda name: str(document.fields[name[1]]), self._wording[document.subject])

    def target(self, document: Document) -> str:
        fields = document.fields
        return _letter(fields["answer"]) if "answer" in fields else str(fields["target"])

    def requests(self, document: Document, prompt: str) -> Sequence[Request]:
        return [Generate(prompt=prompt, until=self.until, max_tokens=2048)]

    def score(self, document: Document, responses: Sequence[Response]) -> Score:
        found = written_answers(_text(responses))
        answer = found[0].strip() if found else _INVALID
        return Score(values={"exact_match": float(_bare(answer) == _bare(self.target(document)))}, extracted=answer)

    def _read(self, data: Data, subject: str, split: str) -> list[Document]:
        table = Table(name=self.hub_name, config=_file_name(subject), split=split, columns=COLUMNS)
        return data.documents(table, subject)


def _letter(answer: int | str) -> str:
    """KMMLU counts from 1."""
    return dict(enumerate(LETTERS, 1))[int(answer)]


def _macro(name: str, by_subject: Sequence[Metric]) -> Metric:
    n = len(by_subject)
    variances = [metric.stderr**2 for metric in by_subject if metric.stderr is not None]
    return Metric(
        name=f"{name}_macro",
        value=math.fsum(metric.value for metric in by_subject) / n,
        stderr=math.sqrt(math.fsum(variances)) / n if len(variances) == n else None,
        num_documents=sum(metric.num_documents for metric in by_subject),
    )


def _cot_config(data: Data, subject: str) -> dict[str, Any]:
    """`question`: the wording with {{columns}}; `shots`: rows with a worked `target`."""
    import yaml

    folder = data.package_folder("lm_eval", _LM_EVAL) / "tasks" / "kmmlu" / "cot_hard"
    path = folder / f"kmmlu_cot_hard_{_file_name(subject)}.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {"question": config["doc_to_text"], "shots": config["fewshot_config"]["samples"]}


def _as_row(shot: Mapping[str, Any]) -> dict[str, Any]:
    """A worked solution as a question of KMMLU, whose answers count from 1."""
    (letter,) = written_answers(shot["target"])
    question = shot["question"].removeprefix("질문:").strip()
    return {"question": question, "answer": LETTERS.index(letter) + 1, **{each: shot[each] for each in LETTERS}}


def written_answers(text: str) -> list[str]:
    r"""What lm-eval's `(?<=정답은)\s*[(]?(A|B|C|D)[)]?.*(?=입니다.)` finds, in time linear in the text's length.

    An answer goes up to the last end on its line, and an end has one more character after it.
    """
    answers: list[str] = []
    position, line_end, last_end = 0, -1, -1
    while found := _ANSWER_BEGINS.search(text, position):
        position = found.end()
        if position > line_end:  # the first one on its line
            line_end = text.find("\n", position)
            line_end = len(text) if line_end < 0 else line_end
            last_end = text.rfind(_ANSWER_ENDS, position, line_end - 1)
        if last_end >= position:
            answers.append(found[1])
            position = last_end
    return answers


def _file_name(subject: str) -> str:
    return subject.lower().replace("-", "_")


def _text(responses: Sequence[Response]) -> str:
    (response,) = responses
    assert isinstance(response, Generated)
    return response.texts[0]


def _bare(text: str) -> str:
    """Without case and punctuation."""
    return text.lower().translate(_PUNCTUATION)
