"""What a task is: documents, the prompts made of them, and what an answer is worth.

A task is pure data and pure functions: it knows nothing of models, tokens, engines or files. The evaluation runs its
requests; supervised tuning reads `question` and `target`; reinforcement learning reads `question` and `reward`.

Prompts, scores and metrics are those of lm-eval 0.4.13 under the same task name; what differs has another name.
"""

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

from rayllm.core.errors import ConfigError

if TYPE_CHECKING:
    from rayllm.eval.data import Data

FEWSHOT_SEED = 1234  # lm-eval's
FEWSHOT_DELIMITER = "\n\n"
TARGET_DELIMITER = " "


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One row of a data set. `index` counts within its subject, in the data's own order; `source` is the row's file and
    number, where it has one."""

    index: int
    fields: Mapping[str, Any]
    subject: str = ""
    source: str = field(default="", compare=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Loglikelihood:
    """How likely is `continuation` after `context`? Answered by `Likelihood`."""

    context: str
    continuation: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RollingLoglikelihood:
    """How likely is all of `text`, in windows as long as the context allows? Answered by `Likelihood`.

    `stride` None: disjoint windows, every token scored once, the first after the prefix token (lm-eval). Otherwise
    windows begin `stride` tokens apart, the text's first token is not scored, and each window scores what no earlier
    one did (the recipe in Hugging Face's documentation). `window`: tokens; None: the model's context.
    """

    text: str
    stride: int | None = None
    window: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Generate:
    """What does the model write? Answered by `Generated`.

    `prompt` is text, or a conversation as (role, content) pairs for the model's chat template. `prefix` is what the
    answer is made to begin with; it is not part of the text that comes back, which ends before the first of `until`.
    """

    prompt: str | tuple[tuple[str, str], ...]
    prefix: str = ""
    until: tuple[str, ...] = ()
    max_tokens: int = 256
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    n: int = 1


Request = Loglikelihood | RollingLoglikelihood | Generate


@dataclass(frozen=True, kw_only=True, slots=True)
class Likelihood:
    """`logprob` in nats, summed over `num_tokens`; `is_greedy`: each of them was the most likely one."""

    logprob: float
    num_tokens: int
    is_greedy: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Generated:
    """The `n` texts that were asked for."""

    texts: tuple[str, ...]


Response = Likelihood | Generated


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """What one document's responses are worth, by the name of the metric, and the answer that was read out of them."""

    values: Mapping[str, float]
    extracted: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """A figure over `num_documents` documents: those of `group`, or all where it is empty.

    `stderr` is the standard error of a mean over documents; None where the figure is no such mean.
    """

    name: str
    value: float
    stderr: float | None
    num_documents: int
    group: str = ""


Scored = tuple[Document, Score]


class ShotOrder(Enum):
    FIRST = "first"  # the first ones, the same for every document
    RANDOM = "random"  # drawn anew for each document, by one generator for each subject
    RANDOM_OTHERS = "random_others"  # one more is drawn, and one that equals the document is left out


def cut(text: str, until: Sequence[str]) -> str:
    """`text` up to the first of `until`."""
    for end in until:
        text = text.partition(end)[0]
    return text


class Task(ABC):
    """`score` may be called from any thread, several at a time; all else is called from one.

    `metrics`: the names of `Score.values` that are averaged, the first of them the one that `reward` gives.
    """

    name: str
    version: str
    metrics: tuple[str, ...]
    num_fewshot: ClassVar[int] = 0  # where the user says nothing
    shot_order: ClassVar[ShotOrder] = ShotOrder.RANDOM
    until: ClassVar[tuple[str, ...]] = ()  # what ends a written answer
    runs_code: ClassVar[bool] = False  # `score` runs what the model wrote: ask `check_permission` first

    @abstractmethod
    def documents(self, data: "Data") -> Sequence[Document]:
        """What is to be scored, subject by subject. DataError says how to get what is missing."""

    def shots(self, data: "Data") -> Mapping[str, Sequence[Document]]:
        """By subject, what shots are taken from; read only where there are to be shots. Raises DataError."""
        return {}

    @abstractmethod
    def question(self, document: Document) -> str:
        """What the model reads of one document, up to where its answer begins."""

    @abstractmethod
    def target(self, document: Document) -> str:
        """The right answer as the model should write it after the question."""

    @abstractmethod
    def requests(self, document: Document, prompt: str) -> Sequence[Request]: ...

    @abstractmethod
    def score(self, document: Document, responses: Sequence[Response]) -> Score:
        """`responses` in the order of `requests`."""

    def description(self, document: Document) -> str:
        """What comes before all shots."""
        return ""

    def example(self, document: Document) -> str:
        """A question with its answer, as it stands before the real question: a shot."""
        return self.question(document) + TARGET_DELIMITER + self.target(document) + FEWSHOT_DELIMITER

    def prompt(self, document: Document, shots: Sequence[Document]) -> str:
        return self.description(document) + "".join(map(self.example, shots)) + self.question(document)

    def try_out(self, document: Document) -> None:
        """Makes of the document all that a run does before the model answers. Raises LookupError, TypeError, ValueError
        or AttributeError where its columns hold what the task can make no use of."""
        self.target(document)
        self.requests(document, self.question(document))

    def reward(self, document: Document, text: str, *, allow_code_execution: bool = False) -> float:
        """What `text` is worth as the answer to `question`. See `check_permission`."""
        self.check_permission(allow_code_execution=allow_code_execution)
        return self.worth(document, text)

    def worth(self, document: Document, text: str) -> float:
        """`reward` once it is permitted: the first metric; what follows the answer's end does not count."""
        return self.score(document, [Generated(texts=(cut(text, self.until),))]).values[self.metrics[0]]

    def check_permission(self, *, allow_code_execution: bool) -> None:
        """Raises ConfigError for a task that runs what the model writes, unless that is allowed."""
        if self.runs_code and not allow_code_execution:
            raise ConfigError(
                f"{self.name} runs programs that the model writes; allow it with --allow-code-execution, on a machine "
                "where that does no harm"
            )

    def groups(self, document: Document) -> Sequence[str]:
        """The parts of the task, besides the whole, that the document counts towards."""
        return (document.subject,) if document.subject else ()

    def environment(self) -> Mapping[str, str]:
        """What else the scores depend on, for the record: what ran a program, say."""
        return {}

    def aggregate(self, scored: Sequence[Scored]) -> list[Metric]:
        """The mean over all documents of each metric (a micro average), then that over each group."""
        parts: dict[str, list[Score]] = {"": [score for _, score in scored]}
        for document, score in scored:
            for group in self.groups(document):
                parts.setdefault(group, []).append(score)
        return [
            mean_metric(name, [score.values[name] for score in scores], group)
            for group, scores in parts.items()
            for name in self.metrics
        ]


def mean_metric(name: str, values: Sequence[float], group: str = "") -> Metric:
    """With the standard error of the mean, from the sample standard deviation."""
    n = len(values)
    mean = math.fsum(values) / n
    spread = math.fsum((value - mean) ** 2 for value in values)
    stderr = math.sqrt(spread / (n - 1) / n) if n > 1 else None
    return Metric(name=name, value=mean, stderr=stderr, num_documents=n, group=group)


def choose_shots(
    documents: Iterable[Document], pool: Mapping[str, Sequence[Document]], num_shots: int, order: ShotOrder
) -> list[Sequence[Document]]:
    """The shots of each document, as lm-eval takes them: so they depend on the documents before it in its subject.

    `pool` holds `num_shots` of each subject at least, and one more where the document itself is left out.
    """
    generators: dict[str, random.Random] = {}
    chosen: list[Sequence[Document]] = []
    for document in documents:
        shots = pool.get(document.subject, ())
        if order is ShotOrder.FIRST or num_shots == 0:
            chosen.append(shots[:num_shots])
        else:
            generator = generators.setdefault(document.subject, random.Random(FEWSHOT_SEED))
            others = order is ShotOrder.RANDOM_OTHERS
            chosen.append(_draw(generator, shots, num_shots, leave_out=document if others else None))
    return chosen


def _draw(
    generator: random.Random, pool: Sequence[Document], num_shots: int, *, leave_out: Document | None
) -> Sequence[Document]:
    if leave_out is None:
        return generator.sample(pool, num_shots)
    drawn = [shot for shot in generator.sample(pool, num_shots + 1) if shot.fields != leave_out.fields]
    if len(drawn) < num_shots:  # it is in the pool more than once
        return generator.sample([shot for shot in pool if shot.fields != leave_out.fields], num_shots)
    return drawn[:num_shots]
