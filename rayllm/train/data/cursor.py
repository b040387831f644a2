"""Where training is in its data: three integers, the same on every rank, whatever the ranks are.

The samples of an epoch have one order, given by the seed and the epoch alone. A step takes the next ones of that order,
and only then are they dealt out. So a run that goes on with other ranks or other micro-batches sees each sample that is
left exactly once, and a step's samples, and with them its loss, do not depend on the layout.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from rayllm.core.errors import ConfigError
from rayllm.train.data.permutation import permute


@dataclass(frozen=True, kw_only=True, slots=True)
class Cursor:
    """`sample`: how many samples of the epoch have been seen. What a checkpoint keeps is `state`."""

    seed: int
    epoch: int = 0
    sample: int = 0

    def __post_init__(self) -> None:
        for name in ("seed", "epoch", "sample"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 63:
                raise ConfigError(f"data cursor: {name} must be an integer of at least 0, not {value!r}")

    @property
    def state(self) -> dict[str, int]:
        return {"seed": self.seed, "epoch": self.epoch, "sample": self.sample}

    @classmethod
    def from_state(cls, state: dict[str, int], num_samples: int) -> Self:
        """ConfigError if it is no state, or none of a data set of so many samples."""
        if state.keys() != {"seed", "epoch", "sample"}:
            raise ConfigError(
                f"data cursor: expected seed, epoch and sample, not {', '.join(sorted(state)) or 'nothing'}"
            )
        cursor = cls(**state)
        if cursor.sample >= num_samples:
            raise ConfigError(
                f"data cursor: {cursor.sample} samples of the epoch were seen, but the data set has {num_samples}: "
                "it is not the one that was trained on"
            )
        return cursor

    def left(self, num_samples: int, num_epochs: int) -> int:
        """Samples that are still to be seen until `num_epochs` epochs are over."""
        return max(0, num_epochs * num_samples - (self.epoch * num_samples + self.sample))

    def next_samples(self, count: int, num_samples: int) -> NDArray[np.int64]:
        """The next `count` of the order, going on into the next epochs."""
        parts = [np.empty(0, dtype=np.int64)]
        cursor = self
        while count:
            taken = min(count, num_samples - cursor.sample)
            places = np.arange(cursor.sample, cursor.sample + taken)
            parts.append(permute(places, num_samples, (cursor.seed, cursor.epoch)))
            cursor = cursor.advanced(taken, num_samples)
            count -= taken
        return np.concatenate(parts)

    def advanced(self, count: int, num_samples: int) -> "Cursor":
        """After the next `count` samples."""
        epochs, sample = divmod(self.sample + count, num_samples)
        return Cursor(seed=self.seed, epoch=self.epoch + epochs, sample=sample)


def deal(samples: NDArray[np.int64], *, micro_batch_size: int, rank: int, num_ranks: int) -> list[NDArray[np.int64]]:
    """One rank's micro-batches of a step. All ranks get equally many, so that their collectives meet; the last may be
    smaller, or empty."""
    per_round = micro_batch_size * num_ranks
    first = micro_batch_size * rank
    return [
        samples[start + first : min(start + first + micro_batch_size, len(samples))]
        for start in range(0, len(samples), per_round)
    ]
