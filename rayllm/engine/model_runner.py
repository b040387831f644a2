"""One rank of the model: loads its shard, keeps its pages, runs a step, samples if it is the sampling rank.

The sampling rank is tensor-parallel rank 0 of the last pipeline stage; on every other rank `execute` returns None.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from rayllm.core.config import EngineConfig
from rayllm.core.errors import ConfigError
from rayllm.engine.decode_graphs import DecodeGraphs
from rayllm.engine.kv_cache import KVCache, KVLayout, cache_dtype, num_blocks_that_fit
from rayllm.engine.paged_context import PagedContext, Prompts
from rayllm.engine.persistent_batch import Ints, PersistentBatch, StepArrays
from rayllm.engine.sampler import Sampler
from rayllm.models.checkpoint import Checkpoint
from rayllm.models.decoder import Decoder
from rayllm.parallel.fuse import fuse_projections
from rayllm.parallel.load import load_shard, local_kv_heads, stage_layers
from rayllm.parallel.mesh import Mesh
from rayllm.parallel.pipeline import recv_hidden, send_hidden
from rayllm.quant.int8_linear import pack_weights
from rayllm.scheduler.batch import Batch, PositionLogprobs, SequenceResult, StepResult
from rayllm_kernels import compile_kernels
from rayllm_kernels.dispatch import shortest_flash_prompt

# Rows of logits held at a time for prompt log-probabilities: 256 x 150k x 4 bytes = 150 MB.
_LOGITS_ROWS = 256


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One version of the weights, ready for steps."""

    model: Decoder
    graphs: DecodeGraphs | None


