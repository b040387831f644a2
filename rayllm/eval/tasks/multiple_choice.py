"""What all tasks with given choices share: each choice is scored as a continuation, the likeliest one is the answer."""

import math
from abc import abstractmethod
from collections.abc import Sequence

from rayllm.eval.task import (
    TARGET_DELIMITER,
    Document,
    Likelihood,
    Loglikelihood,
    Request,
    Response,
    Score,
    Task,
)

LETTERS = ("A", "B", "C", "D")
LETTER_ENDS = (".", ",", ":", ";", ")", "\n")


class MultipleChoice(Task):
    """`acc`: the likeliest choice is the right one. `acc_norm`: the same, by log-likelihood over a choice's length in
    characters. Of equally likely choices the first is taken."""

    metrics: tuple[str, ...] = ("acc", "acc_norm")

    @abstractmethod
    def choices(self, document: Document) -> Sequence[str]: ...

    @abstractmethod
    def gold(self, document: Document) -> int:
        """The index of the right choice."""

    def target(self, document: Document) -> str:
        gold, choices = self.gold(document), self.choices(document)
        if not 0 <= gold < len(choices):  # not counted from the end
            raise IndexError(f"choice {gold} of {len(choices)}, counted from 0")
        return choices[gold]

    def requests(self, document: Document, prompt: str) -> Sequence[Request]:
        return [
            Loglikelihood(context=prompt, continuation=TARGET_DELIMITER + choice) for choice in self.choices(document)
        ]

    def score(self, document: Document, responses: Sequence[Response]) -> Score:
        choices = self.choices(document)
        logprobs = [_logprob(response) for response in responses]
        best = _first_best(logprobs)
        best_by_length = _first_best([_by_length(*each) for each in zip(logprobs, choices, strict=True)])
        values = {"acc": float(best == self.gold(document)), "acc_norm": float(best_by_length == self.gold(document))}
        return Score(values={name: values[name] for name in self.metrics}, extracted=choices[best])

    def worth(self, document: Document, text: str) -> float:
        """1 where the text begins with the right choice, after white space, and with no longer one."""
        target = self.target(document)
        written = [each for each in (target, *self.choices(document)) if self.begins(text.strip(), each)]
        return float(max(written, key=len, default=None) == target)

    def begins(self, text: str, choice: str) -> bool:
        """With the choice, and not with a word that the choice begins."""
        goes_on = text[len(choice) : len(choice) + 1].isalnum() and choice[-1:].isalnum()
        return text.startswith(choice) and not goes_on


class LetteredChoice(MultipleChoice):
    """The choices are shown with letters, and the letters are what is scored."""

    metrics: tuple[str, ...] = ("acc",)

    def choices(self, document: Document) -> Sequence[str]:
        return LETTERS

    def begins(self, text: str, choice: str) -> bool:
        """Alone, or closed as a letter is: `A`, `A.`, `A) The heart`, but neither `At first` nor `A heart`."""
        return text == choice or text.startswith(tuple(choice + end for end in LETTER_ENDS))


def _logprob(response: Response) -> float:
    assert isinstance(response, Likelihood)
    return response.logprob


def _by_length(logprob: float, choice: str) -> float:
    """lm-eval divides by 0 where a choice is empty: minus infinity."""
    return logprob / len(choice) if choice else -math.inf


def _first_best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda i: values[i])
