"""Direct preference optimisation and its kin: losses of pairs from the log-probabilities of their answers.

Knows no model and no data. pi: the policy, ref: the reference; c: the chosen answer, r: the rejected one; sums over an
answer's tokens; h = (log pi(c) - log ref(c)) - (log pi(r) - log ref(r)); |y|: an answer's tokens; s: the sigmoid.
"""

import math
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rayllm.core.errors import ConfigError
from rayllm.train.losses.pairs import PairLogps


class DpoVariant(Enum):
    """e: label smoothing.

    SIGMOID   -(1 - e) log s(beta h) - e log s(-beta h)
              Rafailov et al. 2023, eq. 7; with e > 0 conservative DPO (Mitchell 2023)
    ROBUST    (-(1 - e) log s(beta h) + e log s(-beta h)) / (1 - 2e)
              Chowdhury et al. 2024, eq. 12
    HINGE     max(0, 1 - beta h)
              Zhao et al. 2023 (SLiC), with the reference as in Liu et al. 2023 (RSO)
    IPO_SUM   (h - 1 / (2 beta))^2
              Azar et al. 2023, eq. 17, as it is written
    IPO_MEAN  the same with each answer's log ratio divided by its |y|
              as trl has it, confirmed by the authors
    SIMPO     -log s(beta (log pi(c) / |c| - log pi(r) / |r|) - gamma)
              Meng et al. 2024, eq. 6; without a reference
    """

    SIGMOID = "sigmoid"
    ROBUST = "robust"
    HINGE = "hinge"
    IPO_SUM = "ipo_sum"
    IPO_MEAN = "ipo_mean"
    SIMPO = "simpo"


@dataclass(frozen=True, kw_only=True, slots=True)
class PairLosses:
    """`rewards`, without gradient: beta times the log ratio to the reference, what the policy implicitly pays."""

    losses_P: Tensor
    chosen_rewards_P: Tensor
    rejected_rewards_P: Tensor

    @property
    def margins_P(self) -> Tensor:
        return self.chosen_rewards_P - self.rejected_rewards_P

    @property
    def correct_P(self) -> Tensor:
        return self.margins_P > 0


@dataclass(frozen=True, kw_only=True, slots=True)
class DpoLoss:
    """ConfigError for settings that do not go together."""

    variant: DpoVariant = DpoVariant.SIGMOID
    beta: float = 0.1
    label_smoothing: float = 0.0
    gamma: float = 0.0  # SimPO's target margin

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise ConfigError(f"beta: must be above 0 and finite, not {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(f"label_smoothing: must be at least 0 and below 0.5, not {self.label_smoothing}")
        if self.label_smoothing and self.variant not in (DpoVariant.SIGMOID, DpoVariant.ROBUST):
            raise ConfigError(f"label_smoothing: is for sigmoid and robust, not for {self.variant.value}")
        if not math.isfinite(self.gamma):
            raise ConfigError(f"gamma: must be finite, not {self.gamma}")
        if self.gamma and self.variant is not DpoVariant.SIMPO:
            raise ConfigError(f"gamma: is for simpo, not for {self.variant.value}")

    @property
    def needs_reference(self) -> bool:
        return self.variant is not DpoVariant.SIMPO

    def __call__(self, policy: PairLogps, reference: PairLogps | None) -> PairLosses:
        """`reference` None only where none is needed; then rewards are those of the policy alone."""
        chosen_P, rejected_P = policy.chosen_P, policy.rejected_P
        if self.needs_reference:
            assert reference is not None, f"{self.variant.value} compares with a reference"
            chosen_P = chosen_P - reference.chosen_P
            rejected_P = rejected_P - reference.rejected_P
        if self.variant in (DpoVariant.IPO_MEAN, DpoVariant.SIMPO):
            chosen_P = chosen_P / policy.chosen_tokens_P
            rejected_P = rejected_P / policy.rejected_tokens_P
        return PairLosses(
            losses_P=self._losses(chosen_P - rejected_P),
            chosen_rewards_P=(self.beta * chosen_P).detach(),
            rejected_rewards_P=(self.beta * rejected_P).detach(),
        )

    def _losses(self, h_P: Tensor) -> Tensor:
        beta, smoothing = self.beta, self.label_smoothing
        if self.variant in (DpoVariant.IPO_SUM, DpoVariant.IPO_MEAN):
            return (h_P - 1 / (2 * beta)) ** 2
        if self.variant is DpoVariant.HINGE:
            return torch.relu(1 - beta * h_P)
        if self.variant is DpoVariant.SIMPO:
            return -logsigmoid(beta * h_P - self.gamma)
        kept_P, flipped_P = -logsigmoid(beta * h_P), -logsigmoid(-beta * h_P)
        if self.variant is DpoVariant.ROBUST:
            return ((1 - smoothing) * kept_P - smoothing * flipped_P) / (1 - 2 * smoothing)
        return (1 - smoothing) * kept_P + smoothing * flipped_P
