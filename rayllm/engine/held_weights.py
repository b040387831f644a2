"""Which weights an engine holds: those of new requests, and at most one version beside them.

The other ones ran before, or were loaded to run next. They stay until a third version needs their place: whoever has
the memory to change weights has it for two versions, and so going back costs nothing.
"""

import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field

from rayllm.core.errors import CheckpointError, EngineUnavailableError, PromotionError, RayLLMError
from rayllm.engine.executor import Executor
from rayllm.engine.weights import Weights
from rayllm.scheduler.scheduler import Scheduler

_LOOK_S = 0.02  # between two looks at how far a load is


@dataclass(eq=False, kw_only=True, slots=True)
class _Load:
    """`has_begun`: the executor was told; before, requests of the weights whose place these take are waited for."""

    weights: Weights
    done: Future[None] = field(default_factory=Future)
    has_begun: bool = False
    next_look: float = 0.0


class HeldWeights:
    """`tend`, `lost` and `close` are for the thread that steps, the rest for any."""

    def __init__(self, weights: Weights, scheduler: Scheduler, executor: Executor, lock: threading.RLock) -> None:
        """`lock` is that of the scheduler."""
        self._held = {weights.version: weights}
        self._scheduler = scheduler
        self._executor = executor
        self._lock = lock
        self._load: _Load | None = None

    @property
    def current(self) -> Weights:
        """Those that answer requests which name none."""
        return self._held[self._scheduler.weight_version]

    @property
    def all(self) -> list[Weights]:
        return list(self._held.values())

    @property
    def is_loading(self) -> bool:
        return self._load is not None

    def check(self, version: str | None) -> None:
        """Raises EngineUnavailableError unless a request may name `version`."""
        if version is not None and version not in self._held:
            raise EngineUnavailableError(
                f"the weights {version[:64]!r} are not here; here are {self._scheduler.weight_version!r}"
            )

    def load(self, weights: Weights) -> Future[None]:
        """Begin to read them, to be held beside the current ones, in the place of any others once no request has those.

        The future ends with CheckpointError when they cannot be read and EngineUnavailableError when a rank is lost
        meanwhile; then nothing has changed, but that the others may be gone. Raises PromotionError while other weights
        are being loaded.
        """
        with self._lock:
            if self._load is not None:
                raise PromotionError(f"the weights {self._load.weights.version} are being loaded; try again later")
            load = _Load(weights=weights)
            load.done.set_running_or_notify_cancel()  # whoever waits for it may go away
            if weights.version in self._held:
                load.done.set_result(None)
            else:
                self._load = load
            return load.done

    def use(self, version: str) -> None:
        """From the next request on. Raises PromotionError for weights that are not held (any more): other ones took
        their place, or the ranks were lost while no request had them."""
        with self._lock:
            if version not in self._held:
                raise PromotionError(f"the weights {version} are not held any more")
            self._scheduler.weight_version = version

    def tend(self) -> None:
        """Between steps: what a load needs next, if it is time. Raises EngineUnavailableError when a rank is lost."""
        load, now = self._load, time.monotonic()
        if load is None or now < load.next_look:
            return
        load.next_look = now + _LOOK_S
        if not load.has_begun:
            load.has_begun = self._make_room()
            if load.has_begun:
                self._executor.load(load.weights)
            return
        try:
            if not self._executor.loaded():
                return
        except CheckpointError as error:
            self._end_load(error)
            return
        with self._lock:
            self._held[load.weights.version] = load.weights
        self._end_load(None)

    def lost(self) -> None:
        """The ranks are, and new ones are to hold `all`: what live requests have, and the current ones."""
        with self._lock:
            needed = self._scheduler.live_versions | {self._scheduler.weight_version}
            self._held = {version: weights for version, weights in self._held.items() if version in needed}
        if self._load is not None and self._load.has_begun:
            self._end_load(EngineUnavailableError("a shard was lost while it loaded the new weights"))

    def close(self, error: RayLLMError) -> None:
        if self._load is not None:
            self._end_load(error)

    def _make_room(self) -> bool:
        """For one version beside the current one."""
        with self._lock:
            others = [each for each in self.all if each is not self.current]
            if any(each.version in self._scheduler.live_versions for each in others):
                return False
            for each in others:
                del self._held[each.version]
        for each in others:
            self._executor.drop(each)
        return True

    def _end_load(self, error: RayLLMError | None) -> None:
        load, self._load = self._load, None
        assert load is not None
        if error is None:
            load.done.set_result(None)
        else:
            load.done.set_exception(error)
