"""What `rayllm quantize` writes loads in transformers with compressed-tensors, and answers the same there;
and vLLM, by its source, would read each layer as it is."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from rayllm.cli.main import main
from rayllm.models.checkpoint import Checkpoint
from rayllm.models.context import DenseContext
from rayllm.models.quantization import OUTLIERS, OWN_FORMAT, Scheme
from rayllm.parallel.load import load_shard
from rayllm.parallel.mesh import Mesh
from rayllm.quant.calibrate import calibrate
from rayllm.quant.convert import Outliers, Recipe, convert
from tests.tiny_models import save_tiny, save_with_outliers, save_with_outliers_on_the_way_out

IDS = torch.randint(0, 101, (20,), generator=torch.Generator().manual_seed(4))
CPU = torch.device("cpu")

pytestmark = pytest.mark.filterwarnings("default")  # theirs


def quantized(model: Path, out: Path, recipe: Recipe) -> Path:
    out.mkdir()
    whole = load_shard(Checkpoint.open(model), Mesh.single(), dtype=torch.float32, device=CPU)
    statistics = calibrate(whole, [IDS]) if recipe.outliers != "none" else None
    convert(Checkpoint.open(model), out, recipe, statistics=statistics, calibration_tokens=20)
    return out


@torch.inference_mode()
def ours(directory: Path) -> Tensor:
    model = load_shard(Checkpoint.open(directory), Mesh.single(), dtype=torch.float32, device=CPU)
    return model.logits(model(IDS, torch.arange(20), DenseContext([0, 20])))


@torch.inference_mode()
def theirs(directory: Path) -> Tensor:
    pytest.importorskip("compressed_tensors")
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32)
    return model.eval()(IDS[None]).logits[0]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("case", ["llama-biases", "llama-mqa-tied"])
@pytest.mark.parametrize(
    ("scheme", "outliers", "skip"),
    [
        ("w8a16", "none", ()),
        ("w8a16", "smooth", ("lm_head",)),
        ("w8a8", "none", ()),
        ("w8a8", "none", ("lm_head", "down_proj")),
    ],
)
def test_transformers_reads_it(
    case: str, scheme: Scheme, outliers: Outliers, skip: tuple[str, ...], tmp_path: Path
) -> None:
    save_tiny(tmp_path / "model", case)
    out = quantized(tmp_path / "model", tmp_path / "out", Recipe(scheme=scheme, outliers=outliers, skip=skip))
    loss, difference = relative(ours(out), ours(tmp_path / "model")), relative(theirs(out), ours(out))
    # They widen the weights: the same but for float32's last bits under W8A16. Under W8A8 they spread activations over
    # 127.5 integers where we take 127, so that they round others up and down and lose as much, but differently.
    # With weights of another layer, `difference` would be near 1.
    assert difference < (1e-5 if scheme == "w8a16" else min(1.25 * loss, 0.035))


@pytest.mark.parametrize("factors", [(100.0, 100.0, 100.0), (100.0, 0.01, 0.01)])
def test_columns_in_16_bits_cost_nothing_to_those_who_know_nothing_of_them(
    factors: tuple[float, ...], tmp_path: Path
) -> None:
    """They round no activations, and weights that are outliers have become like the others."""
    save_with_outliers(tmp_path / "model", factors)
    exact = ours(tmp_path / "model")
    plain, mixed = (
        quantized(tmp_path / "model", tmp_path / outliers, Recipe(scheme="w8a8", outliers=outliers))
        for outliers in ("none", "mixed")
    )
    assert len(load_file(mixed / OUTLIERS)) >= 2 * 3 * 5
    assert relative(theirs(plain), exact) > 0.3
    assert relative(theirs(mixed), exact) < 0.03


def test_columns_that_int8_cannot_hold_are_not_read_by_others(tmp_path: Path) -> None:
    """Without the kept columns the model would be another."""
    save_with_outliers_on_the_way_out(tmp_path / "model")
    mixed = quantized(tmp_path / "model", tmp_path / "out", Recipe(scheme="w8a8", outliers="mixed"))
    assert relative(ours(mixed), ours(tmp_path / "model")) < 0.05
    with pytest.raises(ValueError, match=f"format.*\n.*{OWN_FORMAT}"):
        theirs(mixed)


def in_vllm(quantization: dict[str, Any], layer: str, kind: str, shards: dict[str, list[str]]) -> bool:
    """Whether vLLM reads one of its layers as int8, as its source has it (should_ignore_layer, find_matched_target and
    get_quant_method in model_executor/layers/quantization/compressed_tensors at 008014e, of 2026): a joined layer is
    ignored with all of its parts, and an error if with some of them; otherwise a target is the layer's name, or is
    held in its class's name, whatever the case. What has no target is not quantized."""
    (group,) = quantization["config_groups"].values()
    parent, _, name = layer.rpartition(".")
    parts = [f"{parent}.{part}" for part in shards.get(name, [])] or [layer]
    ignored = {part in quantization["ignore"] for part in parts}
    if len(ignored) > 1:
        raise ValueError(f"Found a different quantization schemes for {parts}")
    if ignored == {True}:
        return False
    return any(target == layer or target.lower() in kind.lower() for target in group["targets"])


