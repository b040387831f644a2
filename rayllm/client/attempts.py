"""A call that is made again when its replica or connection is lost: what to send, when, and when to give up.

Does no I/O. A stream goes on from the tokens that have come: draw t of an answer depends on (seed, t) alone, so with
its seed fixed it has the same tokens and text wherever the rest of it is made.
"""

import random
import secrets
import time
import uuid

from rayllm.client import codec
from rayllm.client.types import Chunk
from rayllm.core.errors import CapacityError, EngineUnavailableError, RayLLMError
from rayllm.core.types import SamplingParams
from rayllm.proto.v1 import inference_pb2 as pb

RETRY_FOR_S = 60.0
# A stream that was cut so often, with pieces in between, may be what kills its replicas.
MAX_CUTS = 8

_FIRST_PAUSE_S = 0.05  # doubled each time; a random half of it is taken off, so that clients do not return together
_LONGEST_PAUSE_S = 2.0


class Attempts:
    """When to try again. `timeout_s` bounds the whole call (None: nothing does), `retry_for_s` how long it goes on
    trying without an answer; 0: it is made once."""

    def __init__(self, *, timeout_s: float | None, retry_for_s: float) -> None:
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._retry_for_s = retry_for_s
        self._answered = time.monotonic()
        self._failures = 0  # since then

    @property
    def remaining_s(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def pause_after(self, error: RayLLMError) -> float:
        """Seconds to wait before the next attempt. Raises the error if there is to be none."""
        if not isinstance(error, EngineUnavailableError):
            raise error
        return self._pause(error)

    def _pause(self, error: RayLLMError, at_least_s: float = 0.0) -> float:
        longest = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0**self._failures)
        self._failures += 1
        pause_s = max(at_least_s, longest * random.uniform(0.5, 1.0))
        then = time.monotonic() + pause_s
        if then > self._answered + self._retry_for_s or (self._deadline is not None and then >= self._deadline):
            raise error
        return pause_s


class GenerateAttempts(Attempts):
    """Of a call for a whole answer: it begins anew each time, for nothing has come of it."""

    def __init__(self, request: pb.GenerateRequest, *, timeout_s: float | None, retry_for_s: float) -> None:
        super().__init__(timeout_s=timeout_s, retry_for_s=retry_for_s)
        self._request = request
        self._attempt = 0
        if not request.request_id:
            request.request_id = f"py-{uuid.uuid4().hex}"

    def next_request(self) -> pb.GenerateRequest:
        self._request.attempt = self._attempt
        self._attempt += 1
        if (remaining_s := self.remaining_s) is not None:
            self._request.timeout_ms = codec.milliseconds(remaining_s)
        return self._request


class StreamAttempts(GenerateAttempts):
    """Of a stream: keeps the tokens that have come, and asks for what follows on them."""

    def __init__(
        self,
        request: pb.GenerateRequest,
        params: SamplingParams | None,
        *,
        timeout_s: float | None,
        retry_for_s: float,
    ) -> None:
        super().__init__(request, timeout_s=timeout_s, retry_for_s=retry_for_s)
        self._params = params
        self._held = [pb.ResumedSequence() for _ in range(1 if params is None else params.n)]
        self._weight_version = ""
        self._cuts = 0
        if not request.sampling.HasField("seed"):
            request.sampling.seed = secrets.randbits(63)

    @property
    def complete(self) -> bool:
        return all(sequence.finished for sequence in self._held)

    def next_request(self) -> pb.GenerateRequest:
        request = super().next_request()
        if self._weight_version:
            request.resume.CopyFrom(pb.Resumption(weight_version=self._weight_version, sequences=self._held))
            if self._held[0].token_ids or self._held[0].finished:  # the prompt's came with its first piece
                request.sampling.ClearField("prompt_logprobs")
                request.sampling.ClearField("prompt_logprobs_start")
        return request

    def take(self, message: pb.GenerateChunk) -> Chunk:
        held = self._held[message.index]
        held.token_ids.extend(message.token_ids)
        held.finished = message.finish_reason != pb.FINISH_REASON_UNSPECIFIED
        self._weight_version = message.weight_version
        self._answered = time.monotonic()
        if self._failures:
            self._failures = 0
            self._cuts += 1
        return codec.chunk(message, self._params)

    def pause_after(self, error: RayLLMError) -> float:
        # An answer that has begun is worth waiting for; one that has not is refused as any other is.
        if self._weight_version and isinstance(error, CapacityError):
            return self._pause(error, error.retry_after_s)
        if self._cuts >= MAX_CUTS:
            raise error
        return super().pause_after(error)


def cut_short() -> EngineUnavailableError:
    """For a stream that ended as if all were well, but before its answers did."""
    return EngineUnavailableError("the stream ended before the answer was complete")
