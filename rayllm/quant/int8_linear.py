"""The linear layer with int8 weights, and the function that puts it into a model.

Letters: N outputs, K inputs, J outlier columns. Knows no rank and no checkpoint.
"""

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from rayllm.models.decoder import Decoder
from rayllm.models.layers import Linear
from rayllm.models.quantization import Scheme
from rayllm_kernels import pack_weight, quantize_rows, w8a8_epilogue, w8a8_linear, w8a16_linear


class Int8Linear(Linear):
    """`weight` int8 [N, K], `weight_scale` float32 [N, 1]; bias as in any linear layer.

    `outlier_columns` int32 [J] and `outlier_weight` bfloat16 [N, J] are None unless some columns of the input keep 16
    bits (W8A8 only). For the transpose of a contiguous [J, N] the kernel makes no copy: `set_outliers` sees to that.
    A layer of which this is a part of the inputs has all its `outlier_weight` in every part, and its own columns alone.
    """

    def __init__(self, in_features: int, out_features: int, *, scheme: Scheme, bias: bool, outliers: bool) -> None:
        """On the meta device: the tensors are for the caller to set."""
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        self.weight = _constant(torch.empty(out_features, in_features, dtype=torch.int8, device="meta"))
        self.weight_scale = _constant(torch.empty(out_features, 1, device="meta"))
        self.register_parameter("bias", _constant(torch.empty(out_features, device="meta")) if bias else None)
        self.register_parameter("outlier_columns", None)
        self.register_parameter("outlier_weight", None)
        if outliers:
            columns_J = torch.empty(0, dtype=torch.int32, device="meta")
            self.set_outliers(columns_J, torch.empty(out_features, 0, dtype=torch.bfloat16, device="meta"))

    def set_weight(self, weight_NK: Tensor, scale_N1: Tensor) -> None:
        self.weight, self.weight_scale = _constant(weight_NK), _constant(scale_N1)
        self.out_features, self.in_features = weight_NK.shape

    def pack(self, dtype: torch.dtype) -> None:
        """The weight as this processor's product with inputs of `dtype` reads it best, in its place; it can be sliced
        and joined no more."""
        if self.scheme == "w8a8":
            self.weight = _constant(pack_weight(self.weight, dtype))

    def set_outliers(self, columns_J: Tensor, weight_NJ: Tensor, first: int = 0) -> None:
        """`first`: where the columns begin among those of the weight, which for a part of the inputs has more."""
        self.first_outlier = first
        self.outlier_columns = _constant(columns_J)
        self.outlier_weight = _constant(weight_NJ.t().contiguous().t())

    def forward(self, x: Tensor) -> Tensor:
        if self.scheme == "w8a16":
            return w8a16_linear(x, self.weight, self.weight_scale, self.bias)
        return w8a8_linear(
            x,
            self.weight,
            self.weight_scale,
            self.bias,
            outlier_columns_J=self.outlier_columns,
            outlier_weight_NJ=self.outlier_weight,
        )

    def sums(self, x_TK: Tensor, row_bound_T1: Tensor) -> Tensor:
        """Of W8A8, where x is a part of longer rows whose bounds are given: what is to be added to that of the other
        parts, [T, N + J] float32. First the sums of integers (exact to 2^24), then x in the outlier columns of the
        whole rows, zero in those of other parts: adding them up rounds nothing."""
        q_TK, _ = quantize_rows(x_TK, row_bound_T1, outlier_columns_J=self.outlier_columns)
        ones_N1, bound_T1 = torch.ones_like(self.weight_scale), torch.full_like(row_bound_T1, 127.0)
        sums_TN = w8a8_linear(q_TK.float(), self.weight, ones_N1, row_bound_T1=bound_T1)
        if self.outlier_columns is None or self.outlier_weight is None:
            return sums_TN
        kept_TJ = sums_TN.new_zeros(len(x_TK), self.outlier_weight.shape[1])
        last = self.first_outlier + len(self.outlier_columns)
        kept_TJ[:, self.first_outlier : last] = x_TK[:, self.outlier_columns]
        return torch.cat([sums_TN, kept_TJ], dim=1)

    def output(self, sums_TS: Tensor, row_bound_T1: Tensor, bias_N: Tensor | None, dtype: torch.dtype) -> Tensor:
        """-> [T, N], from the `sums` of whole rows: what `forward` gives for those, in one layer of them."""
        size = self.out_features
        return w8a8_epilogue(
            sums_TS[:, :size].int(),
            row_bound_T1,
            self.weight_scale,
            bias_N,
            kept_TJ=sums_TS[:, size:],
            outlier_weight_NJ=self.outlier_weight,
            dtype=dtype,
        )

    def joins(self, other: Self) -> bool:
        """Whether `joined` takes the two together."""
        if self.scheme != other.scheme or (self.outlier_columns is None) != (other.outlier_columns is None):
            return False
        return self.outlier_columns is None or torch.equal(self.outlier_columns, other.outlier_columns)

    @classmethod
    def joined(cls, linears: Sequence["Int8Linear"]) -> "Int8Linear":
        """One layer whose output is that of `linears`, one after another; they share their input."""
        first, size = linears[0], sum(linear.out_features for linear in linears)
        one = cls(first.in_features, size, scheme=first.scheme, bias=first.bias is not None, outliers=False)
        weights, scales = ([getattr(linear, kind) for linear in linears] for kind in ("weight", "weight_scale"))
        one.set_weight(torch.cat(weights), torch.cat(scales))
        if first.bias is not None:
            one.bias = _constant(torch.cat([linear.bias for linear in linears]))
        if first.outlier_columns is not None:
            one.set_outliers(first.outlier_columns, torch.cat([linear.outlier_weight for linear in linears]))
        return one


def to_int8(model: Decoder, schemes: Mapping[str, Scheme], *, outliers: bool) -> None:
    """Replaces the linear layers that `schemes` names (others may be missing: another pipeline stage has them).

    The model is on the meta device. A tied head that becomes int8 no longer shares its weight with the embedding.
    """
    for name, module in list(model.named_modules()):
        if name in schemes:
            assert isinstance(module, nn.Linear)
            int8 = Int8Linear(
                module.in_features,
                module.out_features,
                scheme=schemes[name],
                bias=module.bias is not None,
                outliers=outliers,
            )
            model.set_submodule(name, int8)


def pack_weights(model: Decoder, dtype: torch.dtype) -> None:
    """Last of all that is done to a model that computes in `dtype`, layer by layer, so that no more than one is held
    twice."""
    for module in model.modules():
        if isinstance(module, Int8Linear):
            module.pack(dtype)


def linear_names(model: Decoder) -> list[str]:
    """The layers that can be int8, the head among them."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _constant(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)
