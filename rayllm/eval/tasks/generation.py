"""What all tasks share in which the model writes its answer."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from rayllm.eval.task import Document, Generate, Generated, Request, Response, Score, Task


class Generation(Task):
    """Greedy, one answer, unless a task says otherwise.

    `chat`: the whole prompt, shots included, is one message of a user, by the model's chat template; the answer begins
    with `prefix`. That is lm-eval's `--apply_chat_template`.
    """

    max_tokens: ClassVar[int] = 256
    num_samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    chat: bool = False

    @abstractmethod
    def score_texts(self, document: Document, texts: Sequence[str]) -> Score:
        """The answers, each ended before the first of `until`."""

    def prefix(self, document: Document) -> str:
        """What every answer is made to begin with."""
        return ""

    def requests(self, document: Document, prompt: str) -> Sequence[Request]:
        return [
            Generate(
                prompt=(("user", prompt),) if self.chat else prompt,
                prefix=self.prefix(document),
                until=self.until,
                max_tokens=self.max_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
                n=self.num_samples,
            )
        ]

    def score(self, document: Document, responses: Sequence[Response]) -> Score:
        (response,) = responses
        assert isinstance(response, Generated)
        return self.score_texts(document, response.texts)
