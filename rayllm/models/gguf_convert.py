"""A .gguf file -> a Hugging Face directory: weights and configuration here, the tokenizer by transformers."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, GGUFValueType, ReaderTensor
from tokenizers import pre_tokenizers
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerFast

from rayllm.core.errors import CheckpointError
from rayllm.models import gguf_config, gguf_weights

logger = logging.getLogger(__name__)

# Part of a cached directory's name: raise it when the same file converts to something else.
CONVERTER_VERSION = 1

# llama.cpp's names of byte-level pre-tokenizers that transformers' GGUF reader takes for GPT-2's own.
_GPT2_PRE_TOKENIZERS = ("gpt-2", "phi-2", "olmo")
_DIGIT_PRE_TOKENIZERS = ("smollm", "starcoder", "refact", "command-r", "codeshell")
_LLAMA3_PRE_TOKENIZERS = ("llama3", "llama-v3", "llama-bpe")


def convert(path: Path, directory: Path, *, progress: Callable[[float], None] = lambda _: None) -> None:
    """Fills the empty `directory`. CheckpointError names `path` and what is wrong with it.

    float32 and float16 files keep their dtype, everything else becomes bfloat16. `progress` gets 0..1.
    """
    reader = _read(path)
    metadata = {key: _value(reader, key) for key, field in reader.fields.items() if field.types}
    try:
        if metadata.get("split.count", 1) > 1:
            raise ValueError("is one part of a split model; merge the parts with llama.cpp's gguf-split first")
        tensors, rope_freqs = _model_tensors(reader)
        config = gguf_config.transformers_config(
            metadata,
            vocab_size=_vocab_size(tensors),
            tied="output.weight" not in tensors,
            biases=frozenset(
                name.removeprefix("blk.0.").removesuffix(".bias")
                for name in tensors
                if name.startswith("blk.0.") and name.endswith(".bias")
            ),
            rope_freqs=rope_freqs,
        )
        dtype = gguf_weights.storage_dtype(list(tensors.values()))
        _write_config(directory, config, metadata, dtype)
        _write_tokenizer(path, directory, config, metadata)
        gguf_weights.write_safetensors(directory, list(tensors.values()), config, dtype=dtype, progress=progress)
    except (ValueError, NotImplementedError) as error:
        raise CheckpointError(path, str(error)) from error


def _read(path: Path) -> GGUFReader:
    try:
        return GGUFReader(path)
    except OSError as error:
        raise CheckpointError(path, error.strerror or "cannot be read") from error
    except (ValueError, KeyError, IndexError, OverflowError) as error:
        raise CheckpointError(path, f"is not a complete GGUF file ({error})") from error


def _value(reader: GGUFReader, key: str) -> Any:
    """Scalars and strings; of a list, its length: the vocabulary is the tokenizer's to read."""
    field = reader.fields[key]
    if field.types[0] == GGUFValueType.ARRAY:
        return len(field.data)
    if field.types[0] == GGUFValueType.FLOAT32:
        return float(str(np.float32(field.contents())))  # 1e-05 as it was written, not 9.999999747378752e-06
    return field.contents()


def _model_tensors(reader: GGUFReader) -> tuple[dict[str, ReaderTensor], np.ndarray | None]:
    """The tensors by name, without what a Hugging Face checkpoint does not store, and llama3's rope divisors."""
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    rope_freqs = tensors.pop("rope_freqs.weight", None)
    output, embedding = tensors.get("output.weight"), tensors.get("token_embd.weight")
    if output is not None and embedding is not None and _same_data(output, embedding):
        del tensors["output.weight"]  # some converters write tied embeddings twice
    return tensors, None if rope_freqs is None else np.array(rope_freqs.data)


def _same_data(a: ReaderTensor, b: ReaderTensor) -> bool:
    return a.tensor_type == b.tensor_type and np.array_equal(a.data, b.data)


def _vocab_size(tensors: dict[str, ReaderTensor]) -> int:
    if "token_embd.weight" not in tensors:
        raise ValueError("token_embd.weight is missing")
    return int(tensors["token_embd.weight"].shape[1])  # GGUF lists the fastest dimension first


def _write_config(directory: Path, config: dict[str, Any], metadata: dict[str, Any], dtype: torch.dtype) -> None:
    arguments = {key: value for key, value in config.items() if key != "model_type"}
    AutoConfig.for_model(config["model_type"], **arguments, dtype=dtype).save_pretrained(directory)
    stops = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    GenerationConfig(
        bos_token_id=config["bos_token_id"],
        eos_token_id=sorted({stop for stop in stops if stop is not None}) or None,
        pad_token_id=config["pad_token_id"],
    ).save_pretrained(directory)


def _write_tokenizer(path: Path, directory: Path, config: dict[str, Any], metadata: dict[str, Any]) -> None:
    if "tokenizer.ggml.tokens" not in metadata:
        raise ValueError("tokenizer.ggml.tokens is missing: a model without its vocabulary cannot be served")
    if metadata["tokenizer.ggml.tokens"] > config["vocab_size"]:
        raise ValueError(f"tokenizer.ggml.tokens: more than the {config['vocab_size']} rows of token_embd.weight")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    if metadata.get("tokenizer.ggml.model") == "gpt2":
        _fix_byte_level(tokenizer, metadata, path)
    tokenizer.model_max_length = metadata[f"{metadata['general.architecture']}.context_length"]
    for key in ("is_local", "local_files_only"):  # arguments of this load, not properties of the tokenizer
        tokenizer.init_kwargs.pop(key, None)
    tokenizer.save_pretrained(directory)


def _fix_byte_level(tokenizer: Any, metadata: dict[str, Any], path: Path) -> None:
    """What transformers' GGUF reader leaves out of a byte-level tokenizer; llama.cpp has it in code, by name."""
    name = metadata.get("tokenizer.ggml.pre")
    backend = tokenizer.backend_tokenizer
    if name in _DIGIT_PRE_TOKENIZERS:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif name in _LLAMA3_PRE_TOKENIZERS:
        backend.model.ignore_merges = True
        tokenizer.add_bos_token = metadata.get("tokenizer.ggml.add_bos_token", True)
    elif isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel) and name not in _GPT2_PRE_TOKENIZERS:
        if name not in (None, "default"):
            raise ValueError(f"tokenizer.ggml.pre: {name!r} is not supported")
        logger.warning("%s does not name its pre-tokenizer (tokenizer.ggml.pre); splitting text as GPT-2 does", path)
