"""From a name to a task: the table that `--tasks` is looked up in."""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from rayllm.core.errors import ConfigError
from rayllm.eval.task import Task
from rayllm.eval.tasks import kmmlu, mmlu
from rayllm.eval.tasks.arc import Arc
from rayllm.eval.tasks.boolq import BoolQ
from rayllm.eval.tasks.hellaswag import HellaSwag
from rayllm.eval.tasks.perplexity import Perplexity, StridedPerplexity, WikiText
from rayllm.eval.tasks.piqa import Piqa
from rayllm.eval.tasks.winogrande import WinoGrande

_Make = Callable[[], Task]


def _by_subject(
    name: str, make: Callable[[str, Sequence[str]], Task], groups: Mapping[str, Sequence[str]]
) -> Iterator[tuple[str, _Make]]:
    """The task, and its groups and subjects as tasks of their own."""
    subjects = [subject for group in groups.values() for subject in group]
    yield name, partial(make, name, subjects)
    for part, chosen in [*groups.items(), *((subject, (subject,)) for subject in subjects)]:
        part_name = f"{name}_{part.lower().replace('-', '_')}"
        yield part_name, partial(make, part_name, chosen)


_SINGLE: Mapping[str, _Make] = {
    "perplexity": Perplexity,
    "perplexity_strided": StridedPerplexity,
    "wikitext": WikiText,
    "hellaswag": HellaSwag,
    "arc_easy": partial(Arc, "arc_easy", "ARC-Easy"),
    "arc_challenge": partial(Arc, "arc_challenge", "ARC-Challenge"),
    "winogrande": WinoGrande,
    "piqa": Piqa,
    "boolq": BoolQ,
}
_FAMILIES: Mapping[str, tuple[Callable[[str, Sequence[str]], Task], Mapping[str, Sequence[str]]]] = {
    "mmlu": (mmlu.Mmlu, mmlu.GROUPS),
    "kmmlu": (kmmlu.Kmmlu, kmmlu.GROUPS),
    "kmmlu_dev": (kmmlu.KmmluDev, kmmlu.GROUPS),
    "kmmlu_direct": (kmmlu.KmmluDirect, kmmlu.GROUPS),
    "kmmlu_cot_hard": (kmmlu.KmmluCotHard, kmmlu.GROUPS),
}
TASKS: Mapping[str, _Make] = {
    **_SINGLE,
    **{name: make for family, (kind, groups) in _FAMILIES.items() for name, make in _by_subject(family, kind, groups)},
}
TASK_NAMES = (*_SINGLE, *_FAMILIES)  # without the groups and subjects of the families


def find_task(name: str) -> Task:
    """ConfigError names the nearest task there is."""
    make = TASKS.get(name)
    if make is None:
        near = difflib.get_close_matches(name, TASKS, n=1)
        meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(TASK_NAMES)}"
        raise ConfigError(f"no task is called {name!r}; {meant}")
    return make()
