"""A Hugging Face directory: config.json and safetensors, checked whole before a weight is read.

Only the headers of the weight files are read by `Checkpoint.open`; `read` then reads one part of one parameter. Never
unpickles. Knows nothing of ranks.

A reward model is a decoder with `SCORE` in the place of its head, as transformers writes a sequence classifier.

A linear layer X that is stored as int8 (`rayllm.models.quantization`) has X.weight in int8 and X.weight_scale beside
it, and in a checkpoint with outliers X.outlier_columns and X.outlier_weight.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rayllm.core.errors import CheckpointError, ConfigError
from rayllm.models.decoder import Decoder
from rayllm.models.families import spec_from_config, weight_names
from rayllm.models.layers import Linear
from rayllm.models.quantization import OUTLIERS, OUTLIERS_FIELD, Int8Format, Quantization, read_quantization
from rayllm.models.spec import DecoderSpec
from rayllm.models.weights import Source, WeightNames

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
STORED_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
WEIGHTS = "model.safetensors"
SCORE = "score.weight"  # [1, D]
INDEX = "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class _Slice(Protocol):
    def get_shape(self) -> list[int]: ...
    def get_dtype(self) -> str: ...
    def __getitem__(self, index: tuple[slice, ...]) -> Tensor: ...


class _File(Protocol):
    def keys(self) -> list[str]: ...
    def get_slice(self, name: str) -> _Slice: ...


class _Held:
    """Tensors in memory, read as a file's are."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def keys(self) -> list[str]:
        return list(self._tensors)

    def get_slice(self, name: str) -> "_HeldSlice":
        return _HeldSlice(self._tensors[name])


class _HeldSlice:
    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        return next(name for name, dtype in STORED_DTYPES.items() if dtype == self._tensor.dtype)

    def __getitem__(self, index: tuple[slice, ...]) -> Tensor:
        return self._tensor[index]


_Parameters = dict[str, tuple[Source, tuple[int, ...]]]  # our name -> where it lies, and its whole shape


