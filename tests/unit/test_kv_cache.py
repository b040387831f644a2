"""The KV cache in int8: its size, and the engine's answers against a model whose keys and values are rounded alike."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rayllm.core.config import CacheConfig, SchedulerConfig
from rayllm.core.errors import ConfigError
from rayllm.core.types import SamplingParams
from rayllm.engine.kv_cache import KVCache, KVLayout, cache_dtype
from rayllm.engine.llm import LLM
from rayllm.models.checkpoint import Checkpoint
from rayllm.models.context import DenseContext
from rayllm.models.rope import Rotation
from rayllm.parallel.load import load_shard
from rayllm.parallel.mesh import Mesh

CPU = torch.device("cpu")
SCORED = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=0, prompt_logprobs=0)


class RoundingContext(DenseContext):
    """Dense attention over keys and values with 127 steps to each side of zero, for each token and head."""

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
        assert rotation is not None
        q_THE, k_TKE = rotation.apply(q_THE, k_TKE)
        steps = [x.abs().amax(-1, keepdim=True) / 127 for x in (k_TKE, v_TKE)]
        k_TKE, v_TKE = ((x / step).round() * step for x, step in zip((k_TKE, v_TKE), steps, strict=True))
        return super().attend(layer, q_THE, k_TKE, v_TKE, None, scale=scale, window=window)


def layout(dtype: torch.dtype) -> KVLayout:
    return KVLayout(layers=range(2, 5), num_kv_heads=3, head_dim=8, block_size=4, dtype=dtype, device=CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_block_bytes_count_all_that_is_allocated(dtype: torch.dtype) -> None:
    cache = KVCache(layout(dtype), 7)
    tensors = [tensor for layer in range(2, 5) for tensor in cache.pages(layer) if tensor is not None]
    assert sum(tensor.nbytes for tensor in tensors) == 7 * layout(dtype).block_bytes
    assert len(tensors) == (12 if dtype == torch.int8 else 6)


def test_dtype() -> None:
    assert cache_dtype("int8", torch.bfloat16, CPU) == torch.int8
    assert cache_dtype("auto", torch.bfloat16, CPU) == torch.bfloat16
    assert cache_dtype("auto", torch.float16, CPU) == torch.float32
    with pytest.raises(ConfigError, match=r"^KV cache dtype: 'int4' is not one of auto, int8$"):
        CacheConfig(dtype="int4")


@pytest.fixture(scope="module")
def model_dir(make_tiny_model: Callable[..., Path]) -> Path:
    """Heads of 16, which the compiled kernels take."""
    return make_tiny_model(head_dim=16)


@torch.inference_mode()
def dense_logprobs(directory: Path, ids: list[int], context: DenseContext) -> Tensor:
    checkpoint = Checkpoint.open(directory)
    model = load_shard(checkpoint, Mesh.single(), dtype=torch.float32, device=CPU)
    hidden = model(torch.tensor(ids), torch.arange(len(ids)), context)
    return model.logits(hidden).double().log_softmax(-1)


@pytest.mark.parametrize(
    ("cache", "budget"),
    [
        (CacheConfig(dtype="int8", num_blocks=200), 1024),
        (CacheConfig(dtype="int8", num_blocks=200, block_size=4), 7),  # chunked prefill
        (CacheConfig(dtype="int8", num_blocks=10), 1024),  # preemption
    ],
    ids=["whole", "chunked", "preempted"],
)
def test_answers_are_those_of_rounded_keys_and_values(model_dir: Path, cache: CacheConfig, budget: int) -> None:
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 256, (n,), generator=generator).tolist() for n in (1, 2, 15, 16, 17, 31, 33, 64, 5, 90)]
    scheduler = SchedulerConfig(max_num_batched_tokens=budget, max_num_seqs=min(budget, 64))
    with LLM(str(model_dir), cache=cache, scheduler=scheduler) as llm:
        outputs = llm.generate(prompts, SCORED)
        assert (llm._engine.scheduler.preemptions > 0) == (cache.num_blocks == 10)
        llm._engine.scheduler.check_integrity()
    errors, effects = [], []
    for prompt, output in zip(prompts, outputs, strict=True):
        answer = output.outputs[0]
        assert output.prompt_logprobs is not None
        assert answer.logprobs is not None
        ids = [*prompt, *answer.token_ids]
        rounded = dense_logprobs(model_dir, ids, RoundingContext([0, len(ids)]))
        exact = dense_logprobs(model_dir, ids, DenseContext([0, len(ids)]))
        scored = [*output.prompt_logprobs[1:], *answer.logprobs]
        for i, (token, position) in enumerate(zip(ids[1:], scored, strict=True)):
            errors.append(abs(position.logprob - rounded[i, token].item()))
            effects.append(abs(position.logprob - exact[i, token].item()))
    # Where a value lies on the edge between two steps, another order of a sum puts it on the other side: so the mean,
    # and what the rounding does at all for comparison.
    assert sum(errors) / len(errors) < 1e-3 < 1e-2 < sum(effects) / len(effects)
    assert max(errors) < 1e-2
