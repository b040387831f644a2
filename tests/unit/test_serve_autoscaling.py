"""The policy on its own, and through a day."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from rayllm.serve import recent_ttft
from rayllm.serve.autoscaling import Signal, desired_replicas, replica_load
from rayllm.serve.recent_ttft import RecentTtft
from tests.autoscaling_day import (
    BURST,
    DAY_S,
    DOWNSCALE_DELAY_S,
    LOOK_BACK_S,
    START_S,
    TARGET_TTFT_S,
    UPSCALE_DELAY_S,
    Day,
    simulate,
    traffic,
)
from tests.unit.test_serve_metrics import STATS


def desired(*loads: float, current: int | None = None, ttft_s: float = 0.1, settled: bool = True) -> int:
    signals = [Signal(load=load, ttft_s=ttft_s) for load in loads]
    return desired_replicas(signals, current=current or len(loads), settled=settled, target_ttft_s=1.0)


def test_load_is_the_scarcer_of_sequences_and_blocks():
    stats = replace(STATS, running=4, waiting=4, waiting_tokens=320, free_blocks=90, total_blocks=100)
    assert replica_load(stats, max_num_seqs=8, block_size=16) == 1.0
    assert replica_load(stats, max_num_seqs=64, block_size=16) == pytest.approx(0.3), "10 blocks used and 20 waited for"
    idle = replace(stats, running=0, waiting=0, waiting_tokens=0, free_blocks=100)
    assert replica_load(idle, max_num_seqs=8, block_size=16) == 0


@pytest.mark.parametrize(
    ("loads", "wanted"),
    [
        ((0.79,), 1),
        ((0.81,), 2),
        ((5.0,), 7),  # a burst is answered at once, not replica by replica
        ((0.6, 0.6), 2),  # one would be more than full
        ((0.7, 0.55), 2),
        ((0.3, 0.2, 0.05), 1),
        ((0.0, 0.0), 0),
    ],
)
def test_the_count_follows_the_demand(loads, wanted):
    assert desired(*loads) == wanted


def test_time_to_first_token_asks_for_more():
    assert desired(0.7, 0.7, ttft_s=1.2) == 3
    assert desired(0.7, 0.7, ttft_s=50.0) == 4, "at most twice as many at once"
    assert desired(0.7, 0.7, ttft_s=50.0, settled=False) == 2
    assert desired(0.2, 0.2, ttft_s=50.0) == 1, "an idle engine has long prompts, not too few replicas"


def test_new_replicas_count_as_idle_and_silence_changes_nothing():
    assert desired(2.0, current=3) == 3
    assert desired_replicas([], current=3, settled=True, target_ttft_s=1.0) == 3
    assert desired_replicas([], current=0, settled=True, target_ttft_s=1.0) == 0


@pytest.mark.parametrize("load", np.linspace(0.0, 12.0, 49).tolist())
def test_a_steady_load_comes_to_rest(load):
    """Whatever the count one starts from: the same in two decisions, and enough."""
    for start in range(1, 21):
        counts = [start]
        for _ in range(4):
            counts.append(desired(*[load / counts[-1]] * counts[-1]) if counts[-1] else 0)
        assert counts[2] == counts[3] == counts[4], counts
        assert counts[4] * 0.8 >= load - 1e-9


@pytest.fixture(scope="module")
def day() -> Day:
    return simulate(traffic(DAY_S), min_replicas=0, max_replicas=20)


def test_a_day_has_no_oscillation(day):
    changes = day.changes()
    reversals = [(i, j) for (i, a), (j, b) in pairwise(changes) if a * b < 0]
    # Down to zero at night and up with the morning; up to the burst, and then down only, to the night.
    assert len(reversals) == 2, changes
    assert all(later - earlier > DOWNSCALE_DELAY_S for earlier, later in reversals), reversals


def test_reaction_is_bounded(day):
    start, end = BURST
    scaled = start + int(np.argmax(day.replicas[start:end] >= day.needed[start:end]))
    assert scaled - start <= UPSCALE_DELAY_S + LOOK_BACK_S, "wanted soon after the burst began"
    recovered = start + START_S + 60  # what waited at the old replicas must be worked off there
    calm = np.ones(len(day.rate), bool)
    calm[start:recovered] = False
    calm[21600 : 21600 + START_S + 60] = False  # from zero
    assert np.percentile(day.ttft_s[calm & (day.rate > 0)], 99.9) < TARGET_TTFT_S


def test_a_day_starts_and_ends_at_zero_and_wastes_little(day):
    assert day.replicas[: int(DOWNSCALE_DELAY_S)].max() == 1
    assert day.replicas[int(DOWNSCALE_DELAY_S) + 60 : 21600].max() == 0
    assert day.replicas[-1] == 0
    assert day.replicas.sum() <= 2.2 * day.needed.sum()
    fixed = day.needed.max() * len(day.rate)
    assert day.replicas.sum() < 0.3 * fixed, "what it costs to keep the burst's replicas all day"


@pytest.mark.parametrize("seed", range(1, 4))
def test_other_days_are_as_calm(seed):
    changes = simulate(traffic(DAY_S), min_replicas=1, max_replicas=20, seed=seed).changes()
    assert sum(a * b < 0 for (_, a), (_, b) in pairwise(changes)) <= 3, changes


def test_recent_ttft(monkeypatch):
    now = 100.0
    monkeypatch.setattr(recent_ttft.time, "monotonic", lambda: now)
    recent = RecentTtft()
    assert recent.seconds() == 0
    recent.arrived("a", 99.0)
    recent.arrived("b", 99.5)
    assert recent.seconds() == 1.0, "the one that waits longest"
    recent.answered("a")
    recent.left("b")
    recent.left("b")
    assert recent.seconds() == 1.0
    now = 109.0
    assert recent.seconds() == 1.0
    now = 111.0
    assert recent.seconds() == 0, "forgotten after ten seconds"
