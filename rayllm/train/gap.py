"""How far an engine's log-probabilities are from those of the training forward, on the very same tokens.

The training forward is the decoder that is trained, with training's own loader and dense attention over packed
sequences: nothing of an engine but what it said of each token. Letters: T tokens of all sequences, C rows of a chunk,
K likeliest tokens that the engine names, V vocabulary, D hidden.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from rayllm.core.errors import ModelOutputError
from rayllm.core.types import TokenLogprobs
from rayllm.models.checkpoint import Checkpoint
from rayllm.models.context import DenseContext
from rayllm.models.decoder import Decoder
from rayllm.train.initial import stored_weights

_FORWARD_TOKENS = 4096
_CHUNK_ROWS = 256
_LEAST_REST = 2.0**-24  # what float32 leaves of 1 after a sum; below it, nothing is known of the other tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """A sequence, and what the engine said of its tokens by their place in it. The first has nothing before it, and so
    no log-probability."""

    token_ids: Sequence[int]
    said: Mapping[int, TokenLogprobs]


@dataclass(frozen=True, kw_only=True, slots=True)
class Gap:
    """`max_abs_diff`, `mean_abs_diff`: of the log-probability of the token itself, in nats.

    `argmax_mismatches`: at how many tokens the engine's likeliest one is less likely than another in training.
    `kl`: the mean over tokens, in nats, of KL(engine || training) on the engine's K likeliest tokens and one event for
    all the others together. No sampling is in it, and it is never above the KL of the whole vocabulary (Cover and
    Thomas 2006, section 2.7: the log sum inequality); the two are equal where the others keep their proportions.
    """

    tokens: int
    max_abs_diff: float
    mean_abs_diff: float
    argmax_mismatches: int
    kl: float


class TrainingForward:
    """Raises ConfigError for an int8 checkpoint, which has nothing that could be trained."""

    def __init__(self, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> None:
        weights = stored_weights(checkpoint)
        with torch.device("meta"):
            self._decoder = Decoder(checkpoint.spec)
        for name, module in self._decoder.named_modules():
            if name == "lm_head" and checkpoint.spec.tie_word_embeddings:
                continue
            for kind, empty in list(module.named_parameters(recurse=False)):
                value = weights(f"{name}.{kind}", tuple(empty.shape)).to(device, dtype)
                setattr(module, kind, nn.Parameter(value, requires_grad=False))
        self._decoder.tie_weights()
        self._device = device

    @torch.no_grad()
    def gap(self, sequences: Sequence[Scored]) -> Gap:
        """Raises ModelOutputError where either side says what is no number."""
        rows_R3 = torch.cat([rows for pack in _packs(sequences) for rows in self._compare(pack)])
        differences, mismatches, divergences = rows_R3.unbind(1)
        if not rows_R3.isfinite().all():
            raise ModelOutputError("the log-probabilities of this model are not finite; its weights may be damaged")
        return Gap(
            tokens=len(rows_R3),
            max_abs_diff=float(differences.max()),
            mean_abs_diff=float(differences.mean()),
            argmax_mismatches=int(mismatches.sum()),
            kl=float(divergences.mean()),
        )

    def _compare(self, sequences: Sequence[Scored]) -> Iterator[Tensor]:
        """Yields [C, 3] float64 on CPU: absolute difference, mismatch (0 or 1) and KL of every token scored."""
        starts = [0, *accumulate(len(sequence.token_ids) for sequence in sequences)]
        context = DenseContext(starts)
        ids_T = torch.tensor([token for sequence in sequences for token in sequence.token_ids], device=self._device)
        hidden_TD = self._decoder(ids_T, context.positions_T.to(self._device), context)
        scored = [
            (start + place - 1, said)  # a token is predicted where the one before it stands
            for start, sequence in zip(starts, sequences, strict=False)
            for place, said in sequence.said.items()
        ]
        for first in range(0, len(scored), _CHUNK_ROWS):
            chunk = scored[first : first + _CHUNK_ROWS]
            rows_C = torch.tensor([row for row, _ in chunk], device=self._device)
            logprobs_CV = self._decoder.logits(hidden_TD[rows_C]).float().log_softmax(dim=-1)
            yield _differences(logprobs_CV, [said for _, said in chunk]).cpu()


def _packs(sequences: Sequence[Scored]) -> Iterator[list[Scored]]:
    """Those with something said of them, in packs of so many tokens, or one longer sequence."""
    pack: list[Scored] = []
    tokens = 0
    for sequence in filter(lambda sequence: sequence.said, sequences):
        if pack and tokens + len(sequence.token_ids) > _FORWARD_TOKENS:
            yield pack
            pack, tokens = [], 0
        pack.append(sequence)
        tokens += len(sequence.token_ids)
    if pack:
        yield pack


def _differences(trained_CV: Tensor, said_C: Sequence[TokenLogprobs]) -> Tensor:
    device = trained_CV.device
    targets_C1 = torch.tensor([[said.token_id] for said in said_C], device=device)
    target_C = torch.tensor([said.logprob for said in said_C], dtype=torch.float64, device=device)
    top_ids_CK = torch.tensor([[token for token, _ in said.top] for said in said_C], device=device)
    top_CK = torch.tensor([[logprob for _, logprob in said.top] for said in said_C], dtype=torch.float64, device=device)
    trained_C = trained_CV.gather(1, targets_C1)[:, 0].double()
    likeliest_C = trained_CV.gather(1, top_ids_CK[:, :1])[:, 0]
    return torch.stack(
        [
            (target_C - trained_C).abs(),
            (likeliest_C < trained_CV.amax(1)).double(),
            _partial_kl(top_CK, trained_CV.gather(1, top_ids_CK).double()),
        ],
        dim=1,
    )


def _partial_kl(p_CK: Tensor, q_CK: Tensor) -> Tensor:
    """KL(p || q) of the K events, given by their log-probabilities, and of their complement."""
    rest_p_C, rest_q_C = ((1 - x_CK.exp().sum(1)).clamp(min=_LEAST_REST) for x_CK in (p_CK, q_CK))
    terms_CK = torch.where(p_CK == -math.inf, 0.0, p_CK.exp() * (p_CK - q_CK))
    return terms_CK.sum(1) + rest_p_C * (rest_p_C / rest_q_C).log()
