"""How many replicas the load needs, by what the engines say: waiting tokens, free KV blocks, time to first token.

A request counts for what it takes, not as one: a replica's load is the share of its sequences or of its KV blocks,
whichever is larger, that is taken or waited for. Between `_SCALE_DOWN` and `_SCALE_UP` nothing changes, so that a
steady load never makes the count swing; and a replica is ended only once it was not needed for a whole window. The
delay before one is added, and the bounds, are Serve's (`AutoscalingConfig`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ray.serve.config import AutoscalingContext

from rayllm.engine.async_engine import EngineStats

_SCALE_UP: Final = 0.8  # of what the replicas hold: with more, some requests soon wait
_SCALE_DOWN: Final = 0.6
_MAX_GROWTH: Final = 2.0  # in one decision for the sake of the time to first token, which says too much, not how much

LOAD: Final = "rayllm_load"
TTFT: Final = "rayllm_ttft_s"
_HISTORY: Final = "history"


@dataclass(frozen=True, kw_only=True, slots=True)
class Signal:
    """`load`: see `replica_load`. `ttft_s`: a mean over the last seconds, 0 where nobody asked."""

    load: float
    ttft_s: float


def replica_load(stats: EngineStats, *, max_num_seqs: int, block_size: int) -> float:
    """1.0: full; more: so many times as much is asked for."""
    sequences = (stats.running + stats.waiting) / max_num_seqs
    used_blocks = stats.total_blocks - stats.free_blocks
    blocks = (used_blocks + stats.waiting_tokens / block_size) / stats.total_blocks
    return max(sequences, blocks)


def desired_replicas(signals: Sequence[Signal], *, current: int, settled: bool, target_ttft_s: float) -> int:
    """`signals`: one for each replica that has reported; a new one counts as idle until it does. `settled`: the last
    change has had its effect; until then the time to first token is that of before. Unbounded: 0 for an idle endpoint.
    """
    if current == 0 or not signals:
        return current
    demand = sum(signal.load for signal in signals)
    ttft_s = sum(signal.ttft_s for signal in signals) / len(signals)
    # An idle engine that takes long has long prompts; more replicas would not be faster.
    late = ttft_s > target_ttft_s and demand > _SCALE_DOWN * len(signals)
    needed = math.ceil(demand / _SCALE_UP)
    if late and settled:
        growth = min(_MAX_GROWTH, ttft_s / target_ttft_s)
        needed = max(needed, current + 1, math.floor(current * growth))
    if needed > current:
        return needed
    enough = math.ceil(demand / _SCALE_DOWN)
    return min(current, enough) if not late else current


def steadied(history: Sequence[tuple[float, int]], now: float, *, current: int, window_s: float) -> int:
    """The largest of the counts wanted in the last `window_s`, so that a lull ends no replica that is needed again;
    more than `current` only if that is what is wanted now. `history`: (time, count), the last of them of now. While it
    is shorter than the window, nothing is ended.
    """
    wanted = history[-1][1]
    if wanted >= current:
        return wanted
    if history[0][0] > now - window_s:
        return current
    return min(current, max(count for when, count in history if when >= now - window_s))


class EnginePolicy:
    """Serve's form of it: called by the controller every half second or so."""

    def __init__(self, target_ttft_s: float, settle_s: float, downscale_window_s: float) -> None:
        self._target_ttft_s = target_ttft_s
        self._settle_s = settle_s
        self._window_s = downscale_window_s

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        metrics: Mapping[str, Mapping[Any, float]] = context.aggregated_metrics or {}
        loads, ttfts = metrics.get(LOAD, {}), metrics.get(TTFT, {})
        signals = [Signal(load=load, ttft_s=ttfts.get(replica, 0.0)) for replica, load in loads.items()]
        now, current = context.current_time or 0.0, context.target_num_replicas
        wanted = desired_replicas(
            signals, current=current, settled=self._settled(context, now), target_ttft_s=self._target_ttft_s
        )
        history = _remember(context.policy_state.get(_HISTORY, []), now, wanted, self._window_s)
        return steadied(history, now, current=current, window_s=self._window_s), {_HISTORY: history}

    def _settled(self, context: AutoscalingContext, now: float) -> bool:
        if context.current_num_replicas != context.target_num_replicas:
            return False
        last = max(context.last_scale_up_time or 0.0, context.last_scale_down_time or 0.0)
        return now - last >= self._settle_s


def _remember(
    history: Sequence[tuple[float, int]], now: float, wanted: int, window_s: float
) -> list[tuple[float, int]]:
    """The history with `wanted`: of equal counts in a row the first and the last, and nothing older than is needed."""
    kept = list(history)
    if len(kept) >= 2 and kept[-1][1] == kept[-2][1] == wanted:
        kept.pop()
    kept.append((now, wanted))
    start = now - window_s
    while len(kept) >= 2 and kept[1][0] <= start:
        kept.pop(0)
    return kept
