"""From a name to a task: the table that `--tasks` is looked up in."""

import difflib
from collections.abc import Callable, Mapping

from rayllm.core.errors import ConfigError
from rayllm.eval.task import Task

TASKS: Mapping[str, Callable[[], Task]] = {}


def find_task(name: str) -> Task:
    """ConfigError names the nearest task there is."""
    make = TASKS.get(name)
    if make is None:
        near = difflib.get_close_matches(name, TASKS, n=1)
        meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(TASKS))}"
        raise ConfigError(f"no task is called {name!r}; {meant}")
    return make()
