"""The time to first token of the last seconds, those who still wait for theirs included: when nobody gets an answer any
more, that is what shows it."""

import time
from collections import deque
from typing import Final

WINDOW_S: Final = 10.0
_MAX_KEPT: Final = 4096  # a bound on memory; the newest of the window say enough


class RecentTtft:
    def __init__(self) -> None:
        self._waiting: dict[str, float] = {}  # arrival by request id, oldest first
        self._answered: deque[tuple[float, float]] = deque(maxlen=_MAX_KEPT)  # when, and how long it took

    def arrived(self, request_id: str, arrival: float) -> None:
        """`arrival`: monotonic seconds."""
        self._waiting[request_id] = arrival

    def answered(self, request_id: str) -> None:
        now = time.monotonic()
        self._answered.append((now, now - self._waiting.pop(request_id)))

    def left(self, request_id: str) -> None:
        """With or without an answer."""
        self._waiting.pop(request_id, None)

    def seconds(self) -> float:
        """The mean of those answered in the window, or the longest wait of now if that is longer; 0: neither."""
        now = time.monotonic()
        while self._answered and self._answered[0][0] < now - WINDOW_S:
            self._answered.popleft()
        mean = sum(took for _, took in self._answered) / len(self._answered) if self._answered else 0.0
        longest = now - next(iter(self._waiting.values())) if self._waiting else 0.0
        return max(mean, longest)