class Checkpoint:
    """`config` is the raw config.json; `dtype` the one that it names (else that of the stored embedding).

    `int8`: the linear layers that are stored as int8, and how.
    """

    def __init__(
        self,
        directory: Path,
        config: Mapping[str, Any],
        spec: DecoderSpec,
        dtype: torch.dtype,
        files: Mapping[str, _File],
        parameters: _Parameters,
        int8: Mapping[str, Int8Format],
    ) -> None:
        self.directory = directory
        self.config = config
        self.spec = spec
        self.dtype = dtype
        self._files = files  # stored tensor -> the file that holds it
        self._parameters = parameters
        self.int8 = int8

    @classmethod
    def held(cls, directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Checkpoint":
        """Of weights in memory, whole and of one dtype, by their names in the decoder; a tied head is left out.

        `directory`: where `config` and the tokenizer come from.
        """
        spec = spec_from_config(config)
        parameters = {name: (Source(name), tuple(tensor.shape)) for name, tensor in tensors.items()}
        if spec.tie_word_embeddings:
            parameters["lm_head.weight"] = parameters["embed_tokens.weight"]
        dtype = tensors["embed_tokens.weight"].dtype
        return cls(directory, config, spec, dtype, dict.fromkeys(tensors, _Held(tensors)), parameters, {})

    @classmethod
    def open(cls, directory: str | Path, *, scores: bool = False) -> "Checkpoint":
        """`scores`: of a reward model, else of a language model.

        Raises CheckpointError (file and problem) or ConfigError (a value of config.json that is not supported).
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise CheckpointError(
                directory, "is a file, not a directory" if directory.exists() else "no such directory"
            )
        config = _read_json(directory / "config.json")
        _check_purpose(directory, config, scores=scores)
        spec = spec_from_config(config)
        origin, files = _open_weights(directory)
        quantization = read_quantization(config)
        if quantization is not None and quantization.has_outliers:
            files |= _open_outliers(directory, config[OUTLIERS_FIELD])
        parameters, int8 = _match(spec, quantization, origin, files, scores=scores)
        embedding = parameters["embed_tokens.weight"][0].name
        dtype = _dtype(config, files[embedding].get_slice(embedding).get_dtype())
        return cls(directory, config, spec, dtype, files, parameters, int8)

    def source(self, parameter: str) -> Source:
        """Where a parameter of `Decoder.named_parameters()` lies; of a reward model `SCORE` is one."""
        return self._parameters[parameter][0]

    @property
    def parameters(self) -> Iterable[str]:
        """The names of all parameters, as `read` takes them; of a tied head too."""
        return self._parameters

    @property
    def has_outliers(self) -> bool:
        return OUTLIERS_FIELD in self.config

    def shape(self, parameter: str) -> tuple[int, ...]:
        """Its whole shape."""
        return self._parameters[parameter][1]

    def read(self, parameter: str, index: tuple[slice, ...]) -> Tensor:
        """The part `index` (a start and a stop for every dimension) of one parameter, in the dtype it is stored in.

        May be a view of the mapped file: copy before keeping it.
        """
        source, shape = self._parameters[parameter]
        stored = self._files[source.name].get_slice(source.name)
        module, _, kind = parameter.rpartition(".")
        if kind == "weight" and module in self.int8 and self.int8[module].packed:
            return _unpack(stored, index)
        part = stored[source.stored_index(shape, index)]
        return part.t() if source.transposed and part.dim() == 2 else part


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(path, "no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(path, f"is not valid JSON: {error}") from None
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}") from None
    if not isinstance(value, dict):
        raise CheckpointError(path, f"must hold a JSON object, not {type(value).__name__}")
    return value


def _check_purpose(directory: Path, config: Mapping[str, Any], *, scores: bool) -> None:
    """The tensors do not tell: with a tied head, a classifier has all that a language model has."""
    names = [str(name) for name in config.get("architectures") or ()]
    classifier = next((name for name in names if name.endswith("ForSequenceClassification")), None)
    if scores and classifier is None:
        raise CheckpointError(directory, f"is no reward model, but {names[0] if names else 'a language model'}")
    if not scores and classifier is not None:
        raise CheckpointError(
            directory, f"is a reward model or another classifier ({classifier}), which writes no text"
        )


def _open_weights(directory: Path) -> tuple[Path, dict[str, "_File"]]:
    """-> the file that lists the tensors, for messages; every tensor's open file."""
    single, index = directory / WEIGHTS, directory / INDEX
    if single.exists():
        file = _open_file(single)
        return single, dict.fromkeys(file.keys(), file)
    if index.exists():
        return index, _open_shards(index)
    pickled = sorted(path.name for pattern in PICKLED for path in directory.glob(pattern))
    if pickled:
        raise CheckpointError(
            directory / pickled[0], f"pickled weights are not loaded, they can run code: convert them to {WEIGHTS}"
        )
    raise CheckpointError(directory, f"holds neither {WEIGHTS} nor {INDEX}")


def _open_shards(index: Path) -> dict[str, "_File"]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(index, "has no weight_map")
    shards: dict[str, _File] = {}
    for file_name in weight_map.values():
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise CheckpointError(index, f"weight_map names {file_name!r}, which is not a file name")
        if file_name not in shards:
            path = index.parent / file_name
            if not path.exists():
                raise CheckpointError(index, f"names {file_name}, which does not exist")
            shards[file_name] = _open_file(path)
    held = {file_name: set(file.keys()) for file_name, file in shards.items()}
    for name, file_name in weight_map.items():
        if name not in held[file_name]:
            raise CheckpointError(index.parent / file_name, f"tensor {name} is missing, though {index.name} names it")
    return {name: shards[file_name] for name, file_name in weight_map.items()}


def _open_file(path: Path) -> _File:
    try:
        return cast(_File, safe_open(path, framework="pt"))
    except SafetensorError as error:
        with path.open("rb") as file:
            start = file.read(16)
        if start.startswith((b"PK\x03\x04", b"\x80")):
            raise CheckpointError(path, "is a pickle, not a safetensors file") from None
        if start.startswith(b"version https://"):
            raise CheckpointError(path, "is a Git LFS pointer, not the file itself") from None
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise CheckpointError(path, f"is truncated or damaged: {reason}") from None
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error}") from None


def _open_outliers(directory: Path, name: object) -> dict[str, "_File"]:
    if name != OUTLIERS:
        raise ConfigError(f"config.json: {OUTLIERS_FIELD}: {name!r} is not supported (supported: {OUTLIERS})")
    if not (directory / OUTLIERS).exists():
        raise CheckpointError(directory / OUTLIERS, f"no such file, though config.json names it as {OUTLIERS_FIELD}")
    file = _open_file(directory / OUTLIERS)
    return dict.fromkeys(file.keys(), file)


