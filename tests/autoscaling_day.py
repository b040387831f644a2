"""A day of traffic against a model of the replicas, scaled by our policy inside Serve's own delays and bounds.

`python -m tests.autoscaling_day FILE.png` draws it. A replica runs `SLOTS` requests at once, each for `ANSWER_S` on
average; the rest of its requests wait. Arrivals are drawn, so no two seconds are alike.
"""

import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from rayllm.serve.autoscaling import LOAD, TTFT, EnginePolicy

DAY_S = 86400
BURST = (50000, 51800)  # half an hour of four times as much, from one second to the next
SLOTS = 16
ANSWER_S = 8.0
PREFILL_S = 0.3
CAPACITY = SLOTS / ANSWER_S  # requests a second
START_S = 60  # until a new replica answers
LOOK_BACK_S = 11
TARGET_TTFT_S = 2.0
UPSCALE_DELAY_S = 5.0
DOWNSCALE_DELAY_S = 300.0


@dataclass
class Replica:
    running: float = 0.0
    waiting: float = 0.0
    loads: deque[float] = field(default_factory=lambda: deque(maxlen=LOOK_BACK_S))
    ttfts: deque[float] = field(default_factory=lambda: deque(maxlen=LOOK_BACK_S))

    def second(self, arrivals: int, completions: int) -> None:
        self.running -= min(completions, self.running)
        self.waiting += arrivals
        admitted = min(self.waiting, SLOTS - self.running)
        self.running += admitted
        self.waiting -= admitted
        self.loads.append((self.running + self.waiting) / SLOTS)
        self.ttfts.append(PREFILL_S + self.waiting / CAPACITY if self.running else 0.0)


@dataclass
class Day:
    rate: np.ndarray  # requests a second, for each second
    replicas: np.ndarray  # what the autoscaler wants
    ttft_s: np.ndarray  # of the worst replica

    @property
    def needed(self) -> np.ndarray:
        """With no slack at all."""
        return np.ceil(self.rate / CAPACITY)

    def changes(self) -> list[tuple[int, int]]:
        """(second, difference)"""
        steps = np.diff(self.replicas)
        return [(int(i) + 1, int(steps[i])) for i in np.flatnonzero(steps)]


def traffic(seconds: int) -> np.ndarray:
    """Nothing at night, a wave with its top in the afternoon, and the burst."""
    t = np.arange(seconds)
    rate = 6.0 * np.maximum(0.0, np.sin((t - 21600) / 57600 * np.pi)) ** 1.5
    rate[t < 21600] = 0.0
    rate[t >= 79200] = 0.0
    rate[BURST[0] : BURST[1]] *= 4
    return rate


def simulate(rate: np.ndarray, *, min_replicas: int, max_replicas: int, seed: int = 0) -> Day:
    config = AutoscalingConfig(
        min_replicas=min_replicas,
        max_replicas=max_replicas,
        upscale_delay_s=UPSCALE_DELAY_S,
        downscale_delay_s=0.0,
    )
    clock = mock.Mock()
    with mock.patch("ray.serve.autoscaling_policy.time", clock):
        policy = _apply_autoscaling_config(
            EnginePolicy(TARGET_TTFT_S, settle_s=21.0, downscale_window_s=DOWNSCALE_DELAY_S)
        )
        return _run(rate, policy, config, clock, np.random.default_rng(seed))


def _run(
    rate: np.ndarray, policy: Callable, config: AutoscalingConfig, clock: mock.Mock, draw: np.random.Generator
) -> Day:
    running = [Replica() for _ in range(max(1, config.min_replicas))]
    starting: list[int] = []  # when each answers
    state: dict[str, Any] = {}
    target, last_up, last_down = len(running), None, None
    day = Day(rate, np.zeros(len(rate), int), np.zeros(len(rate)))
    for now in range(len(rate)):
        clock.time.return_value = float(now)
        running += [Replica() for ready in starting if ready <= now]
        starting = [ready for ready in starting if ready > now]
        arrivals = _least_connections(running, int(draw.poisson(rate[now])))
        for replica, count in zip(running, arrivals, strict=True):
            replica.second(int(count), int(draw.poisson(replica.running / ANSWER_S)))
        wanted, state = policy(_context(running, target, state, config, last_up, last_down, now))
        wanted = min(max(wanted, config.min_replicas), config.max_replicas)
        if not running and not starting and rate[now] > 0:
            wanted = max(wanted, 1)  # Serve's cold start, by the requests that its proxy holds
        if wanted > target:
            starting += [now + START_S] * (wanted - target)
            last_up = now
        elif wanted < target:
            idlest = sorted(running, key=lambda replica: replica.running)[: target - wanted]
            running = [replica for replica in running if all(replica is not other for other in idlest)]
            last_down = now
        target = wanted
        day.replicas[now] = target
        day.ttft_s[now] = max((replica.ttfts[-1] for replica in running if replica.ttfts), default=0.0)
    return day


def _least_connections(running: list[Replica], count: int) -> list[int]:
    """As HAProxy shares them out."""
    arrivals = [0] * len(running)
    for _ in range(count if running else 0):
        i = min(range(len(running)), key=lambda i: running[i].running + running[i].waiting + arrivals[i])
        arrivals[i] += 1
    return arrivals


def _context(
    running: list[Replica],
    target: int,
    state: dict[str, Any],
    config: AutoscalingConfig,
    last_up: float | None,
    last_down: float | None,
    now: float,
) -> AutoscalingContext:
    reported = {i: replica for i, replica in enumerate(running) if replica.loads}
    return AutoscalingContext(
        deployment_id=None,
        deployment_name="inference",
        app_name="rayllm",
        current_num_replicas=len(running),
        target_num_replicas=target,
        running_replicas=[],
        total_num_requests=sum(replica.running + replica.waiting for replica in running),
        total_queued_requests=0,
        aggregated_metrics={
            LOAD: {i: sum(replica.loads) / len(replica.loads) for i, replica in reported.items()},
            TTFT: {i: sum(replica.ttfts) / len(replica.ttfts) for i, replica in reported.items()},
        },
        raw_metrics=None,
        capacity_adjusted_min_replicas=config.min_replicas,
        capacity_adjusted_max_replicas=config.max_replicas,
        policy_state=state,
        last_scale_up_time=last_up,
        last_scale_down_time=last_down,
        current_time=now,
        config=config,
    )


def plot(day: Day, path: str) -> None:
    import matplotlib.pyplot as plt

    hours = np.arange(len(day.rate)) / 3600
    figure, (top, middle, bottom) = plt.subplots(3, 1, sharex=True, figsize=(10, 7), layout="constrained")
    top.plot(hours, day.rate)
    top.set_ylabel("requests/s")
    middle.step(hours, day.replicas, label="replicas")
    middle.step(hours, day.needed, label="needed without slack", alpha=0.6)
    middle.set_ylabel("replicas")
    middle.legend()
    bottom.semilogy(hours, np.maximum(day.ttft_s, 0.1))
    bottom.axhline(TARGET_TTFT_S, linestyle="--", color="black", linewidth=1)
    bottom.set_ylabel("TTFT, s (worst replica)")
    bottom.set_xlabel("hour of the day")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    plot(simulate(traffic(DAY_S), min_replicas=0, max_replicas=20), sys.argv[1])
