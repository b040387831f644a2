"""Adapters by peft: beside each chosen matrix W, which stays as it is, B A of low `rank`, which is learnt.

    y = W x + (alpha / rank) B A x       (Hu et al. 2021, LoRA)

A module `q_proj` becomes `q_proj.base_layer`, `q_proj.lora_A.default` and `q_proj.lora_B.default`. Knows no ranks.
Letters: R rank, I inputs and O outputs of a matrix.
"""

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from rayllm.core.errors import ConfigError
from rayllm.models.checkpoint import SCORE
from rayllm.models.decoder import Decoder
from rayllm.models.families import weight_names
from rayllm.models.spec import DecoderSpec
from rayllm.train.config import NO_ADAPTERS, LoraConfig
from rayllm.train.gradients import HEAD

ADAPTER = "adapter"  # the folder in a checkpoint
_A, _B, _BASE = ".lora_A.default.", ".lora_B.default.", ".base_layer."


def check_lora(config: LoraConfig, spec: DecoderSpec, *, random: bool) -> None:
    """ConfigError for adapters that could not be made, or that nobody could read. `random`: the run starts from
    random weights."""
    if not config.rank:
        if config != NO_ADAPTERS:
            raise ConfigError("lora.rank: is 0, which means no adapters; the other settings in [lora] need one")
        return
    if importlib.util.find_spec("peft") is None:
        raise ConfigError("lora: needs peft; install it with: pip install 'rayllm[lora]'")
    if random:
        raise ConfigError("model.random: adapters change a model that has learnt; start from one")
    names = weight_names(spec.family)
    for target in config.targets:
        found = [source for module, source in names.modules.items() if module.endswith(f".{target}")]
        if target == "gate_proj" and not spec.gated_mlp:
            raise ConfigError(f"lora.targets: {spec.family} has no {target}")
        if any(source.transposed or source.parts > 1 for source in found):
            raise ConfigError(
                f"lora: {spec.family} is not supported: its checkpoints hold q, k and v as one matrix, so no adapter"
                " of each can be written that others read"
            )


def add_adapters(decoder: Decoder, config: LoraConfig) -> None:
    """To the layers that `decoder` has, on the meta device. All of its other parameters are frozen."""
    from peft import inject_adapter_in_model

    inject_adapter_in_model(_settings(config), decoder, low_cpu_mem_usage=True)


def is_adapter(parameter: str) -> bool:
    return _A in parameter or _B in parameter


def adapter_side(module: str) -> str | None:
    """A or B, of an adapter's layer; None of any other module."""
    return next((side for side, part in (("A", _A), ("B", _B)) if f"{module}.".endswith(part)), None)


def plain_name(parameter: str) -> str:
    """What a parameter of a decoder with adapters is called in one without; of an adapter: what it is beside."""
    for part in (_BASE, _A, _B):
        parameter = parameter.replace(part, ".")
    return parameter


def acting(
    name: str, parameters: Mapping[str, Tensor], config: LoraConfig, whole: Callable[[Tensor], Tensor]
) -> Tensor:
    """The weight `name`, which is no adapter, as the model acts with it: with what its adapter adds. `whole` gives
    a parameter whole."""
    value = whole(parameters[name])
    if _BASE not in name or not name.endswith(".weight"):
        return value
    a_RI, b_OR = (whole(parameters[name.replace(_BASE, part)]) for part in (_A, _B))
    return value + config.alpha / config.rank * (b_OR @ a_RI)


def adapter_tensors(spec: DecoderSpec, parameters: Mapping[str, Tensor], *, scores: bool) -> dict[str, Tensor]:
    """Whole parameters that are learnt, by their names in the decoder -> tensors by the names that peft gives them
    beside transformers' model. `scores`: the head is a reward model's."""
    names = weight_names(spec.family)
    tensors = {}
    for name, value in parameters.items():
        if is_adapter(name):
            stored = names.locate(plain_name(name), tied=False, stored=(names.prefix,)).name
            module, part = stored.removesuffix(".weight"), "lora_A" if _A in name else "lora_B"
            tensors[f"base_model.model.{module}.{part}.weight"] = value.contiguous()
        elif scores and name == HEAD:
            tensors[f"base_model.model.{SCORE}"] = value.contiguous()
    return tensors


def write_adapter_part(directory: Path, stage: int, tensors: dict[str, Tensor]) -> None:
    """What one pipeline stage has of it, into the checkpoint's `directory`."""
    (directory / ADAPTER).mkdir(exist_ok=True)
    save_file(tensors, directory / ADAPTER / f"part-{stage:05d}.safetensors")


def join_adapter(directory: Path, source: Path, config: LoraConfig, *, scores: bool) -> None:
    """One file of the parts of all stages, and peft's description. `source`: of the start model."""
    tensors: dict[str, Tensor] = {}
    for part in sorted((directory / ADAPTER).glob("part-*.safetensors")):
        tensors |= load_file(part)
        part.unlink()
    save_file(tensors, directory / ADAPTER / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = _settings(
        config,
        base_model_name_or_path=str(source),
        inference_mode=True,
        task_type="SEQ_CLS" if scores else "CAUSAL_LM",
        modules_to_save=[SCORE.removesuffix(".weight")] if scores else None,
    )
    settings.save_pretrained(str(directory / ADAPTER))


def _settings(config: LoraConfig, **others: Any) -> Any:
    from peft import LoraConfig as PeftConfig

    return PeftConfig(r=config.rank, lora_alpha=config.alpha, target_modules=list(config.targets), **others)