VLLM_LAYERS = {
    "self_attn.qkv_proj": ("QKVParallelLinear", ["q_proj", "k_proj", "v_proj"]),
    "self_attn.o_proj": ("RowParallelLinear", []),
    "mlp.gate_up_proj": ("MergedColumnParallelLinear", ["gate_proj", "up_proj"]),
    "mlp.down_proj": ("RowParallelLinear", []),
}


@pytest.mark.parametrize("case", ["llama-gqa", "qwen3-bias-tied"])
@pytest.mark.parametrize(
    ("scheme", "outliers", "skip", "int8_head"),
    [
        ("w8a16", "none", (), True),
        ("w8a8", "none", ("lm_head", "down_proj"), False),
        ("w8a8", "mixed", ("layers.1.self_attn.[qkv]_proj",), True),
    ],
)
def test_vllm_would_read_each_layer_as_it_is_stored(
    case: str, scheme: Scheme, outliers: Outliers, skip: tuple[str, ...], int8_head: bool, tmp_path: Path
) -> None:
    """vLLM was not run. An int8 head is a layer that only its name makes a target: ParallelLMHead is no "linear"."""
    save_tiny(tmp_path / "model", case)
    out = quantized(tmp_path / "model", tmp_path / "out", Recipe(scheme=scheme, outliers=outliers, skip=skip))
    config = json.loads((out / "config.json").read_text())
    quantization = config["quantization_config"]
    stored = {name for path in out.glob("model*.safetensors") for name in load_file(path)}
    shards = {name.rpartition(".")[2]: parts for name, (_, parts) in VLLM_LAYERS.items() if parts}
    for block in range(3):
        for name, (kind, parts) in VLLM_LAYERS.items():
            layer = f"model.layers.{block}.{name}"
            parent = layer.rpartition(".")[0]
            for part in [f"{parent}.{part}" for part in parts] or [layer]:
                assert in_vllm(quantization, layer, kind, shards) == (f"{part}.weight_scale" in stored)
    assert in_vllm(quantization, "lm_head", "ParallelLMHead", shards) == int8_head == ("lm_head.weight_scale" in stored)
    assert not in_vllm(quantization, "model.embed_tokens", "VocabParallelEmbedding", shards)
    assert not (config["tie_word_embeddings"] and int8_head)  # vLLM skips what is stored of a tied head
    (group,) = quantization["config_groups"].values()
    form = "int-quantized" if (scheme, outliers) == ("w8a8", "none") else "pack-quantized"
    assert (quantization["format"], group["format"]) == (form, form)
    assert (group["input_activations"] is None) == (form == "pack-quantized")  # else there is no scheme for it


def test_who_quantizes_is_told_what_vllm_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_model: Path
) -> None:
    told = {}
    for skip in ("k_proj", "o_proj"):
        monkeypatch.setattr("sys.argv", ["rayllm", "quantize", str(tiny_model), str(tmp_path / skip), "--skip", skip])
        with pytest.raises(SystemExit) as exit_:
            main()
        assert exit_.value.code == 0
        told[skip] = capsys.readouterr().err
    quantization = json.loads((tmp_path / "k_proj" / "config.json").read_text())["quantization_config"]
    parts = {"qkv_proj": ["q_proj", "k_proj"]}
    with pytest.raises(ValueError, match="different quantization schemes"):
        in_vllm(quantization, "model.layers.0.self_attn.qkv_proj", "QKVParallelLinear", parts)
    assert "vLLM will not load it" in told["k_proj"]
    assert "layers.0.self_attn.q_proj, layers.0.self_attn.k_proj, layers.0.self_attn.v_proj" in told["k_proj"]
    assert "vLLM" not in told["o_proj"]
