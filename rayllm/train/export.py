"""The weights under training as a Hugging Face directory, which serving and transformers load as it is.

Each pipeline stage writes its own files; one rank then names them and writes the index.
"""

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rayllm.core.tokenizer import Tokenizer
from rayllm.models.checkpoint import INDEX, SCORE, WEIGHTS
from rayllm.models.families import weight_names
from rayllm.models.spec import DecoderSpec
from rayllm.train.gradients import HEAD

_PART_BYTES = 4 << 30
_CAUSAL = re.compile("ForCausalLM$|LMHeadModel$")
_METADATA = {"format": "pt"}


def stored_tensors(spec: DecoderSpec, parameters: Mapping[str, Tensor], *, scores: bool = False) -> dict[str, Tensor]:
    """Whole parameters by their names in the decoder -> tensors by their names in a checkpoint, without a tied head.

    What a family stores in one matrix has to be here in all its parts. `scores`: the head is a reward model's.
    """
    parameters = dict(parameters)
    score = {SCORE: parameters.pop(HEAD).contiguous()} if scores and HEAD in parameters else {}
    names = weight_names(spec.family)
    pieces: dict[str, dict[int, Tensor]] = {}
    for name, value in parameters.items():
        if name == HEAD and spec.tie_word_embeddings:
            continue
        source = names.locate(name, tied=False, stored=(names.prefix,))
        pieces.setdefault(source.name, {})[source.part] = value.T if source.transposed and value.ndim == 2 else value
    whole = {
        name: torch.cat([parts[part] for part in sorted(parts)], dim=-1).contiguous() for name, parts in pieces.items()
    }
    return {**whole, **score}


def write_part_files(directory: Path, stage: int, tensors: Mapping[str, Tensor]) -> None:
    """Those of one stage, in files of bounded size."""
    part: dict[str, Tensor] = {}
    size, count = 0, 0
    for name, tensor in tensors.items():
        if part and size + tensor.nbytes > _PART_BYTES:
            save_file(part, directory / _part(stage, count), metadata=_METADATA)
            part, size, count = {}, 0, count + 1
        part[name] = tensor
        size += tensor.nbytes
    save_file(part, directory / _part(stage, count), metadata=_METADATA)


def join_part_files(directory: Path) -> None:
    """The files of all stages get the names that readers look for, and an index where they are several."""
    parts = sorted(directory.glob("part-*.safetensors"))
    if len(parts) == 1:
        parts[0].rename(directory / WEIGHTS)
        return
    weight_map: dict[str, str] = {}
    total = 0
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        with safe_open(part, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  not a dict
                weight_map[name] = file
        total += part.stat().st_size
        part.rename(directory / file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def write_config(source: Path, directory: Path, dtype: str, *, scores: bool = False) -> None:
    """config.json of the model that training started from, with the dtype of the new weights, and what lies beside it:
    tokenizer, chat template, generation settings. `scores`: as transformers describes a reward model."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = dtype
    if scores:
        names = config.get("architectures") or ()
        config["architectures"] = [_CAUSAL.sub("ForSequenceClassification", name) for name in names]
        config["id2label"], config["label2id"] = {"0": "LABEL_0"}, {"LABEL_0": 0}  # num_labels = 1
        if config.get("pad_token_id") in Tokenizer.load(source).eos_token_ids:
            config["pad_token_id"] = None  # else transformers would take the answer's end for padding
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for path in _companions(source):
        shutil.copyfile(path, directory / path.name)


def _companions(source: Path) -> Iterable[Path]:
    ours = ("config.json", INDEX, "manifest.json")
    for pattern in ("*.json", "*.jinja", "*.txt", "tokenizer.model"):
        yield from (path for path in sorted(source.glob(pattern)) if path.name not in ours)


def _part(stage: int, number: int) -> str:
    return f"part-{stage:05d}-{number:05d}.safetensors"
