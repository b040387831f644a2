"""Options that several commands share, declared once, as dataclasses whose fields are the options.

An engine option that is not given is None: the configuration file's value holds, then the default of
`rayllm.core.config`.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from rayllm.cli.config_file import Sections, engine_config, merge
from rayllm.cli.units import parse_bytes
from rayllm.core.config import DTYPES, KV_CACHE_DTYPES, QUANTIZE, EngineConfig
from rayllm.core.errors import InvalidRequestError
from rayllm.core.types import SamplingParams

MODEL_HELP = "A Hugging Face directory or hub name, a .gguf file, or an embedded model (see `rayllm models list`)."

Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout; logs stay on stderr.")]


def _engine(flag: str, help: str, **settings: Any) -> Any:
    return typer.Option(flag, help=help, rich_help_panel="Engine", show_default=False, **settings)


def _sampling(flag: str, help: str, **settings: Any) -> Any:
    return typer.Option(flag, help=help, rich_help_panel="Sampling", **settings)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    tp: Annotated[
        int | None, _engine("--tp", "Tensor parallel ranks: each holds a slice of every matrix [1].", min=1)
    ] = None
    pp: Annotated[
        int | None, _engine("--pp", "Pipeline parallel stages: each holds some of the layers [1].", min=1)
    ] = None
    dtype: Annotated[str | None, _engine("--dtype", f"One of {', '.join(DTYPES)} [auto: the checkpoint's own].")] = None
    quantize: Annotated[
        str | None,
        _engine("--quantize", f"Make the weights int8 as they are read: one of {', '.join(QUANTIZE)} [as stored]."),
    ] = None
    max_model_len: Annotated[
        int | None, _engine("--max-model-len", "Longest prompt plus answer, in tokens [the model's].", min=2)
    ] = None
    kv_cache_memory: Annotated[
        int | None,
        _engine("--kv-cache-memory", "On CPU: each rank's KV cache [1GiB].", parser=parse_bytes, metavar="SIZE"),
    ] = None
    kv_cache_dtype: Annotated[
        str | None,
        _engine(
            "--kv-cache-dtype",
            f"One of {', '.join(KV_CACHE_DTYPES)}; int8 holds nearly twice the tokens, a little less exactly [auto].",
        ),
    ] = None
    gpu_memory_fraction: Annotated[
        float | None,
        _engine(
            "--gpu-memory-fraction", "On GPU: share of its memory for weights and KV cache [0.9].", min=0.01, max=1.0
        ),
    ] = None
    max_num_seqs: Annotated[int | None, _engine("--max-num-seqs", "Sequences that run at once [64].", min=1)] = None
    max_num_batched_tokens: Annotated[
        int | None, _engine("--max-num-batched-tokens", "Token budget of one step [1024].", min=1)
    ] = None

    def config(self, model: str | None) -> EngineConfig:
        """Raises ConfigError, also for no model."""
        return engine_config(merge({}, self.sections(model)))

    def refuse_with_url(self) -> None:
        """Raises typer.BadParameter for an option of an engine that runs elsewhere."""
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is not None:
                option = f"--{field.name.replace('_', '-')}"
                raise typer.BadParameter(f"{option} is for a model that is loaded here; leave it out with --url")

    def sections(self, model: str | None) -> Sections:
        """As in a configuration file; None where nothing was given."""
        return {
            "model": {
                "model": model,
                "dtype": self.dtype,
                "max_model_len": self.max_model_len,
                "quantize": self.quantize,
            },
            "parallel": {"tensor": self.tp, "pipeline": self.pp},
            "cache": {
                "cpu_memory_bytes": self.kv_cache_memory,
                "dtype": self.kv_cache_dtype,
                "gpu_memory_fraction": self.gpu_memory_fraction,
            },
            "scheduler": {"max_num_seqs": self.max_num_seqs, "max_num_batched_tokens": self.max_num_batched_tokens},
        }


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SamplingOptions:
    """The options of one answer; `GenerateOptions` adds what makes sense only outside a conversation."""

    max_tokens: Annotated[int, _sampling("--max-tokens", "Longest answer, in tokens.")] = 256
    temperature: Annotated[float, _sampling("--temperature", "0 always takes the likeliest token.")] = 1.0
    top_k: Annotated[int, _sampling("--top-k", "Sample among this many likeliest tokens; 0: all.")] = 0
    top_p: Annotated[float, _sampling("--top-p", "Sample among the likeliest tokens that reach this probability.")] = (
        1.0
    )
    min_p: Annotated[float, _sampling("--min-p", "Drop tokens less likely than this share of the likeliest.")] = 0.0
    repetition_penalty: Annotated[
        float, _sampling("--repetition-penalty", "Above 1: repeat prompt and answer less.")
    ] = 1.0
    seed: Annotated[int | None, _sampling("--seed", "The same seed gives the same answer.")] = None
    stop: Annotated[
        list[str] | None, _sampling("--stop", "End the answer before this text; repeatable.", metavar="TEXT")
    ] = None

    def values(self) -> dict[str, Any]:
        """Keywords of `SamplingParams`."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return fields | {"stop": tuple(self.stop or ())}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GenerateOptions(SamplingOptions):
    n: Annotated[int, _sampling("--n", "Answers for each prompt.")] = 1
    min_tokens: Annotated[int, _sampling("--min-tokens", "No end of the answer before this many tokens.")] = 0
    frequency_penalty: Annotated[
        float, _sampling("--frequency-penalty", "Subtracted for each time that a token was said.")
    ] = 0.0
    presence_penalty: Annotated[float, _sampling("--presence-penalty", "Subtracted once a token was said.")] = 0.0
    logit_bias: Annotated[
        list[str] | None, _sampling("--logit-bias", "Add BIAS to a token's logit; repeatable.", metavar="ID=BIAS")
    ] = None
    stop_token_ids: Annotated[
        list[int] | None, _sampling("--stop-token-id", "End the answer at this token; repeatable.", metavar="ID")
    ] = None
    ignore_eos: Annotated[bool, _sampling("--ignore-eos", "Go on past the end-of-sequence token.")] = False
    logprobs: Annotated[
        int | None, _sampling("--logprobs", "Log-probabilities of each token and of the K likeliest.", metavar="K")
    ] = None
    prompt_logprobs: Annotated[
        int | None, _sampling("--prompt-logprobs", "The same for the prompt's tokens.", metavar="K")
    ] = None

    def params(self) -> SamplingParams:
        """Raises InvalidRequestError."""
        return SamplingParams(
            **SamplingOptions.values(self)
            | {"logit_bias": _logit_bias(self.logit_bias or []), "stop_token_ids": tuple(self.stop_token_ids or ())}
        )


def _logit_bias(items: list[str]) -> dict[int, float]:
    biases: dict[int, float] = {}
    for item in items:
        token_id, _, bias = item.partition("=")
        try:
            biases[int(token_id)] = float(bias)
        except ValueError:
            raise InvalidRequestError("logit_bias", f"{item!r} is not ID=BIAS, such as 42=-5") from None
    return biases


def expand(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take option dataclasses: each parameter of such a type becomes the options that are its fields.

    typer reads a command's options from its signature, so the expanded signature is what it is shown.
    """
    shown: list[inspect.Parameter] = []
    groups: dict[str, type] = {}
    for parameter in inspect.signature(command).parameters.values():
        group = parameter.annotation
        if isinstance(group, type) and dataclasses.is_dataclass(group):
            groups[parameter.name] = group
            shown += inspect.signature(group).parameters.values()
        else:
            shown.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def expanded(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
        command(**values)

    expanded.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    return expanded