def _unpack(stored: _Slice, index: tuple[slice, ...]) -> Tensor:
    """The part `index` of int8 [N, K] that lies four to an int32, each plus 128, the first in the lowest byte."""
    rows, columns = index
    first = columns.start // 4
    packed = stored[rows, slice(first, -(-columns.stop // 4))]
    whole = packed.contiguous().view(torch.uint8) ^ 0x80
    return whole.view(torch.int8)[:, columns.start - 4 * first : columns.stop - 4 * first]


def _match(
    spec: DecoderSpec, quantization: Quantization | None, origin: Path, files: Mapping[str, _File], *, scores: bool
) -> tuple[_Parameters, dict[str, Int8Format]]:
    """Every parameter of the decoder to its tensor; raises unless all are there, in shape, and nothing else is."""
    if scores:
        spec = replace(spec, tie_word_embeddings=False)
    with torch.device("meta"):
        model = Decoder(spec)
        if scores:
            model.lm_head = None
            model.score = Linear(spec.hidden_size, 1, bias=False)
    names = weight_names(spec.family)
    parameters: _Parameters = {}
    int8: dict[str, Int8Format] = {}
    used: set[str] = set()
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shape = tuple(parameter.shape)
        source = Source(SCORE) if name == SCORE else names.locate(name, tied=spec.tie_word_embeddings, stored=files)
        module = name.removesuffix(".weight")
        form = None
        if module in linears and quantization is not None:
            form = _int8_format(module, source, spec, quantization)
        if form is None or quantization is None:
            _check_tensor(origin, files, source.name, source.stored_shape(shape), tuple(STORED_DTYPES))
            parameters[name] = (source, shape)
        else:
            int8[module] = form
            found = _match_int8(module, source, shape, form, origin, files, outliers=quantization.has_outliers)
            parameters |= found
            used.add(f"{source.name}_shape")
    used |= {source.name for source, _ in parameters.values()}
    _check_unused(set(files) - used, names, spec, origin)
    if spec.tie_word_embeddings:
        _check_tied(origin, files, parameters["embed_tokens.weight"][0])
    return parameters, int8


def _int8_format(module: str, source: Source, spec: DecoderSpec, quantization: Quantization) -> Int8Format | None:
    if module == "lm_head" and spec.tie_word_embeddings:
        return None  # it is the embedding
    form = quantization.of(source.name.removesuffix(".weight"))
    if form is not None and (source.transposed or source.parts > 1):
        raise ConfigError(
            f"config.json: quantization_config: int8 {spec.family} layers are not supported: {source.name}"
        )
    return form


def _match_int8(
    module: str,
    source: Source,
    shape: tuple[int, ...],
    form: Int8Format,
    origin: Path,
    files: Mapping[str, _File],
    *,
    outliers: bool,
) -> _Parameters:
    outputs, inputs = shape
    stored = source.name.removesuffix(".weight")
    weight = f"{stored}.weight_packed" if form.packed else f"{stored}.weight"
    _check_tensor(origin, files, f"{stored}.weight_scale", (outputs, 1), ("F32", "BF16", "F16"))
    if form.packed:
        _check_tensor(origin, files, weight, (outputs, -(-inputs // 4)), ("I32",))
    else:
        _check_tensor(origin, files, weight, shape, ("I8",))
    found: _Parameters = {
        f"{module}.weight": (Source(weight), shape),
        f"{module}.weight_scale": (Source(f"{stored}.weight_scale"), (outputs, 1)),
    }
    if outliers:
        columns = f"{stored}.outlier_columns"
        if columns not in files:
            raise CheckpointError(origin.parent / OUTLIERS, f"tensor {columns} is missing")
        count = files[columns].get_slice(columns).get_shape()
        _check_tensor(origin, files, columns, tuple(count[:1]), ("I32",))
        _check_tensor(origin, files, f"{stored}.outlier_weight", (outputs, *count), tuple(STORED_DTYPES))
        found[f"{module}.outlier_columns"] = (Source(columns), tuple(count))
        found[f"{module}.outlier_weight"] = (Source(f"{stored}.outlier_weight"), (outputs, *count))
    return found


def _check_tensor(
    origin: Path, files: Mapping[str, _File], name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]
) -> None:
    if name not in files:
        raise CheckpointError(origin, f"tensor {name} is missing")
    stored = files[name].get_slice(name)
    if tuple(stored.get_shape()) != shape:
        raise CheckpointError(
            origin, f"tensor {name} has shape {stored.get_shape()}, config.json asks for {list(shape)}"
        )
    if stored.get_dtype() not in dtypes:
        raise CheckpointError(origin, f"tensor {name} has unsupported dtype {stored.get_dtype()}")


def _check_unused(unused: set[str], names: WeightNames, spec: DecoderSpec, origin: Path) -> None:
    for name in sorted(unused):
        if not names.is_ignored(name) and not (name == "lm_head.weight" and spec.tie_word_embeddings):
            raise CheckpointError(origin, f"tensor {name} is not part of a {spec.family} model with this config.json")


def _check_tied(origin: Path, files: Mapping[str, _File], embedding: Source) -> None:
    """A head stored beside the embedding that it is tied to must equal it, else config.json and weights disagree."""
    if embedding.name == "lm_head.weight" or "lm_head.weight" not in files:
        return
    stored = [files[name].get_slice(name) for name in (embedding.name, "lm_head.weight")]
    whole = tuple(slice(0, size) for size in stored[0].get_shape())
    if stored[0].get_shape() != stored[1].get_shape() or not torch.equal(stored[0][whole], stored[1][whole]):
        raise CheckpointError(
            origin, f"tensor lm_head.weight differs from {embedding.name}, but config.json has tie_word_embeddings true"
        )


def _dtype(config: Mapping[str, Any], stored: str) -> torch.dtype:
    """transformers 5 writes `dtype`, older ones `torch_dtype`; without either it is what the weights have, `stored`."""
    for field in ("dtype", "torch_dtype"):
        if (name := config.get(field)) is not None:
            if name not in DTYPES:
                raise ConfigError(f"config.json: {field}: {name!r} is not supported (supported: {', '.join(DTYPES)})")
            return DTYPES[name]
    return torch.float32 if stored == "F64" else STORED_DTYPES[stored]
