"""Continuous batching: which tokens of which sequences each step computes.

`schedule()` fills a step's token budget with the running sequences first (decodes, then prompts partly computed), then
with admissions from the waiting queue, first come first served; prompts are cut into chunks that fit. `commit()`
takes the ranks' answer. Up to `in_flight` steps may lie between the two, each with sequences of its own.

A request keeps the weights that it began with, and a step is computed by one version of them: while requests of two
versions are live, their steps take turns.

A sequence gets the blocks of all its known tokens when it is admitted, so only a decode that crosses a block boundary
can find the memory exhausted. Then the sequence admitted last gives its blocks back and waits again, at the front of
the queue, with its tokens kept. The one admitted first always advances, hence everything ends: every request that
passes `rayllm.core.limits` fits alone.

Knows nothing of text, time limits, devices or ranks; ids in, ids out. Not thread-safe.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice

from rayllm.core.config import SchedulerConfig
from rayllm.core.errors import InvalidRequestError
from rayllm.core.types import FinishReason, Request
from rayllm.scheduler.batch import NO_TOKEN, Batch, NewSequence, ScheduledSequence, SequenceResult, StepResult
from rayllm.scheduler.block_manager import BlockManager, block_hash, root_hash
from rayllm.scheduler.sequence import Sequence, SequenceGroup, SequenceOutput, Status, new_group, token_logprobs
from rayllm.scheduler.waiting_queue import WaitingQueue

__all__ = ["Scheduler", "SequenceOutput"]


@dataclass(kw_only=True, slots=True)
class _Step:
    """A batch in the making."""

    weight_version: str
    budget: int  # tokens left
    new: list[NewSequence] = field(default_factory=list)
    parts: list[tuple[ScheduledSequence, Sequence]] = field(default_factory=list)


class Scheduler:
    """`cache_key(prompt_len)`: what a prefix's KV depends on besides its tokens and the weights; asked at each
    admission. `weight_version`: the weights of requests that name none; may be set at any time."""

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        num_blocks: int,
        block_size: int,
        max_model_len: int,
        eos_token_ids: frozenset[int],
        in_flight: int = 1,
        cache_key: Callable[[int], bytes] = lambda prompt_len: b"",
        weight_version: str = "",
    ) -> None:
        self.weight_version = weight_version
        self.prefix_query_tokens = 0  # prompt tokens looked up in the prefix cache
        self.prefix_hit_tokens = 0  # and found
        self.preemptions = 0
        self.num_blocks = num_blocks
        self._config = config
        self._block_size = block_size
        self._max_sequence_len = min(max_model_len, num_blocks * block_size)
        self._eos_token_ids = eos_token_ids
        self._max_in_flight = in_flight
        self._cache_key = cache_key
        self._blocks = BlockManager(num_blocks, block_size)
        self._groups: dict[str, SequenceGroup] = {}
        self._waiting = WaitingQueue(max_requests=config.max_waiting_requests, max_tokens=config.max_waiting_tokens)
        self._running: dict[int, Sequence] = {}  # by seq_id, in the order of admission
        self._dying: dict[int, Sequence] = {}  # aborted in flight: they keep row and blocks until the step is committed
        self._in_flight: deque[tuple[Batch, list[Sequence]]] = deque()
        self._released: list[int] = []  # what the next batch tells the ranks
        self._refused: tuple[int, int, int] | None = None  # see _take_blocks
        self._num_live = 0
        self._live_versions: Counter[str] = Counter()  # how many requests each has
        self._last_version = weight_version  # of the last step
        self._next_seq_id = 0
        self._next_step_id = 0

    @property
    def has_work(self) -> bool:
        return bool(self._groups or self._in_flight)

    @property
    def live_versions(self) -> set[str]:
        """The weights that unfinished requests have."""
        return set(self._live_versions)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that hold no blocks: queued, preempted, or held until a sibling has computed their prompt."""
        return self._num_live - len(self._running)

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens of the requests in the queue."""
        return self._waiting.num_tokens

    @property
    def free_blocks(self) -> int:
        return self._blocks.num_free

    def add(self, request: Request) -> None:
        """Queues the request's `n` sequences; it has passed `ModelLimits.check` and `check_resume`.

        Raises InvalidRequestError if its id is live or it resumes what had ended, CapacityError if the queue is full.
        """
        if request.request_id in self._groups:
            raise InvalidRequestError(
                "request_id", f"{request.request_id!r} is in use by a request that is not finished"
            )
        prompt_len = len(request.prompt_token_ids)
        assert 0 < prompt_len < self._max_sequence_len, f"a prompt of {prompt_len} tokens was let through"
        self._waiting.check_room(prompt_len, self._max_running - len(self._running))
        group = new_group(
            request,
            self._next_seq_id,
            weight_version=self.weight_version if request.weight_version is None else request.weight_version,
            eos_token_ids=self._eos_token_ids,
            max_sequence_len=self._max_sequence_len,
        )
        self._next_seq_id += request.params.n
        self._num_live += len(group.sequences)
        self._groups[request.request_id] = group
        self._live_versions[group.weight_version] += 1
        self._waiting.append(group.held.pop(0))

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Ends one sequence of a request, or all; no output follows. What is not (or no longer) live is ignored.

        Blocks are free at once, or when the step in flight that uses them is committed.
        """
        group = self._groups.get(request_id)
        if group is None:
            return
        for sequence in list(group.sequences.values()):
            if index is None or sequence.index == index:
                self._abort(sequence)
        if group.held and len(group.held) == len(group.sequences):  # nobody computes the prompt any more
            self._waiting.appendleft(group.held.pop(0))

    def prompt_digests(self, request: Request, weight_version: str, *, max_blocks: int) -> list[bytes]:
        """Of the first blocks of a prompt that a prefix cache could spare it, the same in every process."""
        prompt, params = request.prompt_token_ids, request.params
        max_hit_tokens = len(prompt) - 1 if params.prompt_logprobs is None else params.prompt_logprobs_start - 1
        size, digests = self._block_size, [self._root(weight_version, len(prompt))]
        for block in range(min(max_hit_tokens // size, max_blocks)):
            digests.append(block_hash(digests[-1], prompt[block * size : (block + 1) * size]))
        return digests[1:]

    def cached_blocks(self, digests: Iterable[bytes]) -> int:
        """How many of a prompt's first blocks are in the prefix cache now."""
        return len(self._blocks.match(digests))

    def recent_digests(self, limit: int) -> list[bytes]:
        """Of at most so many blocks of the prefix cache, those computed or found last first."""
        return self._blocks.recent_digests(limit)

    def schedule(self) -> Batch | None:
        """The next step; None if nothing can be scheduled before a step in flight is committed, or at all."""
        if len(self._in_flight) == self._max_in_flight:
            return None
        for weight_version in sorted(self._live_versions, key=lambda version: version == self._last_version):
            step = _Step(weight_version=weight_version, budget=self._config.max_num_batched_tokens)
            self._schedule_running(step)
            self._admit(step)  # nobody just preempted: such a one is first in the queue, its blocks not all free
            if step.parts:
                return self._launched(step)
        return None

    def commit(self, result: StepResult) -> list[SequenceOutput]:
        """Takes the answer to the oldest step in flight: a new token for each sequence that sampled."""
        batch, sequences = self._in_flight.popleft()
        assert result.step_id == batch.step_id, f"step {result.step_id} answered, step {batch.step_id} was expected"
        outputs = []
        for sequence, scheduled, answer in zip(sequences, batch.scheduled, result.sequences, strict=True):
            assert answer.seq_id == sequence.seq_id, f"sequence {answer.seq_id} answered for {sequence.seq_id}"
            sequence.in_flight = False
            self._computed(sequence, scheduled.start + scheduled.num_tokens)
            if sequence.status is Status.FINISHED:
                del self._dying[sequence.seq_id]
                self._free(sequence)
                continue
            group = sequence.group
            if group.wants_prompt_logprobs:
                assert answer.prompt_logprobs is not None, f"sequence {sequence.seq_id}: prompt logprobs are missing"
                group.add_prompt_logprobs(scheduled.start + scheduled.num_tokens, answer.prompt_logprobs)
            if group.held and sequence.num_computed_tokens >= len(sequence.prompt_token_ids):
                self._release_siblings(sequence)
            if scheduled.sample:
                outputs.append(self._sampled(sequence, answer))
        return outputs

    def requeue_all(self) -> None:
        """Every running sequence waits again with its tokens, in order, before those that waited already.

        For when the ranks and all their KV are lost: steps in flight are forgotten (their answers must not be
        committed any more), and so is the prefix cache. The new ranks know no sequence.
        """
        self._in_flight.clear()
        self._released.clear()
        for sequence in self._dying.values():
            self._blocks.free(sequence.block_table)
        for sequence in reversed(self._running.values()):
            self._blocks.free(sequence.block_table)
            sequence.reset()
            self._waiting.appendleft(sequence)
        self._dying.clear()
        self._running.clear()
        self._blocks.forget_cache()

    def running_tokens(self) -> Counter[str]:
        """How many tokens each request has generated in the sequences that hold blocks, by its id."""
        tokens: Counter[str] = Counter()
        for sequence in self._running.values():
            tokens[sequence.group.request.request_id] += len(sequence.output_token_ids)
        return tokens

    def check_integrity(self) -> None:
        """Raises AssertionError that says what is wrong, if anything is. Linear in everything; for tests."""
        owners = [*self._running.values(), *self._dying.values()]
        self._blocks.check_integrity(sequence.block_table for sequence in owners)
        assert len(owners) <= self._config.max_num_seqs, f"{len(owners)} rows are in use"
        flying = {sequence.seq_id for _, sequences in self._in_flight for sequence in sequences}
        assert len(flying) == sum(len(sequences) for _, sequences in self._in_flight), "a sequence is in two steps"
        assert flying >= self._dying.keys(), "a sequence dies without a step in flight"
        for sequence in owners:
            sequence.check_integrity(self._blocks)
            assert sequence.in_flight == (sequence.seq_id in flying), f"sequence {sequence.seq_id}: in flight or not?"
        queued = list(self._waiting)
        held = [sequence for group in self._groups.values() for sequence in group.held]
        live = [sequence for group in self._groups.values() for sequence in group.sequences.values()]
        placed = [*self._running.values(), *queued, *held]
        assert len(placed) == self._num_live == len(live), f"{len(live)} sequences live, {len(placed)} have a place"
        assert set(map(id, placed)) == set(map(id, live)), "a sequence has two places, or none"
        for place, status in ((self._running.values(), Status.RUNNING), (queued, Status.WAITING), (held, Status.HELD)):
            assert all(sequence.status is status for sequence in place), f"a {status.name} sequence has another status"
        assert not any(sequence.block_table for sequence in (*queued, *held)), "a waiting sequence holds blocks"
        self._waiting.check_integrity()
        versions = Counter(group.weight_version for group in self._groups.values())
        assert versions == self._live_versions, f"requests have the weights {versions}, counted {self._live_versions}"
        for group in self._groups.values():
            leaders = [sequence for sequence in group.sequences.values() if sequence.status is not Status.HELD]
            computed = any(sequence.num_computed_tokens >= len(sequence.prompt_token_ids) for sequence in leaders)
            assert leaders, f"request {group.request.request_id!r}: all siblings are held"
            assert not (group.held and computed), f"request {group.request.request_id!r}: held after the prompt"

    def _launched(self, step: _Step) -> Batch:
        step.parts.sort(key=lambda part: part[0].num_tokens if part[0].start == 0 else 0)
        batch = Batch(
            step_id=self._next_step_id,
            released=self._released,
            new=step.new,
            scheduled=[scheduled for scheduled, _ in step.parts],
            weight_version=step.weight_version,
        )
        self._next_step_id += 1
        self._last_version = step.weight_version
        self._released = []
        self._in_flight.append((batch, [sequence for _, sequence in step.parts]))
        return batch

    def _schedule_running(self, step: _Step) -> None:
        # With several steps in flight each takes its share of the decodes, else one step would hold them all and the
        # stages of the pipeline would wait for each other.
        running = [each for each in self._running.values() if each.group.weight_version == step.weight_version]
        num_decodes = -(-len(running) // self._max_in_flight)
        prefills = []
        for sequence in running:
            if sequence.in_flight or sequence.status is not Status.RUNNING:  # the latter: preempted by one before it
                continue
            if sequence.num_tokens - sequence.num_computed_tokens > 1:
                prefills.append(sequence)
            elif num_decodes and step.budget:
                new_block_ids = self._grow(sequence)
                if new_block_ids is not None:
                    num_decodes -= 1
                    self._put(step, sequence, new_block_ids)
        for sequence in prefills:
            if step.budget:
                self._put(step, sequence, [])

    def _grow(self, sequence: Sequence) -> list[int] | None:
        """A block for the next token if it needs one, taken from later sequences if necessary. None: not now; the
        sequence keeps what it has and tries again at the next step."""
        if len(sequence.block_table) * self._block_size >= sequence.num_tokens:
            return []
        while (new_block_ids := self._blocks.take((), 1)) is None:
            victim = next(other for other in reversed(self._running.values()) if not other.in_flight)
            if victim is sequence:
                return None
            self._preempt(victim)
        sequence.block_table += new_block_ids
        return new_block_ids

    def _preempt(self, sequence: Sequence) -> None:
        del self._running[sequence.seq_id]
        self._free(sequence)
        sequence.reset()
        self._waiting.appendleft(sequence)
        self.preemptions += 1

    @property
    def _max_running(self) -> int:
        return self._config.max_num_seqs - len(self._dying)

    def _admit(self, step: _Step) -> None:
        while self._waiting and step.budget and len(self._running) < self._max_running:
            sequence = self._waiting.head
            if sequence.group.weight_version != step.weight_version or not self._take_blocks(sequence):
                return
            self._waiting.popleft()
            sequence.status = Status.RUNNING
            sequence.num_sent_tokens = sequence.num_tokens
            self._running[sequence.seq_id] = sequence
            step.new.append(
                NewSequence(
                    seq_id=sequence.seq_id,
                    token_ids=list(sequence.tokens(0, sequence.num_tokens)),
                    prompt_len=len(sequence.prompt_token_ids),
                    sampler=sequence.sampler_spec(),
                )
            )
            self._put(step, sequence, list(sequence.block_table))

    def _take_blocks(self, sequence: Sequence) -> bool:
        """Gives a waiting sequence the blocks of all its tokens, as many as possible from the prefix cache.

        One block for each running sequence stays free, so that an admission does not end in a preemption right away.
        """
        # Matching is linear in the prompt, so a refused sequence is looked at again only when something has changed.
        attempt = (sequence.seq_id, self._blocks.num_freed, len(self._running))
        if attempt == self._refused:
            return False
        hits = self._prefix_hits(sequence)
        num_blocks = -(-sequence.num_tokens // self._block_size)
        block_table = self._blocks.take(hits, num_blocks - len(hits), reserve=len(self._running))
        if block_table is None:
            self._refused = attempt
            return False
        sequence.block_table = block_table
        sequence.num_cached_blocks = len(hits)
        sequence.num_computed_tokens = len(hits) * self._block_size
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = min(sequence.num_computed_tokens, len(sequence.prompt_token_ids))
            sequence.queue_s = time.monotonic() - sequence.group.arrival
            group = sequence.group
            self.prefix_query_tokens += (
                group.num_prompt_logprobs - 1 if group.wants_prompt_logprobs else sequence.num_tokens
            )
            self.prefix_hit_tokens += sequence.num_computed_tokens
        return True

    def _prefix_hits(self, sequence: Sequence) -> list[int]:
        root = self._root(sequence.group.weight_version, len(sequence.prompt_token_ids))
        if not sequence.digests or sequence.digests[0] != root:
            sequence.digests = [root]
        max_hit_tokens = sequence.num_tokens - 1  # the last token's logits are needed
        if sequence.group.wants_prompt_logprobs:  # so are those of the prompt whose logprobs are not known yet
            max_hit_tokens = min(max_hit_tokens, sequence.group.num_prompt_logprobs - 1)
        max_hits = max_hit_tokens // self._block_size
        sequence.extend_digests(max_hits, self._block_size)
        return self._blocks.match(islice(sequence.digests, 1, max_hits + 1))

    def _root(self, weight_version: str, prompt_len: int) -> bytes:
        return root_hash(weight_version.encode() + b"\0" + self._cache_key(prompt_len))

    def _put(self, step: _Step, sequence: Sequence, new_block_ids: list[int]) -> None:
        start = sequence.num_computed_tokens
        num_left = sequence.num_tokens - start
        num_tokens = min(num_left, step.budget)
        scheduled = ScheduledSequence(
            sequence.seq_id,
            start,
            num_tokens,
            list(sequence.tokens(sequence.num_sent_tokens, sequence.num_tokens)),
            new_block_ids,
            num_tokens == num_left,
        )
        step.parts.append((scheduled, sequence))
        step.budget -= num_tokens
        sequence.num_sent_tokens = sequence.num_tokens
        sequence.in_flight = True

    def _computed(self, sequence: Sequence, num_tokens: int) -> None:
        """The KV of the first `num_tokens` tokens is there: the blocks that became full can be shared."""
        sequence.num_computed_tokens = num_tokens
        num_full = num_tokens // self._block_size
        if num_full > sequence.num_cached_blocks:
            sequence.extend_digests(num_full, self._block_size)
            for block in range(sequence.num_cached_blocks, num_full):
                self._blocks.cache(sequence.block_table[block], sequence.digests[block + 1])
            sequence.num_cached_blocks = num_full

    def _release_siblings(self, leader: Sequence) -> None:
        """The prompt is in the cache: the held siblings go to the front of the queue and will find it there."""
        group = leader.group
        num_prompt_blocks = len(leader.prompt_token_ids) // self._block_size
        for sibling in reversed(group.held):
            sibling.digests = leader.digests[: num_prompt_blocks + 1]
            self._waiting.appendleft(sibling)
        group.held.clear()

    def _sampled(self, sequence: Sequence, answer: SequenceResult) -> SequenceOutput:
        token_id = answer.token_id
        assert token_id is not None, f"no token was sampled for sequence {sequence.seq_id}"
        assert sequence.num_cached_tokens is not None
        group = sequence.group
        prompt_logprobs, group.prompt_logprobs = group.prompt_logprobs, None
        finish_reason = FinishReason.ERROR if token_id == NO_TOKEN else sequence.append(token_id)
        if finish_reason is not None:
            del self._running[sequence.seq_id]
            self._free(sequence)
            self._forget(sequence)
        return SequenceOutput(
            request_id=group.request.request_id,
            index=sequence.index,
            token_id=None if token_id == NO_TOKEN else token_id,
            logprobs=None if answer.logprobs is None else token_logprobs(answer.logprobs),
            prompt_logprobs=prompt_logprobs,
            finish_reason=finish_reason,
            stop_token=token_id if finish_reason is FinishReason.STOP else None,
            num_cached_tokens=sequence.num_cached_tokens,
            queue_s=sequence.queue_s,
            num_prompt_tokens=len(sequence.prompt_token_ids),
        )

    def _abort(self, sequence: Sequence) -> None:
        if sequence.status is Status.HELD:
            sequence.group.held.remove(sequence)
        elif sequence.status is Status.WAITING:
            self._waiting.remove(sequence)
        else:
            del self._running[sequence.seq_id]
            if sequence.in_flight:
                self._dying[sequence.seq_id] = sequence
            else:
                self._free(sequence)
        self._forget(sequence)

    def _free(self, sequence: Sequence) -> None:
        self._blocks.free(sequence.block_table)
        self._released.append(sequence.seq_id)

    def _forget(self, sequence: Sequence) -> None:
        group = sequence.group
        sequence.status = Status.FINISHED
        self._num_live -= 1
        del group.sequences[sequence.index]
        if not group.sequences:
            del self._groups[group.request.request_id]
            self._live_versions[group.weight_version] -= 1
            if not self._live_versions[group.weight_version]:
                del self._live_versions[group.weight_version]
