"""Decode steps recorded once and replayed: in one, each sequence adds a token, and only the numbers change.

A graph for each number of sequences, recorded at the first such step; `rayllm_kernels.graph` says what one is. Steps
with a prompt's tokens in them are long enough to be run as they come. Letters: B sequences, R rows, T tokens of a step
(here as many as sequences), D hidden, E head_dim, M blocks of a row.
"""

import logging
from dataclasses import replace

import torch
from torch import Tensor

from rayllm.engine.paged_context import PagedContext
from rayllm.models.decoder import Decoder
from rayllm.models.rope import Rotation
from rayllm_kernels.graph import Graph, NotCapturableError, Workspace, capture

logger = logging.getLogger(__name__)


class DecodeGraphs:
    """For a model on CPU whose ranks do not talk within a step.

    The cache and the block tables must be the same memory in every call, as the model's weights must: a graph has
    their addresses. What the kernels leave to torch is not recorded and runs as it comes, such as the sum that ends a
    pipeline stage without a norm, or more rows of float32 than `rayllm_kernels.dispatch` gives them.
    """

    def __init__(self, model: Decoder, max_num_seqs: int, dtype: torch.dtype) -> None:
        spec = model.spec
        self._model = model
        self._graphs: dict[int, Graph] = {}
        self._memory: tuple[int, int] | None = None
        self._unrecordable: set[int] = set()  # with so many sequences torch computes a part
        self._workspace = Workspace()
        self._x_RD = torch.empty(max_num_seqs, spec.hidden_size, dtype=dtype)
        self._angles = [torch.empty(max_num_seqs, spec.head_dim, dtype=dtype) for _ in range(2)]
        self._rows_R, self._context_lens_R = (torch.empty(max_num_seqs, dtype=torch.int32) for _ in range(2))
        self._slots_R = torch.empty(max_num_seqs, dtype=torch.int64)
        self._query_start_R1 = torch.arange(max_num_seqs + 1, dtype=torch.int32)

    def transform(self, x_TD: Tensor, rotation: Rotation | None, context: PagedContext) -> Tensor:
        """What `Decoder.transform` gives, valid until the next call."""
        num_seqs = len(context.rows_B)
        if rotation is None or len(x_TD) != num_seqs or num_seqs in self._unrecordable:
            return self._model.transform(x_TD, rotation, context)
        inputs = [self._x_RD, *self._angles, self._rows_R, self._context_lens_R, self._slots_R]
        values = [x_TD, rotation.cos_TE, rotation.sin_TE, context.rows_B, context.context_lens_B, context.slots_T]
        for fixed, value in zip(inputs, values, strict=True):
            fixed[:num_seqs].copy_(value)
        memory = id(context.cache), context.block_tables_RM.data_ptr()
        self._memory = self._memory or memory
        assert self._memory == memory, "graphs have the addresses of another cache or block table"
        graph = self._graphs.get(num_seqs)
        return self._record(num_seqs, context) if graph is None else graph.replay()

    def _record(self, num_seqs: int, context: PagedContext) -> Tensor:
        x_TD, rotation = self._x_RD[:num_seqs], Rotation(*(angles[:num_seqs] for angles in self._angles))
        fixed = replace(
            context,
            rows_B=self._rows_R[:num_seqs],
            query_start_B1=self._query_start_R1[: num_seqs + 1],
            context_lens_B=self._context_lens_R[:num_seqs],
            slots_T=self._slots_R[:num_seqs],
        )
        try:
            graph = capture(lambda: self._model.transform(x_TD, rotation, fixed), self._workspace)
        except NotCapturableError as error:
            logger.info("decode steps of %d sequences are not recorded: %s", num_seqs, error)
            self._unrecordable.add(num_seqs)
            return self._model.transform(x_TD, rotation, fixed)
        self._graphs[num_seqs] = graph
        return graph.output
