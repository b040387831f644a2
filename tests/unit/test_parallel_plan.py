"""The plan alone: which slices a rank reads, and which layouts are refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rayllm.core.errors import ConfigError
from rayllm.models.checkpoint import Checkpoint
from rayllm.models.families import spec_from_config
from rayllm.models.spec import DecoderSpec
from rayllm.parallel.load import load_shard
from rayllm.parallel.mesh import Mesh
from rayllm.parallel.plan import Style, check_layout, local_index, local_kv_heads, local_vocab_size, stage_layers
from tests.tiny_models import save_tiny, tiny_config


def spec_of(heads: int, kv_heads: int) -> DecoderSpec:
    return spec_from_config(
        tiny_config("llama-gqa", num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=4)
    )


@pytest.mark.parametrize(("layers", "stages"), [(30, 1), (30, 4), (3, 3), (7, 3), (5, 2)])
def test_stages_cover_the_layers_in_order(layers: int, stages: int) -> None:
    ranges = [stage_layers(layers, stage, stages) for stage in range(stages)]
    assert [layer for one in ranges for layer in one] == list(range(layers))
    sizes = [len(one) for one in ranges]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tp"),
    [(9, 3, 1), (9, 3, 3), (9, 3, 9), (8, 2, 2), (8, 2, 4), (8, 2, 8), (6, 1, 3), (6, 6, 2)],
)
def test_every_query_head_finds_its_kv_head_on_its_own_rank(heads: int, kv_heads: int, tp: int) -> None:
    spec = spec_of(heads, kv_heads)
    check_layout(spec, tp, 1)
    seen = []
    for rank in range(tp):
        q = local_index(Style.COLUMN, (heads * 4, 48), spec, tp_rank=rank, tp_size=tp)[0]
        kv = local_index(Style.KV_COLUMN, (kv_heads * 4, 48), spec, tp_rank=rank, tp_size=tp)[0]
        queries, keys = range(q.start // 4, q.stop // 4), range(kv.start // 4, kv.stop // 4)
        assert len(keys) == local_kv_heads(spec, tp)
        local_group = len(queries) // len(keys)
        for place, query in enumerate(queries):
            assert keys[place // local_group] == query // (heads // kv_heads)
        seen += queries
    assert seen == list(range(heads))


@pytest.mark.parametrize(("vocab_size", "tp"), [(101, 1), (101, 2), (101, 3), (5, 4), (12, 4)])
def test_vocabulary_slices_join_without_padding(vocab_size: int, tp: int) -> None:
    spec = replace(spec_of(8, 8), vocab_size=vocab_size)
    rows = []
    for rank in range(tp):
        part = local_index(Style.VOCAB, (vocab_size, 48), spec, tp_rank=rank, tp_size=tp)[0]
        assert 0 <= part.start <= part.stop <= vocab_size
        assert part.stop - part.start <= local_vocab_size(spec, tp)
        rows += range(part.start, part.stop)
    assert rows == list(range(vocab_size))


@pytest.mark.parametrize(
    ("tp", "pp", "message"),
    [
        (2, 1, "tensor parallel size 2 does not divide the model's 9 attention heads"),
        (4, 1, "tensor parallel size 4 does not divide the model's 9 attention heads"),
        (1, 4, "pipeline parallel size 4 is more than the model's 3 layers"),
    ],
)
def test_layouts_that_do_not_fit(tp: int, pp: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_layout(spec_of(9, 3), tp, pp)


def test_kv_heads_and_ffn_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="size 4 neither divides the model's 6 key/value heads nor is a multiple"):
        check_layout(spec_of(12, 6), 4, 1)
    with pytest.raises(ConfigError, match="size 3 does not divide the model's ffn size 71"):
        check_layout(replace(spec_of(9, 3), ffn_size=71), 3, 1)


def test_a_layout_is_refused_before_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path, "llama-gqa")
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ConfigError, match="size 5 does not divide the model's 6 attention heads"):
        load_shard(
            Checkpoint.open(tmp_path), Mesh(tp_rank=0, tp_size=5), dtype=torch.float32, device=torch.device("cpu")
        )


def test_weights_do_not_follow_the_file_after_loading(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama-gqa")
    model = load_shard(Checkpoint.open(tmp_path), Mesh.single(), dtype=torch.float32, device=torch.device("cpu"))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(4096)
        file.write(bytes(100_000))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name], rtol=0, atol=0)
