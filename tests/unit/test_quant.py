"""int8 checkpoints: written, read, served, split over ranks, refused; and that handling outliers matters."""

import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rayllm.core.errors import CheckpointError, ConfigError
from rayllm.models.checkpoint import Checkpoint
from rayllm.models.context import DenseContext
from rayllm.models.decoder import Decoder
from rayllm.models.quantization import OUTLIERS, OUTLIERS_FIELD, OWN_FORMAT, Scheme
from rayllm.parallel.fuse import FusedAttention, fuse_projections
from rayllm.parallel.load import load_shard
from rayllm.parallel.mesh import Mesh
from rayllm.quant.calibrate import calibrate
from rayllm.quant.convert import Outliers, Recipe, convert
from rayllm.quant.int8_linear import Int8Linear, linear_names
from rayllm.quant.outliers import even_out
from rayllm.quant.ranges import absmax_scale, clip_scale, round_to_int8
from rayllm.quant.writer import ShardWriter, pack
from tests import sharded_forward
from tests.ranks import Ranks
from tests.tiny_models import save_tiny, save_with_outliers, save_with_outliers_on_the_way_out

CPU = torch.device("cpu")
IDS = torch.randint(0, 101, (30,), generator=torch.Generator().manual_seed(3))
SCHEMES: list[tuple[Scheme, Outliers]] = [
    ("w8a16", "none"),
    ("w8a16", "clip"),
    ("w8a16", "smooth"),
    ("w8a8", "none"),
    ("w8a8", "smooth"),
    ("w8a8", "mixed"),
]


def load(directory: Path, *, quantize: Scheme | None = None, fuse: bool = False) -> Decoder:
    model = load_shard(Checkpoint.open(directory), Mesh.single(), dtype=torch.float32, device=CPU, quantize=quantize)
    if fuse:
        fuse_projections(model)
    return model


@torch.inference_mode()
def logits(model: Decoder, ids: Tensor = IDS, cu_seqlens: tuple[int, ...] = (0, 30)) -> Tensor:
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(cu_seqlens)])
    return model.logits(model(ids, positions, DenseContext(list(cu_seqlens))))


def quantize(source: Path, target: Path, scheme: Scheme, outliers: Outliers = "none", **settings: Any) -> Path:
    target.mkdir()
    statistics = calibrate(load(source), [IDS, IDS.flip(0)]) if outliers in ("smooth", "mixed") else None
    recipe = Recipe(scheme=scheme, outliers=outliers, **settings)
    convert(Checkpoint.open(source), target, recipe, statistics=statistics, calibration_tokens=2 * len(IDS))
    return target


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("case", ["llama-biases", "qwen3-bias-tied", "llama-mqa-tied"])
@pytest.mark.parametrize(("scheme", "outliers"), SCHEMES)
def test_an_int8_model_is_what_its_file_says(case: str, scheme: Scheme, outliers: Outliers, tmp_path: Path) -> None:
    """Against the file's numbers widened to float32 and an ordinary model with its inputs rounded."""
    save_tiny(tmp_path / "model", case)
    out = quantize(tmp_path / "model", tmp_path / "out", scheme, outliers)
    stored = logits(load(out))
    widened = widen(out, tmp_path / "widened")
    expected = logits(widened) if scheme == "w8a16" else logits_of_rounded_inputs(widened, out)
    # A value that is rounded the other way for the last bit's sake moves a logit of W8A8 a little.
    assert relative(stored, expected) < (1e-5 if scheme == "w8a16" else 2e-3)
    assert relative(stored, logits(load(tmp_path / "model"))) < 0.05
    torch.testing.assert_close(logits(load(out, fuse=True)), stored, rtol=0, atol=1e-5)


def stored_tensors(directory: Path) -> dict[str, Tensor]:
    return {name: one for path in directory.glob("*.safetensors") for name, one in load_file(path).items()}


def widen(directory: Path, target: Path) -> Decoder:
    """The same model with float32 weights, without our reader of int8."""
    tensors = stored_tensors(directory)
    for name in [name for name in tensors if name.endswith("weight_scale")]:
        stem, scale = name.removesuffix(".weight_scale"), tensors.pop(name)
        if (packed := tensors.pop(f"{stem}.weight_packed", None)) is not None:
            shape = tensors.pop(f"{stem}.weight_shape").tolist()
            words = torch.stack([packed >> shift & 255 for shift in (0, 8, 16, 24)], dim=-1)
            tensors[f"{stem}.weight"] = words.flatten(1)[:, : shape[1]] - 128
        tensors[f"{stem}.weight"] = tensors[f"{stem}.weight"] * scale
        columns = tensors.pop(f"{stem}.outlier_columns", torch.zeros(0)).long()
        if f"{stem}.outlier_weight" in tensors:
            tensors[f"{stem}.weight"][:, columns] = tensors.pop(f"{stem}.outlier_weight").float()
    config = json.loads((directory / "config.json").read_text())
    target.mkdir()
    kept = {name: value for name, value in config.items() if name not in ("quantization_config", "int8_outliers")}
    (target / "config.json").write_text(json.dumps(kept))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return load(target)


