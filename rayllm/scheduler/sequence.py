"""What the scheduler knows of a request: a group of `n` sequences, each with its tokens and its blocks.

Plain state with the rules that need nothing but itself (seeds, stops, the digest chain). Who may run when is the
scheduler's business. The prompt is shared by the group and never copied here.
"""

import secrets
import time
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from enum import Enum, auto
from hashlib import blake2b

from rayllm.core.errors import InvalidRequestError
from rayllm.core.types import FinishReason, Request, TokenLogprobs
from rayllm.scheduler.batch import PositionLogprobs, SamplerSpec
from rayllm.scheduler.block_manager import BlockManager, block_hash

_UINT64 = (1 << 64) - 1


class Status(Enum):
    HELD = auto()  # waits for a sibling to compute the prompt
    WAITING = auto()  # in the waiting queue
    RUNNING = auto()  # admitted: holds blocks, and a row on the ranks
    FINISHED = auto()  # finished or aborted; holds blocks only while a step with it is in flight


@dataclass(kw_only=True, slots=True)
class SequenceOutput:
    """One new token of one sequence; None where the model gave nothing to choose from, which ends it by ERROR.

    `token_id` is always part of the output, a stop token too; `stop_token` repeats it where it ended the sequence.
    `prompt_logprobs`, if asked for, come once, with the first output of the first sequence of the request: one entry
    for each prompt token, None for those before `prompt_logprobs_start`.
    `num_cached_tokens`: how many of the prompt's tokens were found in the prefix cache.
    `queue_s`: how long the sequence waited before it was admitted the first time.
    """

    request_id: str
    index: int
    token_id: int | None
    logprobs: TokenLogprobs | None
    prompt_logprobs: list[TokenLogprobs | None] | None
    finish_reason: FinishReason | None
    stop_token: int | None
    num_cached_tokens: int
    num_prompt_tokens: int
    queue_s: float


