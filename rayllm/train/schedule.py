"""The learning rate of a step, as a share of its peak. A pure function: nothing to save, nothing to restore."""

import math

from rayllm.train.config import ScheduleConfig


def rate_share(step: int, schedule: ScheduleConfig) -> float:
    """`step` counts optimizer steps from 0. In [0, 1].

    The first of n warmup steps has 1 / n of the peak, so that no step is wasted on 0. Decays end at `final` after the
    last step, as transformers' do: the last one still moves.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    match schedule.kind:
        case "constant":
            return 1.0
        case "cosine":
            done = _share(step - schedule.warmup_steps, schedule.steps - schedule.warmup_steps)
            left = 0.5 * (1 + math.cos(math.pi * done))
        case "wsd":
            left = 1 - math.sqrt(_share(step - (schedule.steps - schedule.decay_steps), schedule.decay_steps))
    return schedule.final + (1 - schedule.final) * left


def _share(step: int, steps: int) -> float:
    return min(1.0, max(0, step) / max(1, steps))