def logits_of_rounded_inputs(model: Decoder, directory: Path) -> Tensor:
    columns = {
        name.removeprefix("model.").removesuffix(".outlier_columns"): one.long()
        for name, one in stored_tensors(directory).items()
        if name.endswith("outlier_columns")
    }

    def rounding(name: str) -> Callable[[torch.nn.Module, tuple[Tensor, ...]], tuple[Tensor]]:
        def see(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
            kept = columns.get(name, torch.zeros(0, dtype=torch.long))
            x = inputs[0].clone()
            x[:, kept] = 0
            step = x.abs().amax(1, keepdim=True) / 127
            x = (x / step).round() * step
            x[:, kept] = inputs[0][:, kept]
            return (x,)

        return see

    for name in linear_names(model):
        model.get_submodule(name).register_forward_pre_hook(rounding(name))
    return logits(model)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16"])
@pytest.mark.parametrize("case", ["llama-biases", "llama-mqa-tied"])
def test_at_load_is_what_the_file_would_hold(case: str, scheme: Scheme, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", case)
    out = quantize(tmp_path / "model", tmp_path / "out", scheme)
    at_load = load(tmp_path / "model", quantize=scheme)
    assert torch.equal(logits(at_load), logits(load(out)))
    assert isinstance(at_load.lm_head, Int8Linear)
    assert isinstance(at_load.embed_tokens, torch.nn.Embedding)
    assert at_load.embed_tokens.weight.is_floating_point()


def test_gpt2_is_quantized_at_load_only(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "gpt2-tied")
    exact = logits(load(tmp_path / "model"))
    assert relative(logits(load(tmp_path / "model", quantize="w8a16")), exact) < 0.02
    with pytest.raises(ConfigError, match=r"gpt2: .*c_attn.weight is stored transposed"):
        quantize(tmp_path / "model", tmp_path / "out", "w8a16")


def test_skipped_layers_stay_and_are_not_joined_with_others(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "llama-mqa-tied")
    out = quantize(tmp_path / "model", tmp_path / "out", "w8a8", skip=("lm_head", "layers.1.self_attn.k_proj"))
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert config["quantization_config"]["ignore"] == ["model.layers.1.self_attn.k_proj", "lm_head"]
    model = load(out, fuse=True)
    assert isinstance(model.layers["0"].self_attn, FusedAttention)
    assert not isinstance(model.layers["1"].self_attn, FusedAttention)
    torch.testing.assert_close(logits(model), logits(load(out)), rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="skip: 'lm_haed' is no linear layer of this model"):
        quantize(tmp_path / "model", tmp_path / "again", "w8a8", skip=("lm_haed",))


def test_a_hundredfold_outliers_make_handling_matter(tmp_path: Path) -> None:
    save_with_outliers(tmp_path / "model")
    exact, statistics = logits(load(tmp_path / "model")), calibrate(load(tmp_path / "model"), [IDS, IDS.flip(0)])
    errors = {}
    for outliers in ("none", "clip", "mixed", "smooth"):
        out = tmp_path / outliers
        out.mkdir()
        recipe = Recipe(scheme="w8a8", outliers=outliers)
        convert(Checkpoint.open(tmp_path / "model"), out, recipe, statistics=statistics, calibration_tokens=60)
        errors[outliers] = relative(logits(load(out)), exact)
    # Clipping weights cannot help what the activations lose.
    assert errors["none"] > 1.05 * errors["clip"]
    assert errors["clip"] > 20 * errors["mixed"]
    assert errors["clip"] > 20 * errors["smooth"]
    assert max(errors["mixed"], errors["smooth"]) < 0.03


def test_clip_never_loses_to_absmax() -> None:
    weight = torch.randn(20, 300, generator=torch.Generator().manual_seed(0))
    weight[:10, 7] = 40.0
    energy = torch.rand(300, generator=torch.Generator().manual_seed(1))
    energy[7] = 1e-6

    def error(scale: Tensor, energy: Tensor) -> Tensor:
        return ((round_to_int8(weight, scale) * scale - weight).square() * energy).sum(1)

    for weights in (torch.ones(300), energy):
        clipped = error(clip_scale(weight, weights), weights)
        assert (clipped <= error(absmax_scale(weight), weights)).all()
    assert (clipped[:10] < 0.1 * error(absmax_scale(weight), energy)[:10]).all()


@pytest.mark.parametrize("length", [8, 13])
def test_packed_weights_come_back_in_any_slice(length: int, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "llama-gqa")
    out = quantize(tmp_path / "model", tmp_path / "out", "w8a16")
    checkpoint, name = Checkpoint.open(out), "layers.0.mlp.down_proj.weight"
    whole = checkpoint.read(name, (slice(0, 48), slice(0, 72)))
    assert whole.dtype == torch.int8
    part = checkpoint.read(name, (slice(3, 9), slice(5, 5 + length)))
    assert torch.equal(part, whole[3:9, 5 : 5 + length])
    weight = torch.randint(-127, 128, (4, length), dtype=torch.int8)
    packed = pack(weight).view(torch.uint8)[:, :length]
    assert torch.equal((packed.int() - 128).to(torch.int8), weight)


def test_shards_have_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayllm.quant.writer.MAX_SHARD_BYTES", 100)
    writer = ShardWriter(tmp_path)
    for name in ("a", "b", "c"):
        writer.add(name, torch.zeros(20))
    writer.close()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 240
    assert sorted(index["weight_map"]) == ["a", "b", "c"]
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / file)


# What can be wrong with an int8 directory, and the one line that says so.


@pytest.fixture
def int8(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "model", "llama-gqa")
    return quantize(tmp_path / "model", tmp_path / "out", "w8a8")


def edit(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


SCALE = "model.layers.1.mlp.up_proj.weight_scale"
WEIGHT = "model.layers.1.mlp.up_proj.weight"
NORM = "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(SCALE), f"tensor {SCALE} is missing"),
        (lambda tensors: tensors.update({SCALE: torch.ones(72)}), rf"tensor {SCALE} has shape \[72\]"),
        (lambda tensors: tensors.update({WEIGHT: torch.ones(72, 48)}), f"tensor {WEIGHT} has unsupported dtype F32"),
        (lambda tensors: tensors.update({"extra": torch.ones(1)}), "tensor extra is not part of"),
        (lambda tensors: tensors[SCALE].fill_(torch.nan), f"tensor {SCALE} holds NaN or infinity"),
        (lambda tensors: tensors[SCALE][-1].fill_(torch.inf), f"tensor {SCALE} holds NaN or infinity"),
        (lambda tensors: tensors[SCALE][0].neg_(), f"tensor {SCALE} holds a negative scale"),
        (lambda tensors: tensors[NORM][0].fill_(torch.nan), f"tensor {NORM} holds NaN or infinity"),
    ],
)
def test_damaged_tensors(int8: Path, change: Callable[[dict[str, Tensor]], object], message: str) -> None:
    edit(int8, change)
    with pytest.raises(CheckpointError, match=message):
        load(int8)


