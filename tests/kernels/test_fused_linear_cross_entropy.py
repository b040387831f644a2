"""Against the logits held whole, in float64, and by gradcheck."""

import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from rayllm_kernels import fused_linear_cross_entropy, fused_linear_cross_entropy_reference
from tests.train_benchmark import memory


def inputs(tokens, size, vocabulary, dtype):
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, size, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, size, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    targets[1::3] = -100
    return hidden, weight, targets


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(sys.modules["rayllm_kernels.fused_linear_cross_entropy"], "_CHUNK_LOGITS", 100)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("tokens", [1, 3, 8, 13])
def test_gradcheck(tokens):
    hidden, weight, targets = inputs(tokens, 5, 31, torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: fused_linear_cross_entropy(h, w, targets), (hidden, weight))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("vocabulary", [33, 96])  # on CPU a loop of our own takes multiples of 32
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_are_as_exact_as_with_all_logits(dtype, vocabulary):
    hidden, weight, targets = inputs(29, 40, vocabulary, dtype)
    exact_inputs = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    results = []
    for function, leaves in (
        (fused_linear_cross_entropy, (hidden, weight)),
        (fused_linear_cross_entropy_reference, (hidden, weight)),
        (fused_linear_cross_entropy_reference, exact_inputs),
    ):
        loss = function(*leaves, targets)
        results.append([loss, *torch.autograd.grad(loss / 19, leaves)])
    assert results[0][0].dtype == torch.float32
    for ours, torchs, exact in zip(*results, strict=True):
        scale = exact.abs().max()
        allowed = 2 * (torchs.double() - exact).abs().max() + (1e-6 if dtype == torch.float32 else 2**-9) * scale
        assert (ours.double() - exact).abs().max() <= allowed


def test_only_what_is_asked_for_is_computed():
    hidden, weight, targets = inputs(7, 8, 11, torch.float32)
    loss = fused_linear_cross_entropy(hidden, weight.detach(), targets)
    loss.backward()
    assert hidden.grad is not None
    with torch.no_grad():
        assert not fused_linear_cross_entropy(hidden, weight, targets).requires_grad


def test_all_targets_ignored():
    hidden, weight, targets = inputs(4, 8, 11, torch.float32)
    loss = fused_linear_cross_entropy(hidden, weight, torch.full_like(targets, -100))
    loss.backward()
    assert loss == 0
    assert hidden.grad.abs().sum() == weight.grad.abs().sum() == 0


@pytest.mark.parametrize("scale", [1e-3, 100.0])
def test_certain_and_uncertain_predictions(scale):
    """The gradient by the logit of a target that is all but certain is a small difference of near numbers."""
    hidden, weight, targets = inputs(16, 40, 64, torch.float32)
    hidden = (scale * weight.detach()[targets.clamp(min=0)]).requires_grad_()
    exact_inputs = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    ours = fused_linear_cross_entropy(hidden, weight, targets)
    exact = fused_linear_cross_entropy_reference(*exact_inputs, targets)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-3)
    for mine, wanted in zip(
        torch.autograd.grad(ours, (hidden, weight)), torch.autograd.grad(exact, exact_inputs), strict=True
    ):
        torch.testing.assert_close(mine.double(), wanted, rtol=1e-4, atol=1e-5 * max(1.0, float(wanted.abs().max())))


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_logits_that_are_not_finite_give_no_finite_loss(value):
    hidden, weight, targets = inputs(4, 8, 64, torch.float32)
    hidden = hidden.detach().clone()
    hidden[0, 3] = value
    assert not fused_linear_cross_entropy(hidden, weight, targets).isfinite()


@pytest.mark.parametrize("target", [64, -1])
@pytest.mark.parametrize("vocabulary", [64, 11])
def test_a_target_that_is_no_token(target, vocabulary):
    hidden, weight, targets = inputs(4, 8, vocabulary, torch.float32)
    targets[0] = target
    with pytest.raises((IndexError, RuntimeError), match=r"64|-1"):
        fused_linear_cross_entropy(hidden, weight, targets)


def test_shapes_that_do_not_fit():
    hidden, weight, targets = inputs(4, 8, 11, torch.float32)
    with pytest.raises(ValueError, match="expected hidden"):
        fused_linear_cross_entropy(hidden, weight[:, :3], targets)
    with pytest.raises(ValueError, match="one dtype"):
        fused_linear_cross_entropy(hidden, weight.bfloat16(), targets)


def test_operator_is_registered_as_torch_asks():
    hidden, weight, targets = inputs(4, 8, 11, torch.float32)
    operator = torch.ops.rayllm.fused_linear_cross_entropy.default
    torch.library.opcheck(operator, (hidden, weight, targets, -100, True, True))


@pytest.mark.parametrize("factor", [1 / 3, 3e-5])
def test_the_gradient_of_the_loss_is_not_rounded(factor):
    """One that rounding to bfloat16 changes by 0.13 % or more: what the gradients are on the whole shows it."""
    hidden, weight, targets = inputs(29, 40, 33, torch.bfloat16)
    exact_inputs = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    ours = torch.autograd.grad(fused_linear_cross_entropy(hidden, weight, targets) * factor, (hidden, weight))
    exact = torch.autograd.grad(fused_linear_cross_entropy_reference(*exact_inputs, targets), exact_inputs)
    whole = torch.autograd.grad(fused_linear_cross_entropy(hidden, weight, targets), (hidden, weight))
    for mine, undivided, wanted in zip(ours, whole, exact, strict=True):
        assert (mine.double() * wanted).sum() / (wanted * wanted).sum() == pytest.approx(factor, rel=1e-3)
        torch.testing.assert_close(mine.double(), undivided.double() * factor, rtol=2**-8, atol=0)


def test_it_takes_less_than_six_tenths_of_what_the_logits_take():
    """Of SmolLM2's vocabulary and 2048 tokens, in processes of their own."""
    assert memory(Path(), Namespace())["fused_over_whole"] < 0.6
