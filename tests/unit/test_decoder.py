"""The decoder against transformers: every family, all its switches, packed sequences."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from rayllm.models.checkpoint import Checkpoint
from rayllm.models.context import DenseContext
from rayllm.models.decoder import Decoder
from rayllm.models.rope import Rotation
from rayllm.parallel.load import load_shard
from rayllm.parallel.mesh import Mesh
from tests.tiny_models import CASES, save_tiny

LENGTHS = (1, 7, 29)  # past every window and every original rope length of the cases
CU_SEQLENS = [0, 1, 8, 37]


def load(directory: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    return load_shard(Checkpoint.open(directory), Mesh.single(), dtype=dtype, device=torch.device("cpu"))


def packed_ids() -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 101, (sum(LENGTHS),), generator=torch.Generator().manual_seed(3))
    return ids, torch.cat([torch.arange(length) for length in LENGTHS])


def our_logits(model: Decoder) -> Tensor:
    ids, positions = packed_ids()
    return model.logits(model(ids, positions, DenseContext(CU_SEQLENS)))


def reference_logits(model: PreTrainedModel) -> Tensor:
    ids, _ = packed_ids()
    return torch.cat([model(one[None]).logits[0] for one in ids.split(LENGTHS)])


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_float32_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    reference = save_tiny(tmp_path, case)
    expected = reference_logits(reference)
    model = load(tmp_path)
    assert expected.std() > 0.1
    torch.testing.assert_close(our_logits(model), expected, rtol=0, atol=1e-4)
    assert model.spec.num_params == reference.num_parameters() == sum(one.numel() for one in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["llama-gqa", "qwen2-windows", "qwen3-bias-tied", "gpt2-tied"])
@torch.no_grad()
def test_half_precision_is_as_good_as_transformers(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    exact = reference_logits(save_tiny(tmp_path, case))
    reference = reference_logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype))
    ours = our_logits(load(tmp_path, dtype))
    assert ours.dtype == dtype
    # Both round at the same places; the order of the sums differs. So our distance to float32 may not exceed theirs by
    # much, and the two lie within a few roundings of each other.
    eps = torch.finfo(dtype).eps * exact.abs().max()
    assert (ours.float() - exact).norm() < 1.25 * (reference.float() - exact).norm()
    assert (ours.float() - reference.float()).abs().max() < 8 * eps


@pytest.mark.parametrize("case", ["llama-biases", "qwen3-windows", "gpt2-tied"])
def test_gradients_equal_transformers(case: str, tmp_path: Path) -> None:
    """Summed cross-entropy over packed sequences, every parameter."""
    reference, (ids, _) = save_tiny(tmp_path, case), packed_ids()
    targets = ids.roll(1)
    F.cross_entropy(reference_logits(reference), targets, reduction="sum").backward()
    model = load(tmp_path)
    F.cross_entropy(our_logits(model), targets, reduction="sum").backward()

    checkpoint = Checkpoint.open(tmp_path)
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    for name, parameter in model.named_parameters():
        source = checkpoint.source(name)
        whole = expected[source.name]
        assert whole is not None
        assert parameter.grad is not None
        index = source.stored_index(tuple(parameter.shape), tuple(slice(0, size) for size in parameter.shape))
        gradient = whole[index].t() if source.transposed and parameter.dim() == 2 else whole[index]
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-4, msg=f"{name} differs")


class CachingContext:
    """Keeps keys and values of one sequence between calls; attention spelled out, without a window."""

    def __init__(self, prompt_len: int) -> None:
        self._prompt_len = prompt_len
        self._cache: dict[int, tuple[Tensor, Tensor]] = {}
        self.rope_lengths_T: Tensor | None = None

    def start(self, positions: Tensor) -> "CachingContext":
        self.rope_lengths_T = (positions + 1).clamp(min=self._prompt_len)
        return self

    def attend(
        self,
        layer: int,
        q_THE: Tensor,
        k_TKE: Tensor,
        v_TKE: Tensor,
        rotation: Rotation | None,
        *,
        scale: float,
        window: int | None,
    ) -> Tensor:
        assert window is None
        assert rotation is not None
        q_THE, k_TKE = rotation.apply(q_THE, k_TKE)
        if layer in self._cache:
            k_TKE, v_TKE = (torch.cat(pair) for pair in zip(self._cache[layer], (k_TKE, v_TKE), strict=True))
        self._cache[layer] = k_TKE, v_TKE
        group = q_THE.shape[1] // k_TKE.shape[1]
        scores = torch.einsum("the,she->hts", q_THE, k_TKE.repeat_interleave(group, 1)) * scale
        ahead = torch.ones(scores.shape[1:]).triu(1 + k_TKE.shape[0] - q_THE.shape[0]).bool()
        shares = scores.masked_fill(ahead, -torch.inf).softmax(-1)
        return torch.einsum("hts,she->the", shares, v_TKE.repeat_interleave(group, 1))


@pytest.mark.parametrize("prompt_len", [3, 12])
@torch.no_grad()
def test_dynamic_rope_grows_during_decode_as_transformers_cache_does(prompt_len: int, tmp_path: Path) -> None:
    """The original length is 8: the prompt lies below it or above, and decode goes on past it."""
    reference, ids = save_tiny(tmp_path, "llama-dynamic"), packed_ids()[0][:20]
    model, context, cache = load(tmp_path), CachingContext(prompt_len), None
    chunks = [(0, prompt_len), *((start, start + 1) for start in range(prompt_len, 20))]
    for start, stop in chunks:
        output = reference(ids[None, start:stop], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        positions = torch.arange(start, stop)
        ours = model.logits(model(ids[start:stop], positions, context.start(positions)))
        torch.testing.assert_close(ours, output.logits[0], rtol=0, atol=1e-4)
