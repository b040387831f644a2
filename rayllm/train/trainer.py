"""A run from its configuration to its last checkpoint, as each rank goes through it. Knows no Ray."""

import json
import math
import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist

from rayllm.core.errors import ConfigError, DataError
from rayllm.core.tokenizer import Tokenizer
from rayllm.models.checkpoint import DTYPES, Checkpoint
from rayllm.models.families import spec_from_config
from rayllm.models.hub import resolve_model
from rayllm.models.spec import DecoderSpec
from rayllm.models.weight_version import weight_version
from rayllm.train.checkpoint import Checkpointer
from rayllm.train.config import DpoConfig, PpoConfig, TrainConfig, check_layout
from rayllm.train.data.cursor import Cursor
from rayllm.train.data.dataset import PackedDataset
from rayllm.train.data.rows import Kind
from rayllm.train.evaluation import Evaluation, check_evaluation
from rayllm.train.feed import Feed, Setup, packed_feed
from rayllm.train.initial import InitialWeights, random_weights, stored_weights, with_adapters, with_score, with_value
from rayllm.train.lora import check_lora
from rayllm.train.mesh import TrainMesh
from rayllm.train.objective import Objective
from rayllm.train.origin import refuse_other_origin, write_origin
from rayllm.train.peak import Peak, world_peak
from rayllm.train.progress import Progress, ProgressWriter
from rayllm.train.run_info import write_run_info
from rayllm.train.samples import check_samples
from rayllm.train.saved import SavedRun, TrainState
from rayllm.train.schedule import rate_share
from rayllm.train.step import StepReport, TrainStep
from rayllm.train.trainee import Heads, build_trainee

_ORIGIN = "origin.json"
_NO_STEP = StepReport(
    loss=math.nan, measures={}, count=0, tokens=0, flops=0, grad_norm=math.nan, learning_rate=math.nan
)

