"""From token ids to text: the last part of the engine that is the same offline and served.

Keeps one incremental detokenizer for each live sequence, finds stop strings, and says which sequences they end.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from rayllm.core.errors import InvalidRequestError
from rayllm.core.tokenizer import Tokenizer
from rayllm.core.types import FinishReason, Request
from rayllm.engine.detokenizer import Detokenizer
from rayllm.engine.outputs import OutputDelta
from rayllm.scheduler.scheduler import SequenceOutput


@dataclass(slots=True)
class _LiveRequest:
    request: Request
    detokenizers: dict[int, Detokenizer] = field(default_factory=dict)  # by index, of those that still run


class OutputProcessor:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._live: dict[str, _LiveRequest] = {}

    def add(self, request: Request) -> None:
        """Raises InvalidRequestError for a sequence to be resumed that a stop string had ended."""
        live = _LiveRequest(request)
        for index, token_ids in request.started.items():
            detokenizer = Detokenizer(self._tokenizer, request.prompt_token_ids, request.params.stop)
            detokenizer.push(token_ids)  # the text that its reader has; what is held back of it comes with the next
            if detokenizer.stopped_by is not None:
                raise InvalidRequestError("resume", f"sequence {index} holds a stop string, which had ended it")
            live.detokenizers[index] = detokenizer
        self._live[request.request_id] = live

    def remove(self, request_id: str) -> None:
        self._live.pop(request_id, None)

    def is_live(self, request_id: str) -> bool:
        return request_id in self._live

    def process(self, outputs: Iterable[SequenceOutput]) -> list[tuple[str, OutputDelta]]:
        """One piece for each output that still has a reader; a piece that ends by a stop string says so."""
        deltas = []
        for output in outputs:
            live = self._live.get(output.request_id)
            if live is None or output.index not in live.detokenizers:
                continue  # aborted, or ended by a stop string while this token was under way
            delta = _delta(live.detokenizers[output.index], output, live.request.params.stop_token_ids)
            if delta.finish_reason is not None:
                del live.detokenizers[output.index]
                if not live.detokenizers:
                    del self._live[output.request_id]
            deltas.append((output.request_id, delta))
        return deltas


def _delta(detokenizer: Detokenizer, output: SequenceOutput, stop_token_ids: tuple[int, ...]) -> OutputDelta:
    token_ids = [] if output.token_id is None else [output.token_id]
    finish_reason = output.finish_reason
    stop_reason: str | int | None = output.stop_token if output.stop_token in stop_token_ids else None
    # The token that stops a sequence is among its token ids, not in its text.
    text = "" if output.stop_token is not None else detokenizer.push(token_ids)
    if detokenizer.stopped_by is not None:
        finish_reason, stop_reason = FinishReason.STOP, detokenizer.stopped_by
    elif finish_reason is not None:
        text += detokenizer.finish()
    return OutputDelta(
        index=output.index,
        text=text,
        token_ids=token_ids,
        logprobs=None if output.logprobs is None else [output.logprobs],
        finish_reason=finish_reason,
        stop_reason=stop_reason,
        prompt_logprobs=output.prompt_logprobs,
        num_cached_tokens=output.num_cached_tokens,
        queue_s=output.queue_s,
    )
