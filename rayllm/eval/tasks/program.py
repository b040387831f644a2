"""What the tasks share in which the model writes a program: it is run against the problem's tests, in a sandbox."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from rayllm.eval.pass_at_k import pass_at_k
from rayllm.eval.sandbox.check import Check, shared_sandbox
from rayllm.eval.task import Document, Score, cut
from rayllm.eval.tasks.generation import Generation


class ProgramTask(Generation):
    """pass@k, unbiased, from `num_samples` programs, which are sampled where there are several. What is extracted is
    the first of them."""

    runs_code: ClassVar[bool] = True

    def __init__(self, name: str, *, num_samples: int = 1, ks: Sequence[int] = (1,)) -> None:
        self.name = name
        self.num_samples = num_samples
        self.temperature, self.top_p = (0.0, 1.0) if num_samples == 1 else (0.2, 0.95)
        self._ks = tuple(ks)
        self.metrics = tuple(f"pass@{k}" for k in ks)

    @abstractmethod
    def check(self, document: Document, text: str) -> Check:
        """The program that `text` makes, with the problem's tests."""

    def try_out(self, document: Document) -> None:
        super().try_out(document)
        self.check(document, "")

    def environment(self) -> Mapping[str, str]:
        return {"sandbox": str(shared_sandbox().isolation)}

    def score_texts(self, document: Document, texts: Sequence[str]) -> Score:
        checks = [self.check(document, text) for text in texts]
        passes = {check.program: shared_sandbox().run(check).passed for check in dict.fromkeys(checks)}
        right = sum(passes[check.program] for check in checks)
        values = {f"pass@{k}": pass_at_k(len(texts), right, k) for k in self._ks}
        return Score(values=values, extracted=checks[0].program)

    def worth(self, document: Document, text: str) -> float:
        """1 if the program passes."""
        return float(shared_sandbox().run(self.check(document, cut(text, self.until))).passed)
