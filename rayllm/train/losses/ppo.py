"""Proximal policy optimisation over answers: rewards, advantages, and the clipped losses of policy and value.

Knows no model. Answers are padded to the right: B answers, S tokens of the longest; `mask_BS` says which are real, and
what a function returns is 0 elsewhere. Losses are per token, for the step to sum and to divide by the tokens of all
ranks. Huang et al. 2024, "The N+ implementation details of RLHF with PPO", say why each of the parts is there.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rayllm.train.config import KlEstimator


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyLosses:
    """`losses` with a gradient; the others without: the ratio of the probabilities, and whether it was clipped."""

    losses_BS: Tensor
    ratios_BS: Tensor
    clipped_BS: Tensor


def kl_estimates(log_probs_BS: Tensor, reference_BS: Tensor, mask_BS: Tensor, estimator: KlEstimator) -> Tensor:
    """Of KL(policy || reference) at each token that the policy drew (Schulman 2020, "Approximating KL divergence").

    k1: log pi - log ref, unbiased, may be negative. k3: exp(-k1) - 1 + k1, unbiased, never negative, less variance.
    """
    k1_BS = log_probs_BS - reference_BS
    kl_BS = k1_BS if estimator == "k1" else torch.expm1(-k1_BS) + k1_BS
    return kl_BS.masked_fill(~mask_BS, 0)


def token_rewards(kl_BS: Tensor, scores_B: Tensor, mask_BS: Tensor, *, kl_coef: float) -> Tensor:
    """-kl_coef * KL at each token, and the answer's score at its last (Ziegler et al. 2019, eq. 2). No answer is
    empty."""
    rewards_BS = (-kl_coef * kl_BS).masked_fill(~mask_BS, 0)
    last_B1 = mask_BS.sum(1, keepdim=True) - 1
    return rewards_BS.scatter_add(1, last_B1, scores_B[:, None].to(rewards_BS.dtype))


def advantages_and_returns(
    rewards_BS: Tensor, values_BS: Tensor, mask_BS: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16), and the returns that the value is to learn:

    delta_t = r_t + gamma V_t+1 - V_t,  A_t = delta_t + gamma lam A_t+1,  return_t = A_t + V_t; 0 after the last token.
    """
    values_BS = values_BS.masked_fill(~mask_BS, 0)
    advantages_BS = torch.zeros_like(values_BS)
    following_B = torch.zeros_like(values_BS[:, 0])
    next_values_B = torch.zeros_like(following_B)
    for t in reversed(range(values_BS.shape[1])):
        delta_B = rewards_BS[:, t] + gamma * next_values_B - values_BS[:, t]
        following_B = (delta_B + gamma * lam * following_B).masked_fill(~mask_BS[:, t], 0)
        next_values_B = values_BS[:, t]
        advantages_BS[:, t] = following_B
    return advantages_BS, (advantages_BS + values_BS).masked_fill(~mask_BS, 0)


def moments(values_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """-> float64 [3]: number, sum and sum of squares. Those of several ranks may be added."""
    kept = values_BS[mask_BS].double()
    return torch.stack([kept.new_tensor(kept.numel()), kept.sum(), kept.square().sum()])


def whiten(values_BS: Tensor, mask_BS: Tensor, moments_3: Tensor, *, shift_mean: bool = True) -> Tensor:
    """To variance 1 and mean 0, or the mean that they have; `moments_3` are those of the values of all ranks."""
    number, total, squares = moments_3.unbind()
    mean = total / number
    variance = (squares / number - mean.square()).clamp(min=0)
    centred_BS = (values_BS.double() - mean) * torch.rsqrt(variance + 1e-8)
    white_BS = centred_BS if shift_mean else centred_BS + mean
    return white_BS.to(values_BS.dtype).masked_fill(~mask_BS, 0)


def policy_losses(
    log_probs_BS: Tensor, old_BS: Tensor, advantages_BS: Tensor, mask_BS: Tensor, *, clip_low: float, clip_high: float
) -> PolicyLosses:
    """-min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) (Schulman et al. 2017, eq. 7).

    `old_BS`: log-probabilities by the policy that drew the tokens.
    """
    ratios_BS = torch.exp((log_probs_BS - old_BS).masked_fill(~mask_BS, 0))
    plain_BS = -advantages_BS * ratios_BS
    clipped_BS = -advantages_BS * ratios_BS.clamp(1 - clip_low, 1 + clip_high)
    return PolicyLosses(
        losses_BS=torch.maximum(plain_BS, clipped_BS).masked_fill(~mask_BS, 0),
        ratios_BS=ratios_BS.detach(),
        clipped_BS=(clipped_BS > plain_BS) & mask_BS,
    )


def value_losses(values_BS: Tensor, old_BS: Tensor, returns_BS: Tensor, mask_BS: Tensor, *, clip: float) -> Tensor:
    """Half the squared error, or that of the value held within `clip` of the old one if it is larger (Huang et al.
    2024, as in OpenAI's baselines)."""
    held_BS = torch.maximum(torch.minimum(values_BS, old_BS + clip), old_BS - clip)
    plain_BS, clipped_BS = (values_BS - returns_BS).square(), (held_BS - returns_BS).square()
    return (0.5 * torch.maximum(plain_BS, clipped_BS)).masked_fill(~mask_BS, 0)
