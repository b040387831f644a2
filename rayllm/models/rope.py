"""Rotary position embeddings: angles from a `RopeSpec`, and the rotation itself.

Numerically transformers' `modeling_rope_utils`: frequencies and angles in float32, cos and sin rounded to the dtype of
the hidden states. Letters: T tokens, E head_dim, H query heads, K kv heads.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rayllm.models.spec import RopeSpec
from rayllm_kernels import apply_rotary


@dataclass(frozen=True, slots=True)
class Rotation:
    """One step's angles, repeated in both halves of E."""

    cos_TE: Tensor
    sin_TE: Tensor

    def apply(self, q_THE: Tensor, k_TKE: Tensor) -> tuple[Tensor, Tensor]:
        return apply_rotary(q_THE, k_TKE, self.cos_TE, self.sin_TE)


class RotaryEmbedding:
    """Computes a step's `Rotation` once for all layers.

    Not a module: the frequencies stay float32 and real when a model is built on the meta device or cast to bfloat16.
    """

    def __init__(self, spec: RopeSpec, head_dim: int) -> None:
        self._spec = spec
        self._head_dim = head_dim
        with torch.device("cpu"):
            self._inv_freq = inverse_frequencies(spec, head_dim)

    def rotation(self, positions_T: Tensor, lengths_T: Tensor | None, dtype: torch.dtype) -> Rotation:
        """`lengths_T`: per token, the length of its sequence that dynamic scaling looks at (`ForwardContext`)."""
        if self._inv_freq.device != positions_T.device:
            self._inv_freq = self._inv_freq.to(positions_T.device)
        if self._spec.type == "dynamic" and lengths_T is not None:
            inv_freq = dynamic_inverse_frequencies(self._spec, self._head_dim, lengths_T.to(positions_T.device))
        else:
            inv_freq = self._inv_freq
        angles = (positions_T[:, None].float() * inv_freq).repeat(1, 2)
        scale = self._spec.attention_factor
        return Rotation((angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype))


def inverse_frequencies(spec: RopeSpec, head_dim: int) -> Tensor:
    """[E/2] float32. For dynamic: of a sequence no longer than the original length."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    inv_freq = 1.0 / spec.theta**exponents
    match spec.type:
        case "default" | "dynamic":
            return inv_freq
        case "linear":
            return inv_freq / spec.factor
        case "llama3":
            return _llama3(spec, inv_freq)
        case "yarn":
            return _yarn(spec, inv_freq, head_dim)


def dynamic_inverse_frequencies(spec: RopeSpec, head_dim: int, lengths_T: Tensor) -> Tensor:
    """[T, E/2] float32: the base grows with each token's sequence length (dynamic NTK, bloc97 and emozilla 2023)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device=lengths_T.device).float() / head_dim
    lengths = lengths_T.clamp(min=spec.original_max_position_embeddings).float()
    stretch = spec.factor * lengths / spec.original_max_position_embeddings - (spec.factor - 1)
    theta = spec.theta * stretch ** (head_dim / (head_dim - 2))
    return 1.0 / theta[:, None] ** exponents


def _llama3(spec: RopeSpec, inv_freq: Tensor) -> Tensor:
    """Llama 3.1: long waves are slowed by `factor`, short ones kept, those between blended."""
    wavelength = 2 * math.pi / inv_freq
    longest_kept = spec.original_max_position_embeddings / spec.high_freq_factor
    shortest_slowed = spec.original_max_position_embeddings / spec.low_freq_factor
    rotations = spec.original_max_position_embeddings / wavelength
    share = (rotations - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)
    blended = (1 - share) * inv_freq / spec.factor + share * inv_freq
    slowed = torch.where(wavelength > shortest_slowed, inv_freq / spec.factor, inv_freq)
    between = (wavelength >= longest_kept) & (wavelength <= shortest_slowed)
    return torch.where(between, blended, slowed)


def _yarn(spec: RopeSpec, inv_freq: Tensor, head_dim: int) -> Tensor:
    """YaRN (Peng et al. 2023), section 3.2: "NTK-by-parts"."""

    def dimension_of(rotations: float) -> float:
        wavelength = spec.original_max_position_embeddings / rotations
        return head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(spec.theta))

    low, high = dimension_of(spec.beta_fast), dimension_of(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    span = high - low if high != low else 0.001
    kept = 1 - ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    return inv_freq / spec.factor * (1 - kept) + inv_freq * kept
