"""Packed attention problems and their exact answers: shared by the tests of torch's path, the interpreter and the GPU.

The tolerance is FlashAttention's own rule: an error of at most twice that of the same maths by torch in the low
precision, plus a few roundings of outputs of order one.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDING = {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
RAGGED = [(37, 37), (1, 1), (5, 40), (33, 33)]

Answers = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # out, lse, dq, dk, dv


@dataclass(kw_only=True)
class Case:
    """Packed inputs, with unowned rows of NaN behind them, and gradients for what comes out."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor
    starts: tuple[Tensor, Tensor]
    causal: bool
    window: int | None

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.q.shape[2])

    @property
    def pattern(self) -> tuple[Tensor, Tensor, float, bool, int | None]:
        """In the order of the operator's arguments."""
        return *self.starts, self.scale, self.causal, self.window

    @property
    def options(self) -> dict[str, object]:
        """The public functions' arguments after q, k and v."""
        queries, keys = self.starts
        return {
            "cu_seqlens_q_B1": queries,
            "cu_seqlens_k_B1": keys,
            "scale": self.scale,
            "causal": self.causal,
            "window": self.window,
        }

    def differentiate(self, out: Tensor, lse: Tensor | None, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Gradients of `inputs` for `dout` and, where `lse` is given, `dlse`, as far as rows see anything."""
        owned = slice(0, int(self.starts[0][-1]))
        loss = (out[owned] * self.dout[owned].to(out.dtype)).sum()
        if lse is not None:
            seeing = lse > -torch.inf
            loss = loss + (lse[seeing] * self.dlse[seeing].to(lse.dtype)).sum()
        return torch.autograd.grad(loss, inputs)


def make_case(
    lengths: list[tuple[int, int]],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    causal: bool = True,
    window: int | None = None,
    dtype: torch.dtype = torch.float16,
    pads: int = 3,
    device: str = "cpu",
) -> Case:
    """`lengths`: (queries, keys) of each sequence."""
    generator = torch.Generator().manual_seed(heads * 100 + head_dim + len(lengths))
    queries, keys = ([0, *torch.tensor(x).cumsum(0).tolist()] for x in zip(*lengths, strict=True))

    def packed(rows: int, count: int) -> Tensor:
        x = torch.randn(rows + pads, count, head_dim, generator=generator).to(dtype)
        x[rows:] = torch.nan  # nobody's rows may reach a result
        return x.to(device)

    return Case(
        q=packed(queries[-1], heads),
        k=packed(keys[-1], kv_heads),
        v=packed(keys[-1], kv_heads),
        dout=packed(queries[-1], heads),
        dlse=torch.randn(heads, queries[-1] + pads, generator=generator).to(device),
        starts=(
            torch.tensor(queries, dtype=torch.int32, device=device),
            torch.tensor(keys, dtype=torch.int32, device=device),
        ),
        causal=causal,
        window=window,
    )


def dense(case: Case, dtype: torch.dtype) -> Answers:
    """By the softmax's definition, one query and head at a time, wholly in `dtype`."""
    q, k, v = (x.detach().to(dtype).nan_to_num().requires_grad_() for x in (case.q, case.k, case.v))
    group = q.shape[1] // k.shape[1]
    out = torch.zeros(q.shape, dtype=dtype)
    lse = torch.full((q.shape[1], q.shape[0]), -torch.inf, dtype=dtype)
    for b in range(case.starts[0].shape[0] - 1):
        (q_start, q_stop), (k_start, k_stop) = (x[b : b + 2].tolist() for x in case.starts)
        for i in range(q_start, q_stop):
            at = k_stop - k_start - (q_stop - i)
            last = at + 1 if case.causal else k_stop - k_start
            first = 0 if case.window is None else max(0, at - case.window + 1)
            if last <= first:
                continue
            for h in range(q.shape[1]):
                sees = slice(k_start + first, k_start + last)
                scores = (k[sees, h // group] @ q[i, h]) * case.scale
                out[i, h] = scores.softmax(0) @ v[sees, h // group]
                lse[h, i] = scores.logsumexp(0)
    dq, dk, dv = case.differentiate(out, lse, (q, k, v))
    return out.detach(), lse.detach(), dq, dk, dv


def by_softmax(case: Case, dtype: torch.dtype) -> Answers:
    """Wholly in `dtype`, one sequence at a time, for lengths at which `dense` would take minutes."""
    q, k, v = (x.detach().to(dtype).nan_to_num().requires_grad_() for x in (case.q, case.k, case.v))
    device, group = q.device, q.shape[1] // k.shape[1]
    out = torch.zeros_like(q)
    lse = torch.full((q.shape[1], q.shape[0]), -torch.inf, dtype=dtype, device=device)
    (q_starts, k_starts), heads_H1 = (x.tolist() for x in case.starts), torch.arange(q.shape[1], device=device)[:, None]
    for b in range(len(q_starts) - 1):
        k_SHE, v_SHE = (x[k_starts[b] : k_starts[b + 1]].repeat_interleave(group, dim=1) for x in (k, v))
        row = torch.arange(q_starts[b], q_starts[b + 1], device=device)
        back = row[:, None] - q_starts[b + 1] + len(k_SHE) - torch.arange(len(k_SHE), device=device)
        visible = (back >= 0) & (back < (case.window or len(k_SHE) + 1)) if case.causal else back == back
        seeing = visible.any(dim=1)
        row, visible = row[seeing], visible[seeing]
        scores = torch.einsum("qhe,khe->hqk", q[row], k_SHE) * case.scale
        scores = scores.masked_fill(~visible, -torch.inf)
        out = out.index_put((row,), torch.einsum("hqk,khe->qhe", scores.softmax(-1), v_SHE))
        lse = lse.index_put((heads_H1, row), scores.logsumexp(-1))
    dq, dk, dv = case.differentiate(out, lse, (q, k, v))
    return out.detach(), lse.detach(), dq, dk, dv


def check(result: Tensor, exact: Tensor, low: Tensor, dtype: torch.dtype) -> None:
    """`low`: the same maths by torch in `dtype`."""
    assert not result.isnan().any()
    finite = exact > -torch.inf
    assert torch.equal(result > -torch.inf, finite)
    if not finite.any():
        return
    error = (result.double() - exact)[finite].abs().max().item()
    of_torch = (low.double() - exact)[finite].abs().max().item()
    assert error <= 2 * of_torch + ROUNDING[dtype] * max(1.0, exact[finite].abs().max().item())
