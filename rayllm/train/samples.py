"""What the model answers to a few prompts before a run and after it: by the engine that serves it, the likeliest token
each time. Kept as `samples.json` in the run's folder. Knows no ranks and no Ray."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from rayllm.core.config import CacheConfig
from rayllm.core.errors import ConfigError, DataError, InvalidRequestError
from rayllm.core.tokenizer import Tokenizer
from rayllm.core.types import SamplingParams
from rayllm.models.hub import resolve_model
from rayllm.models.spec import DecoderSpec
from rayllm.train.config import SamplesConfig, TrainConfig
from rayllm.train.saved import SavedRun

_NAME = "samples.json"
_BLOCK = CacheConfig().block_size


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """`before` None: the run began with random weights; `after` None: it has not ended."""

    prompt: str
    before: str | None
    after: str | None


class Samples(msgspec.Struct, frozen=True, kw_only=True):
    """`config`: what was asked for; `checkpoint`: the name of the folder that answered `after`."""

    config: SamplesConfig
    samples: tuple[Sample, ...]
    checkpoint: str | None = None


def check_samples(config: SamplesConfig, directory: Path, spec: DecoderSpec, *, scores: bool) -> None:
    """ConfigError for prompts that cannot be answered by the model in `directory`. `scores`: it is a reward model."""
    if not config.prompts:
        return
    if scores:
        raise ConfigError("samples.prompts: a reward model gives no answers")
    tokenizer, most = Tokenizer.load(directory), spec.max_position_embeddings
    for prompt in config.prompts:
        try:
            length = len(_token_ids(tokenizer, config, prompt))
        except InvalidRequestError as error:
            raise ConfigError(f"samples.prompts: {prompt!r}: {error}") from None
        if length == 0:
            raise ConfigError(f"samples.prompts: {prompt!r} has no token")
        if length + config.max_tokens > most:
            raise ConfigError(
                f"samples.prompts: {prompt!r} has {length} tokens, which with samples.max_tokens"
                f" {config.max_tokens} are more than the model's {most} positions"
            )


def sample_before(config: TrainConfig) -> None:
    """Of the start model; what an earlier start of the run has asked already is not asked again."""
    stored = read_samples(Path(config.run))
    if not config.samples.prompts or (stored is not None and stored.config == config.samples):
        return
    answers: Sequence[str | None] = [None] * len(config.samples.prompts)
    if not config.model.random:
        answers = _answers(resolve_model(config.model.start), config)
    samples = tuple(
        Sample(prompt=prompt, before=answer, after=None)
        for prompt, answer in zip(config.samples.prompts, answers, strict=True)
    )
    _write(Path(config.run), Samples(config=config.samples, samples=samples))


def sample_after(config: TrainConfig) -> None:
    """Of the run's last checkpoint."""
    stored, saved = read_samples(Path(config.run)), SavedRun(Path(config.run)).latest()
    if not config.samples.prompts:
        return
    assert stored is not None
    assert saved is not None
    answers = _answers(saved.directory, config)
    samples = tuple(
        Sample(prompt=one.prompt, before=one.before, after=answer)
        for one, answer in zip(stored.samples, answers, strict=True)
    )
    _write(Path(config.run), Samples(config=config.samples, samples=samples, checkpoint=saved.directory.name))


def read_samples(run: Path) -> Samples | None:
    """None where none were asked for. DataError if they cannot be read."""
    path = run / _NAME
    try:
        return msgspec.json.decode(path.read_bytes(), type=Samples)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        raise DataError(f"{path}: is not what `rayllm train` writes: {error}") from None


def _write(run: Path, samples: Samples) -> None:
    run.mkdir(parents=True, exist_ok=True)
    staging = run / f".{_NAME}.partial"
    staging.write_bytes(msgspec.json.format(msgspec.json.encode(samples), indent=2) + b"\n")
    staging.replace(run / _NAME)


def _answers(directory: Path, config: TrainConfig) -> list[str]:
    """In this process, which is no worker: with as much of a KV cache as the prompts need, and no more."""
    import torch

    from rayllm.engine.llm import LLM

    asked = config.samples
    tokenizer = Tokenizer.load(directory)
    prompts = [_token_ids(tokenizer, asked, prompt) for prompt in asked.prompts]
    blocks = sum(-(-(len(prompt) + asked.max_tokens) // _BLOCK) for prompt in prompts)
    longest = max(map(len, prompts)) + asked.max_tokens
    cache = CacheConfig(num_blocks=blocks + 1)
    with LLM(str(directory), dtype=config.model.save_dtype, max_model_len=longest, cache=cache) as llm:
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=asked.max_tokens))
    answers = [output.outputs[0].text for output in outputs]
    del llm
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the workers' now
    return answers


def _token_ids(tokenizer: Tokenizer, config: SamplesConfig, prompt: str) -> list[int]:
    return tokenizer.chat([{"role": "user", "content": prompt}]) if config.chat else tokenizer.encode(prompt)
