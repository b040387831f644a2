"""What the other tests of this folder rely on: the interpreter treats bfloat16 as a GPU does."""

import torch
import triton
import triton.language as tl


@triton.jit
def _convert(source, target, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(target + at, tl.load(source + at).to(target.dtype.element_ty))


@triton.jit
def _multiply(a, b, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


def test_conversions_from_and_to_bfloat16_round_as_torch_does():
    ties = torch.tensor([1.0 + 2**-8, 1.0 + 3 * 2**-8, -1.0 - 2**-8, 2.0 - 2**-9, 0.0, -0.0, 1e-40, 3.4e38])
    ends = torch.tensor([torch.inf, -torch.inf, torch.nan, 65504.0])
    x = torch.cat([ties, ends, torch.randn(52, generator=torch.Generator().manual_seed(0))])
    narrow = torch.empty(64, dtype=torch.bfloat16)
    _convert[(1,)](x, narrow, SIZE=64)
    assert torch.equal(narrow.view(torch.int16)[~x.isnan()], x.bfloat16().view(torch.int16)[~x.isnan()])
    assert narrow[x.isnan()].isnan().all()
    wide = torch.empty(64)
    _convert[(1,)](narrow, wide, SIZE=64)
    torch.testing.assert_close(wide, narrow.float(), rtol=0, atol=0, equal_nan=True)
    _convert[(1,)](torch.arange(-32, 32), narrow, SIZE=64)
    assert torch.equal(narrow.float(), torch.arange(-32.0, 32.0))


def test_products_of_bfloat16():
    a, b = (torch.randn(16, 16, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(2))
    out = torch.empty(16, 16)
    _multiply[(1,)](a, b, out, SIZE=16)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-6, atol=1e-6)
