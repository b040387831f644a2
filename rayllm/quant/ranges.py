"""The range of each output's weights that the 255 integers are spread over, and what rounding to them costs.

Letters: N outputs, K inputs. Everything in float32.
"""

import torch
from torch import Tensor

LARGEST = 127

# Shares of the largest weight that `clip` tries: finely near 1, where most rows end, then down to a thousandth, for
# rows that a few weights of no effect stretch.
_SHARES = (*(1 - i / 50 for i in range(1, 31)), *(0.38 * 0.8**i for i in range(27)))


def absmax_scale(weight_NK: Tensor) -> Tensor:
    """-> [N, 1]: the largest weight becomes 127. A row of zeros has scale 0."""
    return weight_NK.abs().amax(dim=1, keepdim=True).float() / LARGEST


def clip_scale(weight_NK: Tensor, energy_K: Tensor | None = None) -> Tensor:
    """-> [N, 1]: the range of the least squared error, at most that of `absmax_scale`.

    `energy_K` is the mean square of each input: with it the error is that of the outputs, without it of the weights.
    """
    weight_NK = weight_NK.float()
    whole_N1 = absmax_scale(weight_NK)
    best_N1, least_N1 = whole_N1, _squared_error(weight_NK, whole_N1, energy_K)
    for share in _SHARES:
        scale_N1 = whole_N1 * share
        error_N1 = _squared_error(weight_NK, scale_N1, energy_K)
        better_N1 = error_N1 < least_N1
        best_N1 = torch.where(better_N1, scale_N1, best_N1)
        least_N1 = torch.where(better_N1, error_N1, least_N1)
    return best_N1


def round_to_int8(weight_NK: Tensor, scale_N1: Tensor) -> Tensor:
    """-> int8 [N, K], the nearest in -127 to 127."""
    factor_N1 = torch.where(scale_N1 > 0, torch.ones_like(scale_N1) / scale_N1, 0.0)
    return (weight_NK.float() * factor_N1).round().clamp(-LARGEST, LARGEST).to(torch.int8)


def relative_error(weight_NK: Tensor, stored_NK: Tensor, energy_K: Tensor | None) -> float:
    """Root mean square of the error over that of the exact values: of the weights, or of the outputs (`energy_K`)."""
    energy = torch.ones(weight_NK.shape[1]) if energy_K is None else energy_K.float()
    exact = float((weight_NK.float().square() @ energy).sum())
    lost = float(((weight_NK.float() - stored_NK.float()).square() @ energy).sum())
    return (lost / exact) ** 0.5 if exact > 0 else 0.0


def _squared_error(weight_NK: Tensor, scale_N1: Tensor, energy_K: Tensor | None) -> Tensor:
    lost_NK = (round_to_int8(weight_NK, scale_N1) * scale_N1 - weight_NK).square()
    return lost_NK.sum(dim=1, keepdim=True) if energy_K is None else (lost_NK @ energy_K)[:, None]