COLUMNS = "model.layers.1.mlp.up_proj.outlier_columns"
KEPT = "model.layers.1.mlp.up_proj.outlier_weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(COLUMNS), f"tensor {COLUMNS} is missing"),
        (lambda tensors: tensors.update({KEPT: torch.ones(72, 1)}), rf"tensor {KEPT} has shape \[72, 1\]"),
        (lambda tensors: tensors[KEPT][0].fill_(torch.nan), f"tensor {KEPT} holds NaN or infinity"),
        (lambda tensors: tensors[COLUMNS][-1].fill_(48), f"tensor {COLUMNS} is no rising list of columns below 48"),
        (lambda tensors: tensors[COLUMNS][0].fill_(-1), f"tensor {COLUMNS} is no rising list of columns below 48"),
        (lambda tensors: tensors[COLUMNS].fill_(5), f"tensor {COLUMNS} is no rising list of columns below 48"),
    ],
)
def test_damaged_outliers(change: Callable[[dict[str, Tensor]], object], message: str, tmp_path: Path) -> None:
    save_with_outliers(tmp_path / "model")
    out = quantize(tmp_path / "model", tmp_path / "out", "w8a8", "mixed")
    tensors = load_file(out / OUTLIERS)
    assert tensors[COLUMNS].tolist() == [5, 17]
    change(tensors)
    save_file(tensors, out / OUTLIERS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        load(out)


def test_a_lost_outliers_file_is_missed(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "llama-gqa")
    out = quantize(tmp_path / "model", tmp_path / "out", "w8a8", "mixed")
    (out / OUTLIERS).unlink()
    with pytest.raises(CheckpointError, match=rf"{OUTLIERS}: no such file, though config.json names it"):
        load(out)


def test_a_format_that_needs_outliers_wants_them_named(tmp_path: Path) -> None:
    save_with_outliers_on_the_way_out(tmp_path / "model")
    out = quantize(tmp_path / "model", tmp_path / "out", "w8a8", "mixed")
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["format"] == OWN_FORMAT
    del config[OUTLIERS_FIELD]
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=f"{OUTLIERS_FIELD} is missing, without which {OWN_FORMAT} cannot be read"):
        Checkpoint.open(out)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("quant_method",), "gptq", "quant_method: 'gptq' is not supported"),
        (("format",), "marlin-24", "format: 'marlin-24' is not supported"),
        (("config_groups", "group_0", "weights", "num_bits"), 4, "weights.num_bits: 4 is not supported"),
        (("config_groups", "group_0", "weights", "strategy"), "group", "weights.strategy: 'group' is not supported"),
        (("config_groups", "group_0", "input_activations", "dynamic"), False, "dynamic: False is not supported"),
        (("config_groups", "group_0", "targets"), "Linear", "targets: 'Linear' is not a list"),
        (("ignore",), ["re:("], "ignore: 're:[(]'"),
        (("kv_cache_scheme",), {"num_bits": 8}, "kv_cache_scheme"),
    ],
)
def test_unsupported_configurations(int8: Path, path: tuple[str, ...], value: object, message: str) -> None:
    config = json.loads((int8 / "config.json").read_text())
    place = config["quantization_config"]
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    (int8 / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message):
        Checkpoint.open(int8)


