"""A checkpoint -> the same model with int8 linear layers, as a Hugging Face directory in the compressed-tensors layout.

Reads one parameter at a time, to look and to convert, and together those that share an input. What it needs besides
(statistics of activations) comes from `calibrate`, which needs the model itself. Letters: N outputs, K inputs.
"""

import difflib
import fnmatch
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rayllm.core.errors import CheckpointError, ConfigError
from rayllm.models.checkpoint import INDEX, WEIGHTS, Checkpoint
from rayllm.models.decoder import Decoder
from rayllm.models.manifest import MANIFEST
from rayllm.models.quantization import OUTLIERS, OUTLIERS_FIELD, Int8Format, Scheme, stored_format, write_quantization
from rayllm.quant.calibrate import InputStatistics
from rayllm.quant.int8_linear import linear_names
from rayllm.quant.outliers import even_out, shared_columns
from rayllm.quant.ranges import absmax_scale, clip_scale, relative_error, round_to_int8
from rayllm.quant.smooth import Folds, smoothing
from rayllm.quant.writer import ShardWriter, pack

Outliers = Literal["none", "clip", "smooth", "mixed"]
# The ranges of a layer may widen by half, on average, to hold its outlier columns for other readers too. Those of
# SmolLM2-135M widen by 17 to 21 % in one layer and by a few % at most in others, as the calibration has it.
_MOST_WIDENED = 1.5
_WEIGHT_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".npz"}
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """`skip`: layers that stay as they are; shell patterns against our name, the stored name, or the last part."""

    scheme: Scheme
    outliers: Outliers = "none"
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.outliers == "mixed" and self.scheme != "w8a8":
            raise ConfigError(f"outliers: {self.outliers} is about int8 activations: {self.scheme} has none")

    @property
    def needs_calibration(self) -> bool:
        return self.outliers == "smooth"

    @property
    def stored_format(self) -> Int8Format:
        return stored_format(self.scheme, outliers=self.outliers == "mixed")

    def skips(self, layer: str, stored: str) -> bool:
        names = (layer, stored, layer.rpartition(".")[2])
        return any(fnmatch.fnmatch(name, one) for one in self.skip for name in names)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerReport:
    """`error` is relative, root mean square: of outputs where there was a calibration, else of weights.

    `range` is the largest absolute weight, `kept_range` the largest that int8 can still hold. `needs_outliers`: what
    int8 holds of the outlier columns is cut, and is of use only with the 16 bits beside it.
    """

    name: str
    error: float
    range: float
    kept_range: float
    outlier_columns: int
    needs_outliers: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    recipe: Recipe
    bytes_before: int
    bytes_after: int
    calibration_tokens: int
    layers: list[LayerReport] = field(default_factory=list)


def quantized_layers(checkpoint: Checkpoint, recipe: Recipe) -> list[str]:
    """Raises ConfigError where the layout has no place for a layer, or `skip` names none."""
    with torch.device("meta"):
        layers = linear_names(Decoder(checkpoint.spec))
    if checkpoint.int8:
        raise ConfigError(f"{checkpoint.directory} is an int8 checkpoint already")
    stored = {layer: _stored_name(checkpoint, f"{layer}.weight").removesuffix(".weight") for layer in layers}
    for one in recipe.skip:
        if not any(replace(recipe, skip=(one,)).skips(layer, stored[layer]) for layer in layers):
            known = dict.fromkeys([*(layer.rpartition(".")[2] for layer in layers), *layers, *stored.values()])
            near = ", ".join(difflib.get_close_matches(one, known, n=3, cutoff=0.0))
            raise ConfigError(f"skip: {one!r} is no linear layer of this model; near it are {near}")
    chosen = [layer for layer in layers if not recipe.skips(layer, stored[layer])]
    for layer in chosen:
        source = checkpoint.source(f"{layer}.weight")
        if source.transposed or source.parts > 1:
            raise ConfigError(
                f"{checkpoint.spec.family}: {source.name} is stored transposed, which the int8 layout cannot hold;"
                " serve the model with --quantize instead"
            )
    if not chosen:
        raise ConfigError("skip: leaves no layer to quantize")
    return chosen


