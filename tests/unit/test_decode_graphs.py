"""Replayed decode steps against the model itself, bit by bit, over changing numbers of sequences."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rayllm.engine.decode_graphs import DecodeGraphs
from rayllm.engine.kv_cache import KVCache, KVLayout
from rayllm.engine.paged_context import PagedContext
from rayllm.models.checkpoint import Checkpoint
from rayllm.models.decoder import Decoder
from rayllm.parallel.fuse import fuse_projections
from rayllm.parallel.load import load_shard
from rayllm.parallel.mesh import Mesh
from rayllm_kernels.dispatch import linear_limits
from tests.tiny_models import save_tiny

PAGE, BLOCKS, ROWS = 4, 64, 6
# Sizes that the kernels take; those of the tiny models are odd on purpose.
EVEN = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}


def load(directory: Path, case: str, dtype: torch.dtype, sizes: dict[str, int]) -> Decoder:
    save_tiny(directory, case, **sizes)
    model = load_shard(Checkpoint.open(directory), Mesh.single(), dtype=dtype, device=torch.device("cpu"))
    fuse_projections(model.requires_grad_(False))
    return model


def random_cache(model: Decoder, dtype: torch.dtype) -> KVCache:
    spec = model.spec
    layout = KVLayout(
        layers=range(spec.num_layers),
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        block_size=PAGE,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    cache = KVCache(layout, BLOCKS)
    for page in pages(cache, model):
        page.copy_(torch.randn(page.shape))
    return cache


def pages(cache: KVCache, model: Decoder) -> list[Tensor]:
    return [page for layer in range(model.spec.num_layers) for page in cache.pages(layer) if page is not None]


def check_steps(
    model: Decoder, dtype: torch.dtype, runs: list[int], cache_dtype: torch.dtype | None = None
) -> list[tuple[int, int]]:
    """Steps of many sizes: the output and the cache equal the model's own.

    -> of each step its number of sequences, and how often the graphs ran the model (which `runs` counts).
    """
    torch.manual_seed(0)
    graphs, ours = DecodeGraphs(model, ROWS, dtype), random_cache(model, cache_dtype or dtype)
    theirs = copy.deepcopy(ours)
    tables_RM = torch.randperm(BLOCKS)[: ROWS * 8].view(ROWS, 8).int()
    seen = []
    for num_seqs in (3, 1, 6, 3, 1, 2, 6, 3):
        rows_B, positions_T = torch.randperm(ROWS)[:num_seqs], torch.randint(0, 8 * PAGE, (num_seqs,))
        context = PagedContext(
            cache=ours,
            block_tables_RM=tables_RM,
            rows_B=rows_B.int(),
            query_start_B1=torch.arange(num_seqs + 1).int(),
            context_lens_B=(positions_T + 1).int(),
            slots_T=tables_RM[rows_B, positions_T // PAGE].long() * PAGE + positions_T % PAGE,
            rope_lengths_T=None,
            prompts=None,
        )
        x_TD, rotation = model.embed(torch.randint(0, model.spec.vocab_size, (num_seqs,)), positions_T, None)
        expected = model.transform(x_TD, rotation, replace(context, cache=theirs))
        runs.clear()
        assert torch.equal(graphs.transform(x_TD, rotation, context), expected)
        seen.append((num_seqs, len(runs)))
        assert all(map(torch.equal, pages(ours, model), pages(theirs, model)))
    return seen


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of tokens whenever the model runs."""
    runs, transform = [], Decoder.transform

    def counted(self, x_TD, *arguments):
        runs.append(len(x_TD))
        return transform(self, x_TD, *arguments)

    monkeypatch.setattr(Decoder, "transform", counted)
    return runs


@torch.inference_mode()
@pytest.mark.parametrize("case", ["llama-gqa", "llama-biases", "mistral-window", "qwen2-yarn-mqa", "qwen3-gqa"])
def test_a_number_of_sequences_runs_the_model_once(case: str, runs: list[int], tmp_path: Path) -> None:
    steps = check_steps(load(tmp_path, case, torch.float32, EVEN), torch.float32, runs)
    assert steps == [(3, 1), (1, 1), (6, 1), (3, 0), (1, 0), (2, 1), (6, 0), (3, 0)]


@torch.inference_mode()
def test_bfloat16(runs: list[int], tmp_path: Path) -> None:
    check_steps(load(tmp_path, "llama-gqa", torch.bfloat16, EVEN), torch.bfloat16, runs)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_pages(dtype: torch.dtype, runs: list[int], tmp_path: Path) -> None:
    steps = check_steps(load(tmp_path, "llama-gqa", dtype, EVEN), dtype, runs, torch.int8)
    if dtype == torch.float32 or linear_limits().tile_bfloat16 >= ROWS:  # else torch multiplies many rows
        assert steps == [(3, 1), (1, 1), (6, 1), (3, 0), (1, 0), (2, 1), (6, 0), (3, 0)]


@torch.inference_mode()
@pytest.mark.parametrize("case", ["gpt2-tied", "llama-gqa"])
def test_what_the_kernels_do_not_take_is_run_as_it_comes(case: str, runs: list[int], tmp_path: Path) -> None:
    steps = check_steps(load(tmp_path, case, torch.float32, {}), torch.float32, runs)
    assert all(count >= 1 for _, count in steps)
