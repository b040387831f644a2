"""The waiting sequences, first come first served, and the bound on how much may wait.

The bound counts requests and prompt tokens, a request once however many of its sequences wait. It holds for new
requests only: a sequence that was admitted before always gets its place back, at the front.
"""

import math
import time
from collections import Counter, deque
from collections.abc import Iterator

from rayllm.core.errors import CapacityError
from rayllm.scheduler.sequence import Sequence, Status

_RATE_WINDOW = 64  # departed requests over which the queue's speed is measured
_MIN_RETRY_S = 1.0
_MAX_RETRY_S = 60.0


class WaitingQueue:
    def __init__(self, *, max_requests: int, max_tokens: int) -> None:
        self.num_requests = 0
        self.num_tokens = 0  # of the prompts
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._sequences: deque[Sequence] = deque()
        # When the queue last ceased to be empty (or the window begins), then one time for each request that left since.
        self._departures: deque[float] = deque(maxlen=_RATE_WINDOW + 1)

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    @property
    def head(self) -> Sequence:
        return self._sequences[0]

    def check_room(self, prompt_len: int, free_places: int) -> None:
        """Raises CapacityError if a new request with such a prompt must not wait too. An empty queue takes any.

        `free_places`: how many more may run; as many do not count, since the next step takes them if it has the blocks.
        """
        if not self._sequences:
            return
        excess_tokens = self.num_tokens + prompt_len - self._max_tokens
        if self.num_requests < self._max_requests + free_places and excess_tokens <= 0:
            return
        num_leaving = max(1, math.ceil(excess_tokens * self.num_requests / self.num_tokens))
        raise CapacityError(
            f"the queue is full: {self.num_requests} requests with {self.num_tokens} prompt tokens are waiting",
            retry_after_s=self._time_until_left(num_leaving),
        )

    def _time_until_left(self, num_requests: int) -> float:
        """Seconds, from the speed of the last departures; with none yet, as long again as the queue has stood."""
        elapsed = time.monotonic() - self._departures[0]
        seconds = num_requests * elapsed / max(1, len(self._departures) - 1)
        return min(max(seconds, _MIN_RETRY_S), _MAX_RETRY_S)

    def append(self, sequence: Sequence) -> None:
        self._entered(sequence)
        self._sequences.append(sequence)

    def appendleft(self, sequence: Sequence) -> None:
        self._entered(sequence)
        self._sequences.appendleft(sequence)

    def popleft(self) -> Sequence:
        sequence = self._sequences.popleft()
        if sequence.group.num_queued == 1:
            self._departures.append(time.monotonic())
        self._left(sequence)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        self._sequences.remove(sequence)
        self._left(sequence)

    def check_integrity(self) -> None:
        """Raises AssertionError unless the counts are those of the sequences."""
        groups = {id(sequence.group): sequence.group for sequence in self._sequences}
        queued = Counter(id(sequence.group) for sequence in self._sequences)
        assert all(group.num_queued == queued[key] for key, group in groups.items()), "a group's queue count is wrong"
        assert self.num_requests == len(groups), f"{len(groups)} requests wait, {self.num_requests} are counted"
        num_tokens = sum(len(group.request.prompt_token_ids) for group in groups.values())
        assert self.num_tokens == num_tokens, f"{num_tokens} prompt tokens wait, {self.num_tokens} are counted"

    def _entered(self, sequence: Sequence) -> None:
        sequence.status = Status.WAITING
        if not self._departures:
            self._departures.append(time.monotonic())
        sequence.group.num_queued += 1
        if sequence.group.num_queued == 1:
            self.num_requests += 1
            self.num_tokens += len(sequence.prompt_token_ids)

    def _left(self, sequence: Sequence) -> None:
        sequence.group.num_queued -= 1
        if not sequence.group.num_queued:
            self.num_requests -= 1
            self.num_tokens -= len(sequence.prompt_token_ids)
        if not self._sequences:
            self._departures.clear()  # an idle queue has no speed