def convert(
    checkpoint: Checkpoint,
    directory: Path,
    recipe: Recipe,
    *,
    statistics: Mapping[str, InputStatistics] | None = None,
    calibration_tokens: int = 0,
    advance: Callable[[int], None] = lambda layers: None,
) -> Report:
    """Fills the empty `directory`. `advance` counts the layers of `quantized_layers`, twice each.

    Raises CheckpointError for a weight that is not finite, or would not be where it takes over what outliers lose.
    """

    def read_weight(layer: str) -> Tensor:
        return _read(checkpoint, f"{layer}.weight")

    layers = quantized_layers(checkpoint, recipe)
    largest = {}
    for layer in layers:
        largest[layer] = read_weight(layer).abs().amax(dim=0).float()
        advance(1)
    folds, columns = Folds(), dict[str, Tensor]()
    head = "lm_head" in layers or not checkpoint.spec.tie_word_embeddings
    if recipe.outliers == "smooth":
        assert statistics is not None
        folds = smoothing(checkpoint.spec, recipe.scheme, statistics, read_weight, head=head)
    elif recipe.outliers == "mixed":
        seen = {layer: [statistics[layer].largest_K] if statistics else [] for layer in layers}
        columns = shared_columns(checkpoint.spec, {layer: [*seen[layer], largest[layer]] for layer in layers})
        energies = {layer: one.energy_K for layer, one in statistics.items()} if statistics else {}
        folds = even_out(checkpoint.spec, columns, read_weight, energies, head=head)
    writer = ShardWriter(directory)
    reports = []
    for name, tensor in _other_parameters(checkpoint, set(layers), folds):
        writer.add(name, tensor)
    for layer in layers:
        energy_K = statistics[layer].energy_K if statistics else None
        reports.append(_convert_layer(checkpoint, layer, recipe, folds, columns.get(layer), energy_K, writer))
        advance(1)
    writer.close()
    _write_config(checkpoint, directory, recipe, reports)
    _copy_others(checkpoint.directory, directory)
    return Report(
        recipe=recipe,
        bytes_before=_weight_bytes(checkpoint.directory),
        bytes_after=_weight_bytes(directory),
        calibration_tokens=calibration_tokens,
        layers=reports,
    )


def _convert_layer(
    checkpoint: Checkpoint,
    layer: str,
    recipe: Recipe,
    folds: Folds,
    columns_J: Tensor | None,
    energy_K: Tensor | None,
    writer: ShardWriter,
) -> LayerReport:
    exact_NK = folds.apply(layer, _read(checkpoint, f"{layer}.weight")).float()
    if energy_K is not None and layer in folds.columns:
        energy_K = energy_K / folds.columns[layer].square()
    ranged_NK, judged_K = exact_NK, energy_K
    if columns_J is not None:
        ranged_NK = exact_NK.index_fill(1, columns_J.long(), 0)
        judged_K = None if energy_K is None else energy_K.index_fill(0, columns_J.long(), 0)
    scale_N1 = clip_scale(ranged_NK, judged_K) if recipe.outliers in ("clip", "smooth") else absmax_scale(ranged_NK)
    needs_outliers = False
    if columns_J is not None:
        whole_N1 = absmax_scale(exact_NK)
        needs_outliers = float((whole_N1 / scale_N1).mean()) > _MOST_WIDENED
        scale_N1 = scale_N1 if needs_outliers else whole_N1
    q_NK = round_to_int8(exact_NK, scale_N1)
    stored_NK = q_NK * scale_N1
    stem = _stored_name(checkpoint, f"{layer}.weight").removesuffix(".weight")
    if columns_J is not None:
        kept_NJ = exact_NK[:, columns_J.long()].to(torch.bfloat16)
        stored_NK[:, columns_J.long()] = kept_NJ.float()
        writer.add_outlier(f"{stem}.outlier_columns", columns_J)
        writer.add_outlier(f"{stem}.outlier_weight", kept_NJ)
    if recipe.stored_format.packed:
        writer.add(f"{stem}.weight_packed", pack(q_NK))
        writer.add(f"{stem}.weight_shape", torch.tensor(q_NK.shape))
    else:
        writer.add(f"{stem}.weight", q_NK)
    writer.add(f"{stem}.weight_scale", scale_N1)
    return LayerReport(
        name=layer,
        error=relative_error(exact_NK, stored_NK, energy_K),
        range=float(exact_NK.abs().max()),
        kept_range=float(scale_N1.max()) * 127,
        outlier_columns=0 if columns_J is None else len(columns_J),
        needs_outliers=needs_outliers,
    )