class ModelRunner:
    """`max_model_len` tokens at most in a sequence. Call `init_cache` once, then `execute` for each step.

    Starts with the weights of `checkpoint`, called `weight_version`; others of the same decoder can be held beside
    them, and each step names those that compute it.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        mesh: Mesh,
        config: EngineConfig,
        *,
        weight_version: str,
        max_model_len: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        spec = checkpoint.spec
        self._mesh = mesh
        self._device = device
        self._dtype = dtype
        self._quantize = config.model.quantize
        self._max_num_seqs = config.scheduler.max_num_seqs
        self._served = self.load(checkpoint)  # of the step that is computed, or was last
        self._held = {weight_version: self._served}
        if device.type == "cpu":
            compile_kernels()
        self._layout = KVLayout(
            layers=stage_layers(spec.num_layers, mesh.pp_rank, mesh.pp_size),
            num_kv_heads=local_kv_heads(spec, mesh.tp_size),
            head_dim=spec.head_dim,
            block_size=config.cache.block_size,
            dtype=cache_dtype(config.cache.dtype, dtype, device),
            device=device,
        )
        self._shortest_flash_prompt = shortest_flash_prompt(device.type, dtype, self._layout.dtype)
        self.num_blocks_that_fit = num_blocks_that_fit(self._layout, config.cache)
        self._rows = PersistentBatch(
            max_num_seqs=config.scheduler.max_num_seqs,
            max_model_len=max_model_len,
            block_size=config.cache.block_size,
        )
        self._prompt_logprobs: dict[int, tuple[int, int]] = {}  # seq_id -> how many alternatives, from which token on
        self._dynamic_rope = spec.rope is not None and spec.rope.type == "dynamic"
        self._samples = mesh.is_last_stage and mesh.tp_rank == 0
        self._sampler = (
            Sampler(vocab_size=spec.vocab_size, max_rows=config.scheduler.max_num_seqs, device=device)
            if self._samples
            else None
        )

    def load(self, checkpoint: Checkpoint) -> ServedModel:
        """Weights that `hold` takes, of a checkpoint with the spec of the first one. From any thread: steps may go on
        meanwhile. Raises as `load_shard`."""
        model = load_shard(
            checkpoint, self._mesh, dtype=self._dtype, device=self._device, quantize=self._quantize
        ).requires_grad_(False)
        fuse_projections(model)
        pack_weights(model, self._dtype)
        if self._device.type == "cpu" and self._mesh.tp_group is None:
            return ServedModel(model, DecodeGraphs(model, self._max_num_seqs, self._dtype))
        return ServedModel(model, None)

    @contextmanager
    def beside_steps(self) -> Iterator[None]:
        """For a thread that loads: on CUDA, a stream beside that of the steps, waited for at the end."""
        if self._device.type != "cuda":
            yield
            return
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()

    def hold(self, weight_version: str, served: ServedModel) -> None:
        self._held[weight_version] = served

    def drop(self, weight_version: str) -> None:
        """Between steps; none names it any more. Also what is not held, where it could not be loaded."""
        dropped = self._held.pop(weight_version, None)
        if self._served is dropped:
            self._served = next(iter(self._held.values()))

    def init_cache(self, num_blocks: int) -> None:
        """`num_blocks` is what every rank agreed on: the least that fits on any of them.

        Raises ConfigError when the device has not that much memory.
        """
        try:
            self._cache = KVCache(self._layout, num_blocks)
        except RuntimeError as error:  # what torch raises for memory, on CPU and CUDA alike
            size = num_blocks * self._layout.block_bytes
            raise ConfigError(f"KV cache: {num_blocks} blocks are {size} bytes, which cannot be allocated") from error

    @torch.inference_mode()
    def execute(self, batch: Batch) -> StepResult | None:
        self._served = self._held[batch.weight_version]
        self._update_rows(batch)
        arrays = self._rows.step(batch)
        self._append_sampled(batch, arrays)
        hidden_TD = self._forward(arrays)
        if not self._mesh.is_last_stage:
            send_hidden(self._mesh, hidden_TD)
            return None
        prompt_logprobs = self._score_prompts(batch, arrays, hidden_TD)
        sampled = self._sample(batch, arrays, hidden_TD)
        if not self._samples:
            return None
        results = []
        for scheduled in batch.scheduled:
            token_id, logprobs = sampled.get(scheduled.seq_id, (None, None))
            results.append(SequenceResult(scheduled.seq_id, token_id, logprobs, prompt_logprobs.get(scheduled.seq_id)))
        return StepResult(step_id=batch.step_id, sequences=results)

    def _update_rows(self, batch: Batch) -> None:
        for seq_id in batch.released:
            row = self._rows.release(seq_id)
            self._prompt_logprobs.pop(seq_id, None)
            if self._sampler is not None:
                self._sampler.remove(row)
        for sequence in batch.new:
            row = self._rows.admit(sequence)
            spec = sequence.sampler
            if spec.prompt_logprobs is not None:
                self._prompt_logprobs[sequence.seq_id] = (spec.prompt_logprobs, spec.prompt_logprobs_start)
            if self._sampler is not None:
                self._sampler.add(row, sequence)

    def _append_sampled(self, batch: Batch, arrays: StepArrays) -> None:
        if self._sampler is None:
            return
        for row, scheduled in zip(arrays.rows_B.tolist(), batch.scheduled, strict=True):
            for token_id in scheduled.new_token_ids:
                self._sampler.append(row, token_id)

    def _forward(self, arrays: StepArrays) -> Tensor:
        model, graphs = self._served.model, self._served.graphs
        num_tokens = len(arrays.tokens_T)
        shortest = self._shortest_flash_prompt
        num_prompts = 0 if shortest is None else arrays.num_prompts(shortest)
        num_paged = len(arrays.rows_B) - num_prompts
        context = PagedContext(
            cache=self._cache,
            block_tables_RM=self._on_device(self._rows.block_tables_RM),
            rows_B=self._on_device(arrays.rows_B[:num_paged]),
            query_start_B1=self._on_device(arrays.query_start_B1[: num_paged + 1]),
            context_lens_B=self._on_device(arrays.context_lens_B[:num_paged]),
            slots_T=self._on_device(arrays.slots_T),
            rope_lengths_T=self._on_device(arrays.rope_lengths_T) if self._dynamic_rope else None,
            prompts=self._prompts(arrays.query_start_B1[num_paged:]) if num_prompts else None,
        )
        if self._mesh.is_first_stage:
            x = self._on_device(arrays.tokens_T)
        else:
            hidden_size = model.spec.hidden_size
            x = recv_hidden(self._mesh, num_tokens, hidden_size, self._dtype, self._device)
        x_TD, rotation = model.embed(x, self._on_device(arrays.positions_T), context.rope_lengths_T)
        return (model if graphs is None else graphs).transform(x_TD, rotation, context)

    def _prompts(self, starts_B1: Ints) -> Prompts:
        return Prompts(first_token=int(starts_B1[0]), cu_seqlens=self._on_device(starts_B1 - starts_B1[0]))

    def _sample(
        self, batch: Batch, arrays: StepArrays, hidden_TD: Tensor
    ) -> dict[int, tuple[int, PositionLogprobs | None]]:
        chosen = [i for i, scheduled in enumerate(batch.scheduled) if scheduled.sample]
        if not chosen:
            return {}
        last_B = arrays.query_start_B1[1:][chosen] - 1
        logits_BV = self._logits(hidden_TD, last_B.tolist())
        if self._sampler is None:
            return {}
        assert logits_BV is not None
        results = self._sampler.sample(logits_BV, arrays.rows_B[chosen].tolist())
        return {batch.scheduled[i].seq_id: result for i, result in zip(chosen, results, strict=True)}

    def _score_prompts(self, batch: Batch, arrays: StepArrays, hidden_TD: Tensor) -> dict[int, list[PositionLogprobs]]:
        """Every rank of the stage goes through the same pieces, for the logits are gathered over the ranks."""
        scores: dict[int, list[PositionLogprobs]] = {}
        for i, scheduled in enumerate(batch.scheduled):
            if scheduled.seq_id not in self._prompt_logprobs:
                continue
            top, first_token = self._prompt_logprobs[scheduled.seq_id]
            skipped = min(scheduled.num_tokens, max(0, first_token - 1 - scheduled.start))
            targets = self._rows.targets(
                int(arrays.rows_B[i]), scheduled.start + skipped, scheduled.num_tokens - skipped
            )
            first = int(arrays.query_start_B1[i]) + skipped
            scores[scheduled.seq_id] = []
            for lo in range(0, len(targets), _LOGITS_ROWS):
                piece = targets[lo : lo + _LOGITS_ROWS]
                logits = self._logits(hidden_TD, range(first + lo, first + lo + len(piece)))
                if self._sampler is not None:
                    assert logits is not None
                    scores[scheduled.seq_id] += self._sampler.prompt_logprobs(logits, piece, top)
        return scores

    def _logits(self, hidden_TD: Tensor, positions: Sequence[int]) -> Tensor | None:
        index = torch.tensor(positions, device=self._device)
        return self._served.model.logits(hidden_TD.index_select(0, index))

    def _on_device(self, array: object) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)


def resolve_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def resolve_dtype(name: str, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """The checkpoint's own for "auto", except that float16 becomes float32 on CPU, where its products crawl."""
    if name != "auto":
        dtype = getattr(torch, name)
        assert isinstance(dtype, torch.dtype)
        return dtype
    if checkpoint.dtype == torch.float16 and device.type == "cpu":
        return torch.float32
    return checkpoint.dtype
