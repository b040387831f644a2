"""Log-probabilities of a vocabulary that several ranks hold parts of equal float64's, and so do their gradients."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from rayllm.models.families import spec_from_config
from rayllm.train import head
from rayllm.train.batch import IGNORE
from rayllm.train.head import Head
from rayllm.train.initial import random_weights
from tests.ranks import Ranks
from tests.tiny_models import tiny_config


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    ranks = Ranks(3)
    yield ranks
    ranks.close()


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [T, D], weight [V, D], targets [T], the gradient of each target's log-probability [T]."""
    generator = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(11, 8, generator=generator), torch.randn(21, 8, generator=generator) * 3
    targets = torch.randint(0, 21, (11,), generator=generator)
    targets[torch.tensor([0, 7])] = IGNORE
    return hidden, weight, targets, torch.randn(11, generator=generator)


def on_rank(chunk_logits: int) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, targets, upstream = inputs()
    head._CHUNK_LOGITS = chunk_logits
    group = dist.group.WORLD if dist.get_world_size() > 1 else None
    mine = weight.chunk(dist.get_world_size())[dist.get_rank()].clone().requires_grad_()
    hidden.requires_grad_()
    log_probs = Head(mine, group).log_probs(hidden, targets)
    (log_probs * upstream).sum().backward()
    assert hidden.grad is not None
    assert mine.grad is not None
    return log_probs.detach(), hidden.grad, mine.grad


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("chunk_logits", [1, 40, 1 << 20])
def test_log_probs_and_gradients(ranks: Ranks, world: int, chunk_logits: int) -> None:
    hidden, weight, targets, upstream = inputs()
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    counted = targets != IGNORE
    expected = (hidden @ weight.T).log_softmax(-1).gather(1, targets.clamp(min=0)[:, None])[:, 0] * counted
    (expected * upstream).sum().backward()
    answers = ranks.run(world, on_rank, chunk_logits)
    for log_probs, dhidden, _ in answers:
        torch.testing.assert_close(log_probs.double(), expected.detach(), rtol=0, atol=1e-5)
        torch.testing.assert_close(dhidden.double(), hidden.grad, rtol=0, atol=1e-5)
    dweight = torch.cat([one[2] for one in answers])
    torch.testing.assert_close(dweight.double(), weight.grad, rtol=0, atol=1e-5)


def test_drawn_weights_depend_on_seed_and_name_alone() -> None:
    spec = spec_from_config(tiny_config("gpt2-tied"))
    draw = random_weights(spec, 5)
    shape = (400, 100)
    assert torch.equal(draw("embed_tokens.weight", shape), random_weights(spec, 5)("lm_head.weight", shape))
    assert not torch.equal(draw("embed_tokens.weight", shape), draw("layers.0.mlp.up_proj.weight", shape))
    assert not torch.equal(draw("embed_tokens.weight", shape), random_weights(spec, 6)("embed_tokens.weight", shape))
    assert draw("layers.0.mlp.up_proj.weight", shape).std().item() == pytest.approx(0.02, rel=0.02)
    # Three layers put two outputs each on the residual stream.
    assert draw("layers.0.mlp.down_proj.weight", shape).std().item() == pytest.approx(0.02 / 6**0.5, rel=0.02)
    assert draw("norm.bias", (4,)).tolist() == [0, 0, 0, 0]
    assert draw("norm.weight", (4,)).tolist() == [1, 1, 1, 1]