def check_weights(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError for the first that is not finite, before a model is run that could only be blamed on its
    inputs."""
    for name in _stored_once(checkpoint):
        _read(checkpoint, name)


def _read(checkpoint: Checkpoint, parameter: str) -> Tensor:
    whole = tuple(slice(0, size) for size in checkpoint.shape(parameter))
    tensor = checkpoint.read(parameter, whole)
    if not tensor.isfinite().all():
        name = checkpoint.source(parameter).name
        raise CheckpointError(checkpoint.directory, f"tensor {name} holds NaN or infinity")
    return tensor


def _stored_name(checkpoint: Checkpoint, parameter: str) -> str:
    """A tied head that becomes int8 gets a name of its own."""
    return "lm_head.weight" if parameter == "lm_head.weight" else checkpoint.source(parameter).name


def _stored_once(checkpoint: Checkpoint) -> Iterator[str]:
    """Our name of each stored tensor that is a parameter."""
    seen = set()
    for name in checkpoint.parameters:
        source = checkpoint.source(name)
        if source not in seen:
            seen.add(source)
            yield name


def _other_parameters(checkpoint: Checkpoint, layers: set[str], folds: Folds) -> Iterator[tuple[str, Tensor]]:
    """What stays in its dtype, under its own name; biases of int8 layers among it."""
    for name in _stored_once(checkpoint):
        module, _, kind = name.rpartition(".")
        if module not in layers or kind != "weight":
            parameter, stored = _read(checkpoint, name), checkpoint.source(name).name
            folded = folds.apply(module, parameter).to(parameter.dtype)
            if not folded.isfinite().all():
                dtype = str(folded.dtype).removeprefix("torch.")
                problem = f"tensor {stored}, made larger for int8 weights that are more even, exceeds {dtype}"
                raise CheckpointError(checkpoint.directory, f"{problem}; outliers `clip` leaves it as it is")
            yield stored, folded


def _weight_bytes(directory: Path) -> int:
    """Of the files that a model is read from; the same weights may lie beside them in other forms."""
    names = {WEIGHTS}
    if not (directory / WEIGHTS).exists():
        names = set(json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    return sum((directory / name).stat().st_size for name in names | {OUTLIERS} if (directory / name).exists())


def _write_config(checkpoint: Checkpoint, directory: Path, recipe: Recipe, reports: Sequence[LayerReport]) -> None:
    layers = {report.name for report in reports}
    with torch.device("meta"):
        every = linear_names(Decoder(checkpoint.spec))
    tied_head = checkpoint.spec.tie_word_embeddings and "lm_head" not in layers
    ignore = [
        "lm_head"
        if tied_head and layer == "lm_head"
        else _stored_name(checkpoint, f"{layer}.weight").removesuffix(".weight")
        for layer in every
        if layer not in layers
    ]
    config: dict[str, Any] = dict(checkpoint.config)
    config["quantization_config"] = write_quantization(
        recipe.stored_format, ignore=ignore, needs_outliers=any(report.needs_outliers for report in reports)
    )
    if checkpoint.spec.tie_word_embeddings and "lm_head" in layers:
        config["tie_word_embeddings"] = False
    if recipe.outliers == "mixed":
        config[OUTLIERS_FIELD] = OUTLIERS
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _copy_others(source: Path, directory: Path) -> None:
    """Tokenizer, templates, generation configuration, licence: all files but weights in any form, and what training
    leaves beside them, which is true of those weights alone."""
    for path in sorted(source.iterdir()):
        weights = path.suffix in _WEIGHT_SUFFIXES or path.name.endswith(".index.json")
        own = path.name in ("config.json", MANIFEST, "state.json")
        if path.is_file() and not weights and not own and not path.name.startswith("."):
            shutil.copyfile(path, directory / path.name)