@dataclass(eq=False, kw_only=True, slots=True)
class SequenceGroup:
    """The sequences of one request that are not finished, by index; `held` ones are among them."""

    request: Request
    weight_version: str
    stop_ids: frozenset[int]
    max_len: int  # tokens, prompt included, at which a sequence ends
    prompt_logprobs: list[TokenLogprobs | None] | None  # those known; None: not asked for, or handed out already
    sequences: dict[int, "Sequence"] = field(default_factory=dict)
    held: list["Sequence"] = field(default_factory=list)
    num_queued: int = 0  # of them in the waiting queue
    arrival: float = field(default_factory=time.monotonic)

    @property
    def num_prompt_logprobs(self) -> int:
        return 0 if self.prompt_logprobs is None else len(self.prompt_logprobs)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Some are still to be computed."""
        return self.prompt_logprobs is not None and len(self.prompt_logprobs) < len(self.request.prompt_token_ids)

    def add_prompt_logprobs(self, end: int, chunk: Tokens[PositionLogprobs]) -> None:
        """`chunk`: of the tokens that are not known yet, up to the one that position `end` - 1 predicts."""
        assert self.prompt_logprobs is not None
        known = len(self.prompt_logprobs)
        expected = max(0, min(end + 1, len(self.request.prompt_token_ids)) - known)
        assert len(chunk) == expected, f"{len(chunk)} prompt logprobs after token {known}, {expected} were expected"
        self.prompt_logprobs.extend(map(token_logprobs, chunk))


@dataclass(eq=False, kw_only=True, slots=True)
class Sequence:
    """`num_sent_tokens`: how many tokens the ranks hold, their copy of the sequence.

    `digests` is the chain of the block hashes known so far, the root first: `digests[i + 1]` is that of block i. The
    first `num_cached_blocks` blocks were offered to the cache or came from it.
    """

    seq_id: int
    group: SequenceGroup
    index: int
    seed: int  # 64 bits, unsigned
    prompt_token_ids: Tokens[int]
    output_token_ids: list[int] = field(default_factory=list)
    status: Status = Status.HELD
    in_flight: bool = False  # part of a step that is not committed
    num_computed_tokens: int = 0
    num_sent_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    num_cached_blocks: int = 0
    num_cached_tokens: int | None = None  # prompt tokens found in the cache at the first admission
    queue_s: float = 0.0  # until the first admission

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    def tokens(self, start: int, stop: int) -> Tokens[int]:
        prompt_len = len(self.prompt_token_ids)
        if stop <= prompt_len:
            return self.prompt_token_ids[start:stop]
        if start >= prompt_len:
            return self.output_token_ids[start - prompt_len : stop - prompt_len]
        return [*self.prompt_token_ids[start:], *self.output_token_ids[: stop - prompt_len]]

    def extend_digests(self, num_blocks: int, block_size: int) -> None:
        """Makes the digests of the first `num_blocks` blocks known; the root and those blocks' tokens are."""
        digests = self.digests
        for block in range(len(digests) - 1, num_blocks):
            digests.append(block_hash(digests[-1], self.tokens(block * block_size, (block + 1) * block_size)))

    def append(self, token_id: int) -> FinishReason | None:
        """Adds a sampled token. A stop token counts only once min_tokens are out."""
        is_stop = token_id in self.group.stop_ids and len(self.output_token_ids) >= self.group.request.params.min_tokens
        self.output_token_ids.append(token_id)
        if is_stop:
            return FinishReason.STOP
        return FinishReason.LENGTH if self.num_tokens >= self.group.max_len else None

    def reset(self) -> None:
        """Back to no blocks and nothing computed; the tokens stay. The next admission sets all the rest."""
        self.block_table = []
        self.num_computed_tokens = 0
        self.in_flight = False

    def check_integrity(self, blocks: BlockManager) -> None:
        """Raises AssertionError unless the blocks of a running sequence are what its tokens ask for."""
        name, size = f"sequence {self.seq_id}", blocks.block_size
        num_tokens, num_blocks = self.num_tokens, len(self.block_table)
        assert self.num_computed_tokens < num_tokens, f"{name}: all is computed, nothing to do"
        fewest = -(-(num_tokens if self.in_flight else num_tokens - 1) // size)  # the last token's may still be missing
        assert fewest <= num_blocks <= -(-num_tokens // size), f"{name}: {num_blocks} blocks for {num_tokens} tokens"
        num_full = self.num_computed_tokens // size
        digests = self.digests[:1]
        for block in range(num_full):
            digests.append(block_hash(digests[-1], self.tokens(block * size, (block + 1) * size)))
            digest = blocks.digest(self.block_table[block])
            assert digest in (None, digests[-1]), f"{name}: block {block} is cached under another content"
        assert digests == self.digests[: num_full + 1], f"{name}: a digest is wrong"
        for block in self.block_table[num_full:]:
            assert blocks.digest(block) is None, f"{name}: block {block} is cached before it is computed"

    def sampler_spec(self) -> SamplerSpec:
        params = self.group.request.params
        return SamplerSpec(
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            repetition_penalty=params.repetition_penalty,
            frequency_penalty=params.frequency_penalty,
            presence_penalty=params.presence_penalty,
            logit_bias=dict(params.logit_bias),
            seed=self.seed,
            min_tokens=params.min_tokens,
            suppressed=sorted(self.group.stop_ids),
            logprobs=params.logprobs,
            logprob_token_ids=list(params.logprob_token_ids),
            prompt_logprobs=params.prompt_logprobs if self.group.wants_prompt_logprobs else None,
            prompt_logprobs_start=self.group.num_prompt_logprobs,
        )


def new_group(
    request: Request, first_seq_id: int, *, weight_version: str, eos_token_ids: frozenset[int], max_sequence_len: int
) -> SequenceGroup:
    """The request's `n` sequences, all held. `max_sequence_len`: tokens, whatever the request asks for.

    Raises InvalidRequestError for a sequence to be resumed whose tokens had ended it.
    """
    params = request.params
    prompt_len = len(request.prompt_token_ids)
    wanted = max_sequence_len if params.max_tokens is None else prompt_len + params.max_tokens
    stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos_token_ids)
    group = SequenceGroup(
        request=request,
        weight_version=weight_version,
        stop_ids=stop_ids,
        max_len=min(wanted, max_sequence_len),
        prompt_logprobs=None if params.prompt_logprobs is None else [None] * params.prompt_logprobs_start,
    )
    seed = secrets.randbits(64) if params.seed is None else params.seed & _UINT64
    for index, token_ids in request.started.items():
        if any(token_id in stop_ids for token_id in token_ids[params.min_tokens :]):
            raise InvalidRequestError("resume", f"sequence {index} holds a token that had ended it")
        sequence = Sequence(
            seq_id=first_seq_id + index,
            group=group,
            index=index,
            seed=sequence_seed(seed, index),
            prompt_token_ids=request.prompt_token_ids,
            output_token_ids=list(token_ids),
        )
        group.sequences[index] = sequence
        group.held.append(sequence)
    return group


def sequence_seed(seed: int, index: int) -> int:
    """Of one of a request's n sequences; the first keeps the request's own, so that n = 1 is the first of any n."""
    if index == 0:
        return seed
    digest = blake2b(seed.to_bytes(8, "little") + index.to_bytes(8, "little"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def token_logprobs(position: PositionLogprobs) -> TokenLogprobs:
    return TokenLogprobs(
        token_id=position.token_id, logprob=position.logprob, rank=position.rank, top=tuple(position.top)
    )
