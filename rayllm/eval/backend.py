"""Who answers a task's requests: the engine in this process, or an endpoint."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from rayllm.eval.task import Request, Response

OnResponse = Callable[[int, Response], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Tokens of all prompts so far, and how many of them were found in the prefix cache."""

    prompt_tokens: int
    cached_tokens: int


class Backend(Protocol):
    model: str
    weight_version: str | None  # None: the endpoint does not say

    @property
    def usage(self) -> Usage | None:
        """None where the endpoint does not say."""
        ...

    def run(self, requests: Sequence[Request], seeds: Sequence[int], on_response: OnResponse) -> None:
        """Answers all, in any order: `on_response` hears of each with its index. A generation that is sampled depends
        on its seed and on nothing else of the run.

        Raises ConfigError before anything is run where a prompt is too long for the model.
        """
        ...

    def close(self) -> None: ...
