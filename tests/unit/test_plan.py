"""`rayllm plan` against the textbook's figures, transformers' models and the shards that are really loaded."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rayllm.cli.model_config import read_spec
from rayllm.cli.planning import MemoryPlan, ModelPlan, WeightFormat, even_layouts, max_rank_bytes, plan_model
from rayllm.core.errors import CheckpointError, ConfigError
from rayllm.engine.kv_cache import KVLayout
from rayllm.models.checkpoint import Checkpoint
from rayllm.models.families import spec_from_config
from rayllm.parallel.load import load_shard
from rayllm.parallel.mesh import Mesh
from tests.tiny_models import CASES, tiny_config

LLAMA = {
    "model_type": "llama",
    "vocab_size": 1001,
    "hidden_size": 96,
    "intermediate_size": 240,
    "num_hidden_layers": 4,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}


def test_the_textbook_example():
    plan = MemoryPlan(num_params=175_000_000_000, form=WeightFormat(dtype="bfloat16"), gpu_bytes=80_000_000_000)
    assert plan.weights_bytes == 350e9
    assert plan.gpus == 5
    assert plan.training_bytes == 2800e9
    assert plan.training_gpus == 35
    float32, int8 = WeightFormat(dtype="float32"), WeightFormat(dtype="float32", int8=True)
    assert MemoryPlan(num_params=40, form=float32, gpu_bytes=160).gpus == 1
    assert MemoryPlan(num_params=41, form=float32, gpu_bytes=160).gpus == 2
    assert MemoryPlan(num_params=175_000_000_000, form=int8, gpu_bytes=80_000_000_000).gpus == 3


@pytest.mark.parametrize("case", CASES)
def test_parameters_of_the_whole_model_are_those_of_transformers(case):
    config = tiny_config(case)
    with torch.device("meta"):
        reference = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    bytes_of_params = 2 * reference.num_parameters()
    assert max_rank_bytes(spec_from_config(config), 1, 1, WeightFormat(dtype="bfloat16")) == bytes_of_params


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (3, 1), (6, 1), (1, 3), (3, 3)])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scheme", [None, "w8a16"])
def test_the_largest_shard_is_the_one_that_is_loaded(make_tiny_model, tp, pp, tied, scheme):
    """6 query heads and 3 KV heads, 3 layers, a vocabulary that does not divide: sizes as load_shard makes them."""
    directory = make_tiny_model(tie_word_embeddings=tied, intermediate_size=96)
    checkpoint = Checkpoint.open(directory)
    sizes = []
    for rank in range(tp * pp):
        mesh = Mesh(tp_rank=rank % tp, tp_size=tp, pp_rank=rank // tp, pp_size=pp)
        shard = load_shard(checkpoint, mesh, dtype=torch.float32, device=torch.device("cpu"), quantize=scheme)
        sizes.append(sum(parameter.nbytes for parameter in shard.parameters()))
    form = WeightFormat(dtype="float32", int8=scheme is not None)
    assert max_rank_bytes(checkpoint.spec, tp, pp, form) == max(sizes)


def test_a_token_in_the_cache_is_as_large_as_its_pages():
    for dtype, kept in [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("int8", torch.int8)]:
        plan = model_plan(kv_dtype=dtype)
        layout = KVLayout(
            layers=range(4), num_kv_heads=4, head_dim=8, block_size=16, dtype=kept, device=torch.device("cpu")
        )
        assert plan.kv_bytes_per_token * 16 == layout.block_bytes


def test_layouts_divide_evenly():
    form = WeightFormat(dtype="float16")
    spec = spec_from_config(LLAMA)
    layouts = even_layouts(spec, form=form, kv_dtype="float16", gpu_bytes=10**9, fraction=0.5, gpus=12)
    # 12 query heads, 4 KV heads, 240 ffn columns, 4 layers; TP 3 and 6 split the query heads but not the KV heads
    assert {(layout.tp, layout.pp) for layout in layouts} == {
        *((1, pp) for pp in (1, 2, 4)),
        *((2, pp) for pp in (1, 2, 4)),
        *((4, pp) for pp in (1, 2)),
        (12, 1),
    }
    assert {layout.tp: layout.kv_copies for layout in layouts} == {1: 1, 2: 1, 4: 1, 12: 3}


def model_plan(**changes) -> ModelPlan:
    arguments = {"gpu_bytes": 4 * 10**6, "fraction": 0.75, "context": 2048, "max_gpus": 4, "kv_dtype": "float16"}
    form = WeightFormat(dtype="float16")
    return plan_model(spec_from_config(LLAMA), form=form, **{**arguments, **changes})


def test_what_fits():
    plan = model_plan()
    assert plan.kv_bytes_per_token == 2 * 4 * 4 * 8 * 2
    for layout in plan.layouts:
        used = layout.weights_bytes + layout.max_tokens * layout.kv_bytes_per_token
        assert used <= 3 * 10**6 < used + layout.kv_bytes_per_token
        assert layout.max_batch(2048) == layout.max_tokens // 2048
    whole = plan.layouts[0]
    assert whole.weights_bytes == plan.memory.weights_bytes
    assert plan.best == whole


def test_best_is_the_smallest_layout_that_holds_one_sequence():
    plan = model_plan(gpu_bytes=10**6)
    assert plan.best is not None
    assert plan.best.gpus > 1
    assert plan.best.max_batch(2048) >= 1
    assert all(layout.max_batch(2048) == 0 for layout in plan.layouts if layout.gpus < plan.best.gpus)
    assert model_plan(gpu_bytes=10**4).best is None
    assert model_plan(gpu_bytes=10**4).as_json()["largest"] is None


def test_activations_follow_the_formula():
    plan = model_plan(context=100)
    assert plan.activation_bytes(recompute=False) == 34 * 100 * 96 * 4
    assert plan.activation_bytes(recompute=True) == 2 * 100 * 96 * 4


def test_spec_of_a_directory(tiny_model: Path, make_tiny_model: Callable[..., Path], tmp_path: Path):
    assert read_spec(str(tiny_model)).num_layers == 3
    missing = str(tmp_path / "missing")
    with pytest.raises(CheckpointError, match=rf"^{missing}: is not a directory here$"):
        read_spec(missing)
    with pytest.raises(CheckpointError, match=r"^org/name: .*; get it with `rayllm models fetch org/name`$"):
        read_spec("org/name")
    with pytest.raises(CheckpointError, match=r"config\.json: No such file"):
        read_spec(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        read_spec(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="must hold a JSON object"):
        read_spec(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "hidden_act": "mystery"}))
    with pytest.raises(ConfigError, match="mystery"):
        read_spec(str(tmp_path))