# The start model's directory and its data, before workers start.
Check = Callable[[TrainConfig, Path, PackedDataset], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What distinguishes one command from another: the data it reads, what is minimised, what lies behind the decoder,
    what it refuses beside what all do, and what its steps are fed with."""

    name: str
    kind: Kind
    objective: Callable[[TrainConfig], Objective]
    heads: Heads = Heads.VOCABULARY
    check: Check = lambda config, directory, dataset: None
    feed: Callable[[Setup], Feed] = packed_feed


@dataclass(slots=True)
class _Sums:
    """Since the last checkpoint; the next one tells the means. All steps of a run have a reward, or none has."""

    steps: int = 0
    loss: float = 0.0
    reward: float | None = None

    def add(self, report: StepReport) -> None:
        self.steps += 1
        self.loss += report.loss
        if (reward := report.measures.get("reward")) is not None:
            self.reward = (self.reward or 0.0) + reward

    def state(self, step: int, cursor: Cursor) -> TrainState:
        reward = None if self.reward is None else self.reward / self.steps
        return TrainState(step=step, loss=self.loss / self.steps, reward=reward, cursor=cursor.state)


def check(config: TrainConfig, recipe: Recipe) -> None:
    """Whatever can be refused without reading weights and without workers. Raises ConfigError, CheckpointError or
    DataError."""
    directory = resolve_model(config.model.start)
    spec = _spec(directory)
    check_layout(spec, config.layout)
    check_samples(config.samples, directory, spec, scores=recipe.heads is Heads.SCORE)
    length = config.batch.sequence_length
    if length > spec.max_position_embeddings:
        raise ConfigError(
            f"batch.sequence_length: {length} is more than the model's {spec.max_position_embeddings} positions"
        )
    dataset = PackedDataset(Path(config.data.path))
    if dataset.kind is not recipe.kind:
        raise DataError(f"{config.data.path}: holds {dataset.kind.value} rows; {recipe.name} reads {recipe.kind.value}")
    if dataset.kind is not Kind.PROMPT and dataset.info.sequence_length != length:
        raise ConfigError(
            f"batch.sequence_length: {length}, but {config.data.path} was packed in rows of"
            f" {dataset.info.sequence_length} tokens"
        )
    if not len(dataset):
        raise DataError(f"{config.data.path}: holds no rows")
    dataset.check_tokenizer(Tokenizer.load(directory))
    for table, default in (("dpo", DpoConfig()), ("ppo", PpoConfig())):
        if recipe.name != table and getattr(config, table) != default:
            raise ConfigError(f"{table}: {recipe.name} has no use for it; only `rayllm train {table}` has")
    check_lora(config.lora, spec, random=config.model.random)
    check_evaluation(config.evaluation, recipe.heads)
    dataset.check_files()
    if dataset.info.vocab_size > spec.vocab_size and (largest := dataset.largest_token()) >= spec.vocab_size:
        raise DataError(f"{config.data.path}: holds token {largest}; the model has {spec.vocab_size} of them, from 0")
    recipe.check(config, directory, dataset)
    run = Path(config.run)
    if (saved := SavedRun(run).latest()) is not None:
        if saved.state.step > config.schedule.steps:
            raise ConfigError(f"schedule.steps: {config.schedule.steps}, but {run} is at step {saved.state.step}")
        refuse_other_origin(run, _ORIGIN, _origin(config, recipe, directory, dataset))


def train(config: TrainConfig, recipe: Recipe, device: torch.device) -> None:
    """On every rank of a world of `config.layout.world`, after `init_process_group`. Goes on from the run's last
    checkpoint, and ends with one of the last step."""
    run = Path(config.run)
    directory = resolve_model(config.model.start)
    mesh = TrainMesh(config.layout, device)
    spec, weights = _start(config, directory)
    lora = config.lora
    if recipe.heads is Heads.SCORE:
        weights = with_score(weights, config.model.seed)
    elif recipe.heads is Heads.VOCABULARY_AND_VALUE:
        weights = with_value(weights)
    if lora.rank:
        weights = with_adapters(weights, config.model.seed)
    objective = recipe.objective(config)
    trainee = build_trainee(spec, weights, objective, mesh, config.model, heads=recipe.heads, lora=lora)
    step = TrainStep(trainee, objective, mesh, config.optimizer)
    checkpointer = Checkpointer(run, directory, step, mesh, config.checkpoint, config.model.save_dtype)
    dataset = PackedDataset(Path(config.data.path))
    feed = recipe.feed(Setup(config=config, directory=directory, dataset=dataset, trainee=trainee, mesh=mesh))
    done, cursor = 0, Cursor(seed=config.data.seed)
    saved = SavedRun(run).latest()
    if saved is not None:
        state = checkpointer.restore(saved)
        done, cursor = state.step, Cursor.from_state(dict(state.cursor), len(dataset))
    writer = None
    if dist.get_rank() == 0:
        write_run_info(config, recipe.name)
        if saved is None:  # of a run that goes on it was compared before
            write_origin(run, _ORIGIN, _origin(config, recipe, directory, dataset))
        writer = ProgressWriter(run, done)
    peak = world_peak(device, DTYPES[config.model.compute_dtype])
    evaluation = Evaluation(config, directory, trainee, mesh)
    sums = _Sums()
    try:
        if done == 0 and evaluation.is_due(0):
            unmoved = replace(_NO_STEP, measures=evaluation(0))
            if writer is not None:
                writer.add(_progress(config, 0, unmoved, math.nan, device, peak))
        while done < config.schedule.steps:
            started = time.monotonic()
            work = feed(done, cursor)
            report = step(work.batches, rate_share(done, config.schedule))
            done, cursor = done + 1, work.cursor
            seconds = time.monotonic() - started
            evaluated = evaluation(done) if evaluation.is_due(done) else {}
            report = replace(report, measures={**work.measures, **report.measures, **evaluated})
            sums.add(report)
            if writer is not None:
                writer.add(_progress(config, done, report, seconds, device, peak))
            every = config.checkpoint.every_steps
            if done == config.schedule.steps or (every and done % every == 0):
                if writer is not None:
                    writer.flush()  # what a checkpoint comes after is not to be lost with what comes after it
                checkpointer.save(sums.state(done, cursor))
                sums = _Sums()
    finally:
        if writer is not None:
            writer.close()  # the last steps of a run that diverges are those that tell why
    checkpointer.close()


def _origin(config: TrainConfig, recipe: Recipe, directory: Path, dataset: PackedDataset) -> dict[str, object]:
    """What a checkpoint's cursor, weights and figures mean something with, and say nothing of."""
    lora, reward_model = config.lora, config.ppo.reward_model
    return {
        "recipe": recipe.name,
        "start_model": f"random, seed {config.model.seed}" if config.model.random else weight_version(directory),
        "reward_model": weight_version(resolve_model(reward_model)) if reward_model else None,
        "data_set": dataset.info.fingerprint,
        "data_seed": config.data.seed,
        "lora": {**msgspec.to_builtins(lora), "targets": [*lora.targets]} if lora.rank else None,
    }


def _spec(directory: Path) -> DecoderSpec:
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{directory / 'config.json'}: is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{directory / 'config.json'}: is not a JSON object")
    return spec_from_config(config)


def _start(config: TrainConfig, directory: Path) -> tuple[DecoderSpec, InitialWeights]:
    if config.model.random:
        spec = _spec(directory)
        return spec, random_weights(spec, config.model.seed)
    checkpoint = Checkpoint.open(directory)
    return checkpoint.spec, stored_weights(checkpoint)


def _progress(
    config: TrainConfig, step: int, report: StepReport, seconds: float, device: torch.device, peak: Peak
) -> Progress:
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device)
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    share = report.flops / seconds / peak.flops
    return Progress(
        step=step,
        steps=config.schedule.steps,
        loss=report.loss,
        measures=report.measures,
        grad_norm=report.grad_norm,
        learning_rate=report.learning_rate,
        count=report.count,
        tokens_per_second=report.tokens / seconds,
        flops_per_second=report.flops / seconds,
        mfu=share if peak.published else None,
        matmul_share=None if peak.published else share,
        seconds=seconds,
        memory_bytes=memory,
        pid=os.getpid(),
    )