@pytest.mark.parametrize("name", [WEIGHT, NORM, EMBEDDING])
@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_weights_that_are_not_finite_are_refused(bad: float, name: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "llama-gqa")
    edit(tmp_path / "model", lambda tensors: tensors[name].view(-1)[7].fill_(bad))
    for action in (
        lambda: quantize(tmp_path / "model", tmp_path / "out", "w8a8"),
        lambda: load(tmp_path / "model", quantize="w8a8"),
        lambda: load(tmp_path / "model"),
    ):
        with pytest.raises(CheckpointError, match=f"tensor {name} holds NaN or infinity"):
            action()


def test_weights_that_the_dtype_cannot_hold_are_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama-gqa")
    edit(tmp_path, lambda tensors: tensors[NORM][3].fill_(1e5))
    with pytest.raises(CheckpointError, match=f"tensor {NORM} holds numbers too large for float16"):
        load_shard(Checkpoint.open(tmp_path), Mesh.single(), dtype=torch.float16, device=CPU)


def test_a_norm_that_takes_over_more_than_its_dtype_holds(tmp_path: Path) -> None:
    """Its weight becomes the larger the smaller the columns behind it are made."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor.half()
        for part in "qkv":
            tensors[f"model.layers.0.self_attn.{part}_proj.weight"][:, 5] *= 5000
        tensors["model.layers.0.input_layernorm.weight"][5] = 30
        tensors[EMBEDDING][:, 5] *= 1e-3

    save_tiny(tmp_path / "model", "llama-gqa")
    edit(tmp_path / "model", change)
    message = "tensor model.layers.0.input_layernorm.weight, made larger .* exceeds float16"
    with pytest.raises(CheckpointError, match=message):
        quantize(tmp_path / "model", tmp_path / "out", "w8a8", "mixed")


@pytest.mark.parametrize(("times", "energy", "factor"), [(300.0, 1.0, 1 / 16), (0.01, 1e6, 128.0), (3.5, 100.0, 1.0)])
def test_columns_are_evened_out_if_int8_gains(times: float, energy: float, factor: float, tmp_path: Path) -> None:
    """Against the outputs of inputs with these mean squares, as who knows of no outliers computes them."""
    save_tiny(tmp_path, "llama-mqa-tied")
    generator = torch.Generator().manual_seed(0)
    spec, weight_NK = Checkpoint.open(tmp_path).spec, torch.randn(64, 48, generator=generator)
    weight_NK[:, 5] *= times
    energy_K = torch.ones(48).index_fill(0, torch.tensor([5]), energy)
    x_RK = torch.randn(512, 48, generator=generator) * energy_K.sqrt()

    def error(factors_K: Tensor) -> float:
        scale_N1 = absmax_scale(weight_NK * factors_K)
        stored_NK = round_to_int8(weight_NK * factors_K, scale_N1) * scale_N1
        return float(((x_RK / factors_K) @ stored_NK.T - x_RK @ weight_NK.T).square().sum())

    names = [f"layers.0.self_attn.{part}_proj" for part in "qkv"]
    columns, energies = dict.fromkeys(names, torch.tensor([5])), dict.fromkeys(names, energy_K)
    found_K = even_out(spec, columns, lambda name: weight_NK, energies, head=False).rows["layers.0.input_layernorm"]
    assert float(found_K[5]) == factor
    assert (found_K == 1).sum() == 48 - (factor != 1)
    for other in (1 / 256, 1 / 16, 1 / 4, 1.0, 8.0, 128.0):
        assert error(found_K) <= 1.05 * error(torch.ones(48).index_fill(0, torch.tensor([5]), other)), other


# Several ranks.


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    ranks = Ranks(3)
    yield ranks
    ranks.close()


# Of the model, so that the slices of three ranks are such as the compiled loops take, and such as only torch does.
SIZES: dict[str, dict[str, int]] = {
    "llama-biases": {"hidden_size": 192, "intermediate_size": 384},
    "llama-mqa-tied": {},
}


SHORT = tuple(range(0, 31, 5))  # six sequences of five tokens


def run_ranks(
    ranks: Ranks, directory: Path, scheme: Scheme | None, ids: Tensor = IDS, cu_seqlens: tuple[int, ...] = SHORT
) -> Tensor:
    arguments = (directory, 3, 1, ids, list(cu_seqlens), torch.float32, True, scheme)
    [found] = [one.logits_TV for one in ranks.run(3, sharded_forward.forward, *arguments) if one.logits_TV is not None]
    return found


@pytest.mark.parametrize("case", SIZES)
@pytest.mark.parametrize(
    ("scheme", "outliers"), [("w8a16", "none"), ("w8a8", "none"), ("w8a8", "smooth"), ("w8a8", "mixed")]
)
def test_three_ranks_answer_as_one(ranks: Ranks, case: str, scheme: Scheme, outliers: Outliers, tmp_path: Path) -> None:
    """W8A8 to the bit: integers are added before they are scaled, and columns in 16 bits are multiplied as one rank
    does it. The head's columns in 16 bits are torch's product here, which rounds by how many outputs a rank has (101 is
    no multiple of 16), and so is SiLU where slices are no multiple of 16: its last lanes are rounded otherwise. Of
    W8A16 three float32 terms of a sum come in another order."""
    save_tiny(tmp_path / "model", case, **SIZES[case])
    out = quantize(tmp_path / "model", tmp_path / "out", scheme, outliers)
    alone = load(out)
    pairs = [(run_ranks(ranks, out, None), alone)]
    if outliers == "none":
        pairs.append((run_ranks(ranks, tmp_path / "model", scheme), load(tmp_path / "model", quantize=scheme)))
    by_torch = outliers == "mixed" or case == "llama-mqa-tied"
    for split, model in pairs:
        off_T = (split - logits(model, cu_seqlens=SHORT)).abs().amax(1)
        bound = 1e-4 if scheme == "w8a16" else 2e-6 if by_torch else 0
        assert off_T.max() <= bound, off_T
    ids = IDS[:10]
    for _ in range(6):
        token = run_ranks(ranks, out, None, ids, (0, len(ids)))[-1].argmax()
        assert token == logits(alone, ids, (0, len(ids)))[-1].argmax()
        ids = torch.cat([ids, token[None]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 33])
def test_a_row_split_layer_rounds_as_one_rank_would(ranks: Ranks, rows: int, dtype: torch.dtype) -> None:
    """The slices differ in size and in their outlier columns, and a NaN in one of them spoils the row for all."""
    x = torch.randn(rows + 1, 384, generator=torch.Generator().manual_seed(rows)).to(dtype)
    x[:, :128] *= 0.1
    x[:, 256:] *= 10
    x[rows, 5] = torch.nan
    weight = torch.randn(64, 384, generator=torch.Generator().manual_seed(1))
    whole = Int8Linear(384, 64, scheme="w8a8", bias=False, outliers=True)
    scale = absmax_scale(weight)
    whole.set_weight(round_to_int8(weight, scale), scale)
    columns = torch.tensor([7, 130, 131, 140, 260], dtype=torch.int32)
    whole.set_outliers(columns, weight[:, columns].bfloat16())
    x[:, columns] *= 100
    with torch.inference_mode():
        expected = whole(x)
    for found in ranks.run(3, sharded_forward.w8a8_row_parallel, x, whole):
        assert not found[rows].isfinite().any()
        assert torch.equal(found[:rows], expected[:rows])
