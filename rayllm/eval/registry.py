"""From a name to a task: the table that `--tasks` is looked up in."""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from rayllm.core.errors import ConfigError
from rayllm.eval.task import Task
from rayllm.eval.tasks import kmmlu, mmlu
from rayllm.eval.tasks.arc import Arc
from rayllm.eval.tasks.boolq import BoolQ
from rayllm.eval.tasks.gsm8k import Gsm8k, Gsm8kCot
from rayllm.eval.tasks.hellaswag import HellaSwag
from rayllm.eval.tasks.hendrycks_math import HendrycksMath
from rayllm.eval.tasks.humaneval import HumanEval, HumanEvalInstruct
from rayllm.eval.tasks.math_boxed import MathBoxed
from rayllm.eval.tasks.math_data import SUBJECTS as MATH_SUBJECTS
from rayllm.eval.tasks.mbpp import Mbpp
from rayllm.eval.tasks.minerva_math import MinervaMath
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


_MANY = (2, 8, 16, 32, 64)  # of 64 samples
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
    "gsm8k": Gsm8k,
    "gsm8k_cot": partial(Gsm8kCot, "gsm8k_cot"),
    "gsm8k_cot_chat": partial(Gsm8kCot, "gsm8k_cot_chat", chat=True),
    "humaneval": partial(HumanEval, "humaneval"),
    "humaneval_64": partial(HumanEval, "humaneval_64", num_samples=64, ks=_MANY),
    "humaneval_instruct": partial(HumanEvalInstruct, "humaneval_instruct"),
    "humaneval_instruct_chat": partial(HumanEvalInstruct, "humaneval_instruct_chat", chat=True),
    "humaneval_64_instruct": partial(
        HumanEvalInstruct, "humaneval_64_instruct", version="3.0", num_samples=64, ks=_MANY
    ),
    "mbpp": partial(Mbpp, "mbpp"),
}
_MATH_PARTS = {subject: (subject,) for subject in MATH_SUBJECTS}
_FAMILIES: Mapping[str, tuple[Callable[[str, Sequence[str]], Task], Mapping[str, Sequence[str]]]] = {
    "mmlu": (mmlu.Mmlu, mmlu.GROUPS),
    "kmmlu": (kmmlu.Kmmlu, kmmlu.GROUPS),
    "kmmlu_dev": (kmmlu.KmmluDev, kmmlu.GROUPS),
    "kmmlu_direct": (kmmlu.KmmluDirect, kmmlu.GROUPS),
    "kmmlu_cot_hard": (kmmlu.KmmluCotHard, kmmlu.GROUPS),
    "hendrycks_math": (HendrycksMath, _MATH_PARTS),
    "minerva_math": (MinervaMath, _MATH_PARTS),
    "math_boxed": (MathBoxed, _MATH_PARTS),
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
