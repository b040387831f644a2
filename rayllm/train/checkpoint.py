"""Saves and restores training, on all ranks at once: each writes and reads its own part.

A save stops training for as long as it takes to copy; the files are written by a thread. The copies' memory is kept
from the first save to the last: fresh memory takes longer to get than to fill. Layouts may differ between a save and
what is restored from it: tensors are known by their names and whole shapes.
"""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from rayllm.core.errors import CheckpointError, RayLLMError, TrainingError
from rayllm.models.checkpoint import DTYPES
from rayllm.train.config import CheckpointConfig, DType
from rayllm.train.export import join_part_files, stored_tensors, write_config, write_part_files
from rayllm.train.gather import whole
from rayllm.train.gradients import EMBEDDING, HEAD
from rayllm.train.initial import VALUE
from rayllm.train.lora import acting, adapter_tensors, is_adapter, join_adapter, plain_name, write_adapter_part
from rayllm.train.mesh import TrainMesh
from rayllm.train.optimizer import Weight
from rayllm.train.saved import TRAINING, Saved, SavedRun, TrainState
from rayllm.train.step import TrainStep
from rayllm.train.trainee import Heads


class Checkpointer:
    """All methods are called by every rank of the world, in the same order."""

    def __init__(
        self, run: Path, source: Path, step: TrainStep, mesh: TrainMesh, config: CheckpointConfig, dtype: DType
    ) -> None:
        """`source`: the directory that the model's configuration and tokenizer come from; `dtype` of the exported
        weights."""
        self._saved = SavedRun(run)
        self._source, self._step, self._mesh, self._config, self._dtype = source, step, mesh, config, dtype
        # The writing threads of all ranks talk while training does.
        self._group = dist.new_group(backend="gloo")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=torch.cuda.is_available(),
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=False,
            )
        )
        self._copies: dict[str, Tensor] = {}

    def save(self, state: TrainState) -> None:
        """Returns when training may go on. Waits for the save before, and raises what went wrong with it."""
        self.wait()
        if dist.get_rank() == 0:
            self._saved.begin(state.step)
        dist.barrier(self._group)
        copied = self._stager.stage(self._tensors())
        assert isinstance(copied, dict)
        exported, adapter = self._gather(copied), self._gather_learnt()
        self._pending = self._thread.submit(self._finish, copied, exported, adapter, state)

    def wait(self) -> None:
        """Until the save that is under way, if there is one, is on the disk. Raises TrainingError if it failed."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def restore(self, saved: Saved) -> TrainState:
        """Raises CheckpointError where a file is damaged or not of this model, on every rank."""
        self._agree(self._problem_of(saved))
        tensors = self._tensors()
        known = FileSystemReader(saved.directory / TRAINING).read_metadata().state_dict_metadata
        for name, value in list(tensors.items()):
            if name.startswith("rng."):
                if name not in known:  # there were fewer ranks
                    del tensors[name]
            elif name not in known or known[name].size != value.shape:  # type: ignore[union-attr]
                raise CheckpointError(saved.directory, f"has no {name} of {list(value.shape)}: it is of another model")
        load(tensors, checkpoint_id=saved.directory / TRAINING, process_group=self._group)
        if (rng := tensors.get(_rng_name())) is not None:
            torch.set_rng_state(rng)
        state = saved.state
        for name in self._step.optimizer.weights:
            self._step.optimizer.moments(name)["step"].fill_(state.step)
        return state

    def close(self) -> None:
        self.wait()
        self._thread.shutdown()
        self._stager.close()

    def _tensors(self) -> dict[str, Any]:
        """What is saved and restored in place, by names that do not depend on the layout. A tied embedding has one
        name on the first and the last stage, and is written once."""
        tensors: dict[str, Any] = {_rng_name(): torch.get_rng_state()}
        for name, weight in self._step.optimizer.weights.items():
            shared = self._shared_name(name)
            moments = self._step.optimizer.moments(name)
            tensors[f"weight.{shared}"] = _placed(weight.local.detach(), weight)
            tensors[f"exp_avg.{shared}"] = _placed(moments["exp_avg"], weight)
            tensors[f"exp_avg_sq.{shared}"] = _placed(moments["exp_avg_sq"], weight)
        return tensors

    def _shared_name(self, name: str) -> str:
        tied = self._step.trainee.decoder.spec.tie_word_embeddings
        return EMBEDDING if tied and name == HEAD else name

    def _gather(self, copied: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """On one rank of each stage its whole weights with what adapters add; nothing on the others. Those that are
        `copied` whole are not copied again. A value head is of use in training alone."""
        parameters = {name: one.detach() for name, one in self._step.trainee.decoder.named_parameters()}
        gathered: dict[str, Tensor] = {}
        for name in parameters:
            if name == VALUE or is_adapter(name):
                continue
            if isinstance(parameters[name], DTensor) or self._step.trainee.lora.rank:
                value = acting(name, parameters, self._step.trainee.lora, whole)
                if self._leads:
                    gathered[plain_name(name)] = self._copy(name, value, DTYPES[self._dtype])
            elif self._leads:
                gathered[name] = copied[f"weight.{self._shared_name(name)}"]
        return gathered

    def _gather_learnt(self) -> dict[str, Tensor]:
        """Where adapters are learnt, on the same ranks what a file of adapters holds, in float32."""
        gathered: dict[str, Tensor] = {}
        if self._step.trainee.lora.rank:
            for name, weight in self._step.optimizer.weights.items():
                value = whole(_placed(weight.local.detach(), weight))
                if self._leads:
                    gathered[name] = self._copy(f"learnt.{name}", value, value.dtype)
        return gathered

    def _copy(self, key: str, value: Tensor, dtype: torch.dtype) -> Tensor:
        """On the CPU; good until the next save."""
        if key not in self._copies:
            self._copies[key] = torch.empty(value.shape, dtype=dtype)
        return self._copies[key].copy_(value)

    @property
    def _leads(self) -> bool:
        return self._mesh.data_rank == 0 and self._mesh.tp_rank == 0

    def _finish(
        self, copied: dict[str, Any], exported: dict[str, Tensor], adapter: dict[str, Tensor], state: TrainState
    ) -> None:
        """In the thread."""
        trainee, staging = self._step.trainee, self._saved.staging(state.step)
        scores, problem = trainee.heads is Heads.SCORE, None
        try:
            save(copied, checkpoint_id=staging / TRAINING, process_group=self._group)
            if exported:
                exported = {name: tensor.to(DTYPES[self._dtype]) for name, tensor in exported.items()}
                tensors = stored_tensors(trainee.decoder.spec, exported, scores=scores)
                write_part_files(staging, self._mesh.pp_rank, tensors)
            if adapter:
                tensors = adapter_tensors(trainee.decoder.spec, adapter, scores=scores)
                write_adapter_part(staging, self._mesh.pp_rank, tensors)
        except (OSError, RuntimeError, CheckpointException) as error:
            problem = self._not_written(staging, error)
        self._agree(problem)
        if dist.get_rank() == 0:
            try:
                join_part_files(staging)
                write_config(self._source, staging, self._dtype, scores=scores)
                if trainee.lora.rank:
                    join_adapter(staging, self._source, trainee.lora, scores=scores)
                self._saved.publish(state)
            except OSError as error:
                raise self._not_written(staging, error) from error
            self._saved.prune(self._config)

    def _not_written(self, staging: Path, error: BaseException) -> TrainingError:
        return TrainingError(f"{staging}: rank {dist.get_rank()} cannot write it: {type(error).__name__}: {error}")

    def _agree(self, problem: RayLLMError | None) -> None:
        """Raises on every rank what is wrong on any."""
        problems: list[RayLLMError | None] = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem, group=self._group)
        for one in problems:
            if one is not None:
                raise one

    def _problem_of(self, saved: Saved) -> CheckpointError | None:
        """One rank reads the files for all."""
        if dist.get_rank() == 0:
            try:
                saved.verify()
            except CheckpointError as error:
                return error
        return None


def _placed(local: Tensor, weight: Weight) -> Tensor:
    """`local`, a part of something of the weight's shape and placement, as that; one memory."""
    whole = weight.parameter
    if not isinstance(whole, DTensor):
        return local
    return DTensor.from_local(
        local, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def _rng_name() -> str:
    return f"rng.{dist.get_rank()}"
