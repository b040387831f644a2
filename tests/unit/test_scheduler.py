"""The scheduler with lists of ints. The ranks are played by a model whose KV is a fingerprint of the whole prefix, so
that a block shared wrongly, too early or after its memory was reused is noticed at the step that reads it."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import accumulate

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rayllm.core.config import SchedulerConfig
from rayllm.core.errors import CapacityError, InvalidRequestError
from rayllm.core.types import FinishReason, Request, SamplingParams, TokenLogprobs
from rayllm.scheduler import waiting_queue
from rayllm.scheduler.batch import Batch, NewSequence, PositionLogprobs, SamplerSpec, SequenceResult, StepResult
from rayllm.scheduler.scheduler import Scheduler, SequenceOutput
from rayllm.scheduler.sequence import sequence_seed

VOCAB = 12
EOS = 0


def mix(*numbers: int) -> int:
    """The same in every process, and well spread; Python's hash of a tuple is neither."""
    return int.from_bytes(blake2b(repr(numbers).encode(), digest_size=8).digest(), "little")


def fingerprints(tokens: Sequence[int], weights: str = "") -> list[int]:
    return list(accumulate(tokens, mix, initial=mix(*weights.encode())))[1:]


def next_token(fingerprint: int, seed: int, suppressed: Sequence[int]) -> int:
    allowed = [token for token in range(VOCAB) if token not in suppressed]
    return allowed[mix(fingerprint, seed) % len(allowed)]


def score(fingerprint: int, token: int) -> PositionLogprobs:
    return PositionLogprobs(token, -(mix(fingerprint, token) % 100) / 10, 1, [(token, -0.5)])


def reference(
    prompt: Sequence[int], params: SamplingParams, index: int = 0, max_len: int = 1 << 30, weights: str = ""
) -> list[int]:
    """What the model generates, without any scheduling."""
    stops = {*params.stop_token_ids, *(() if params.ignore_eos else (EOS,))}
    seed = sequence_seed(params.seed % (1 << 64), index)
    tokens = list(prompt)
    while len(tokens) - len(prompt) != params.max_tokens and len(tokens) < max_len:
        early = len(tokens) - len(prompt) < params.min_tokens
        tokens.append(next_token(fingerprints(tokens, weights)[-1], seed, stops if early else ()))
        if tokens[-1] in stops:
            break
    return tokens[len(prompt) :]


def reference_prompt_logprobs(prompt: Sequence[int], start: int = 1, weights: str = "") -> list[TokenLogprobs | None]:
    prints = fingerprints(prompt, weights)
    scores = [score(fingerprint, token) for fingerprint, token in zip(prints, prompt[1:], strict=False)]
    known = [TokenLogprobs(token_id=s.token_id, logprob=s.logprob, rank=1, top=tuple(s.top)) for s in scores]
    return [*[None] * start, *known[start - 1 :]]


@dataclass
class Row:
    tokens: list[int]
    prompt_len: int
    sampler: SamplerSpec
    block_table: list[int] = field(default_factory=list)


class Ranks:
    """Knows of the scheduler only what the batches say."""

    def __init__(self, *, block_size: int, max_num_seqs: int):
        self.block_size = block_size
        self.max_num_seqs = max_num_seqs
        self.rows: dict[int, Row] = {}
        self.kv: dict[int, int] = {}
        self.num_computed = 0

    def execute(self, batch: Batch) -> StepResult:
        batch = msgspec.msgpack.decode(msgspec.msgpack.encode(batch), type=Batch)
        for seq_id in batch.released:
            del self.rows[seq_id]
        for new in batch.new:
            assert new.seq_id not in self.rows
            self.rows[new.seq_id] = Row(new.token_ids, new.prompt_len, new.sampler)
        assert len(self.rows) <= self.max_num_seqs
        assert len({s.seq_id for s in batch.scheduled}) == len(batch.scheduled)
        from_the_start = [s.num_tokens if s.start == 0 else 0 for s in batch.scheduled]
        assert from_the_start == sorted(from_the_start)
        return StepResult(batch.step_id, [self._run(each, batch.weight_version) for each in batch.scheduled])

    def _run(self, scheduled, weights: str) -> SequenceResult:
        row = self.rows[scheduled.seq_id]
        row.tokens += scheduled.new_token_ids
        row.block_table += scheduled.new_block_ids
        stop = scheduled.start + scheduled.num_tokens
        assert scheduled.num_tokens > 0
        assert stop <= len(row.block_table) * self.block_size
        assert scheduled.sample == (stop == len(row.tokens))
        slots = [row.block_table[p // self.block_size] * self.block_size + p % self.block_size for p in range(stop)]
        prints = fingerprints(row.tokens[:stop], weights)
        past = [self.kv.get(slot) for slot in slots[: scheduled.start]]
        assert past == prints[: scheduled.start], "the KV in the blocks is not of the sequence's tokens and weights"
        for position in range(scheduled.start, stop):
            self.kv[slots[position]] = prints[position]
        self.num_computed += scheduled.num_tokens
        scores = None
        if row.sampler.prompt_logprobs is not None:
            first = max(scheduled.start, row.sampler.prompt_logprobs_start - 1)
            positions = range(first, min(stop, row.prompt_len - 1))
            scores = [score(prints[p], row.tokens[p + 1]) for p in positions]
        if not scheduled.sample:
            return SequenceResult(scheduled.seq_id, None, None, scores)
        early = len(row.tokens) - row.prompt_len < row.sampler.min_tokens
        token = next_token(prints[-1], row.sampler.seed, row.sampler.suppressed if early else ())
        logprobs = None if row.sampler.logprobs is None else score(prints[-1], token)
        return SequenceResult(scheduled.seq_id, token, logprobs, scores)


class Engine:
    """Scheduler and ranks together; collects what each sequence put out. The integrity is checked after every call."""

    def __init__(self, *, num_blocks=64, block_size=4, max_model_len=200, in_flight=1, cache_key=None, **config):
        config = SchedulerConfig(**{"max_num_batched_tokens": 64, "max_num_seqs": 8, **config})
        extra = {} if cache_key is None else {"cache_key": cache_key}
        self.scheduler = Scheduler(
            config,
            num_blocks=num_blocks,
            block_size=block_size,
            max_model_len=max_model_len,
            eos_token_ids=frozenset({EOS}),
            in_flight=in_flight,
            **extra,
        )
        self.new_ranks = lambda: Ranks(block_size=block_size, max_num_seqs=config.max_num_seqs)
        self.ranks = self.new_ranks()
        self.pending: deque[StepResult] = deque()
        self.weights: dict[str, str] = {}  # of each request
        self.outputs: dict[tuple[str, int], list[SequenceOutput]] = {}

    def add(self, request_id: str, prompt: Sequence[int], **params) -> Request:
        params = SamplingParams(**{"seed": 1, "max_tokens": 8, "ignore_eos": True, **params})
        request = Request(request_id=request_id, prompt_token_ids=tuple(prompt), params=params)
        self.scheduler.add(request)
        self.weights[request_id] = self.scheduler.weight_version
        self.scheduler.check_integrity()
        return request

    def abort(self, request_id: str, index: int | None = None) -> None:
        self.scheduler.abort(request_id, index)
        self.scheduler.check_integrity()

    def schedule(self) -> Batch | None:
        batch = self.scheduler.schedule()
        self.scheduler.check_integrity()
        if batch is not None:
            self.pending.append(self.ranks.execute(batch))
        return batch

    def commit(self) -> list[SequenceOutput]:
        outputs = self.scheduler.commit(self.pending.popleft())
        self.scheduler.check_integrity()
        for output in outputs:
            self.outputs.setdefault((output.request_id, output.index), []).append(output)
        return outputs

    def step(self) -> Batch | None:
        batch = self.schedule()
        if self.pending:
            self.commit()
        return batch

    def lose_ranks(self) -> None:
        self.scheduler.requeue_all()
        self.scheduler.check_integrity()
        self.ranks = self.new_ranks()
        self.pending.clear()

    def drain(self, max_steps: int = 3000) -> None:
        for _ in range(max_steps):
            if not self.scheduler.has_work:
                break
            self.step()
        scheduler = self.scheduler
        assert not scheduler.has_work, "work is left, but it does not advance"
        assert (scheduler.num_running, scheduler.num_waiting, scheduler.waiting_tokens) == (0, 0, 0)
        assert scheduler.free_blocks == scheduler.num_blocks

    def tokens(self, request_id: str, index: int = 0) -> list[int]:
        return [output.token_id for output in self.outputs.get((request_id, index), [])]

    def check(self, request: Request, index: int = 0) -> None:
        expected = reference(request.prompt_token_ids, request.params, index, weights=self.weights[request.request_id])
        assert self.tokens(request.request_id, index) == expected


def shape(batch: Batch | None) -> list[tuple[int, int, int, bool]]:
    assert batch is not None
    return [(s.seq_id, s.start, s.num_tokens, s.sample) for s in batch.scheduled]


def test_a_request_from_prompt_to_end():
    engine = Engine()
    request = engine.add("a", range(1, 11), max_tokens=3, logprobs=1)
    assert engine.scheduler.waiting_tokens == 10
    assert (engine.scheduler.num_waiting, engine.scheduler.num_running) == (1, 0)
    first, second, third = engine.step(), engine.step(), engine.step()
    assert first.new[0].token_ids == list(range(1, 11))
    assert shape(first) == [(0, 0, 10, True)]
    assert shape(second) == [(0, 10, 1, True)]
    assert second.scheduled[0].new_token_ids == engine.tokens("a")[:1]
    assert third.scheduled[0].new_token_ids == engine.tokens("a")[1:2]
    assert engine.step() is None
    engine.check(request)
    engine.drain()
    last = engine.outputs["a", 0][-1]
    assert (last.finish_reason, last.stop_token, last.num_prompt_tokens) == (FinishReason.LENGTH, None, 10)
    assert all(output.logprobs.token_id == output.token_id for output in engine.outputs["a", 0])
    assert [output.finish_reason for output in engine.outputs["a", 0][:-1]] == [None, None]


def test_prompts_are_cut_into_chunks_and_mixed_with_decodes():
    engine = Engine(max_num_batched_tokens=8)
    requests = [engine.add("a", [1] * 3), engine.add("b", [2] * 20), engine.add("c", [3] * 2)]
    assert shape(engine.step()) == [(0, 0, 3, True), (1, 0, 5, False)]
    assert shape(engine.step()) == [(0, 3, 1, True), (1, 5, 7, False)]
    assert shape(engine.step()) == [(0, 4, 1, True), (1, 12, 7, False)]
    assert shape(engine.step()) == [(0, 5, 1, True), (1, 19, 1, True), (2, 0, 2, True)]
    assert shape(engine.step()) == [(0, 6, 1, True), (1, 20, 1, True), (2, 2, 1, True)]
    engine.drain()
    for request in requests:
        engine.check(request)


def test_prompts_of_which_nothing_is_cached_end_a_step_the_longest_last():
    engine = Engine()
    requests = [engine.add("old", range(1, 10), max_tokens=30)]
    engine.step()
    for name, tokens in [("long", [5] * 9), ("hit", range(1, 12)), ("short", [6] * 2), ("middle", [7] * 4)]:
        requests.append(engine.add(name, tokens))
    assert shape(engine.step()) == [(0, 9, 1, True), (2, 8, 3, True), (3, 0, 2, True), (4, 0, 4, True), (1, 0, 9, True)]
    engine.drain()
    for request in requests:
        engine.check(request)


@pytest.mark.parametrize("budget", [1, 2, 3, 7, 16])
def test_the_budget_is_never_passed_and_nobody_starves(budget):
    engine = Engine(max_num_batched_tokens=budget, num_blocks=40)
    requests = [engine.add(str(i), [i % 5 + 1] * (3 * i + 1), max_tokens=5) for i in range(9)]
    while engine.scheduler.has_work:
        batch = engine.step()
        assert sum(s.num_tokens for s in batch.scheduled) <= budget
    engine.drain()
    for request in requests:
        engine.check(request)
    assert list(engine.outputs) == [(str(i), 0) for i in range(9)], "first tokens come in the order of arrival"


def test_the_number_of_rows_is_bounded():
    engine = Engine(max_num_seqs=2)
    for name in "abc":
        engine.add(name, [1, 2, 3], max_tokens=4)
    engine.step()
    assert (engine.scheduler.num_running, engine.scheduler.num_waiting) == (2, 1)
    engine.schedule()
    engine.abort("a")
    engine.abort("b")
    assert engine.scheduler.num_running == 0
    assert engine.scheduler.has_work
    engine.commit()
    batch = engine.step()
    assert batch.released == [0, 1]
    assert [new.seq_id for new in batch.new] == [2]
    engine.drain()


def test_aborted_rows_count_until_their_step_is_committed():
    engine = Engine(max_num_seqs=2, in_flight=2)
    engine.add("a", [1, 2, 3])
    engine.add("b", [1, 2, 3])
    engine.schedule()
    engine.abort("a")
    engine.add("c", [1, 2, 3])
    assert engine.schedule() is None, "the ranks have no row free yet"
    engine.commit()
    assert engine.schedule().released == [0]
    engine.drain()


def test_a_step_carries_increments_only():
    engine = Engine(block_size=4)
    engine.add("a", [1] * 50, max_tokens=30)
    engine.step()
    num_blocks = 0
    for _ in range(29):
        (scheduled,) = (batch := engine.step()).scheduled
        assert batch.new == []
        assert len(scheduled.new_token_ids) == 1
        assert len(scheduled.new_block_ids) <= 1
        num_blocks += len(scheduled.new_block_ids)
    assert num_blocks == (50 + 29 + 3) // 4 - 13
    engine.drain()


# --- prefix cache


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9, 16, 17])
def test_a_repeated_prompt_hits_all_but_what_its_logits_need(length):
    engine = Engine(block_size=4)
    prompt = [i % 7 + 1 for i in range(length)]
    engine.add("a", prompt)
    engine.drain()
    request = engine.add("b", prompt)
    hits = (length - 1) // 4 * 4
    assert shape(engine.step()) == [(1, hits, length - hits, True)]
    engine.drain()
    engine.check(request)
    assert {output.num_cached_tokens for output in engine.outputs["a", 0]} == {0}
    assert {output.num_cached_tokens for output in engine.outputs["b", 0]} == {hits}
    assert (engine.scheduler.prefix_query_tokens, engine.scheduler.prefix_hit_tokens) == (2 * length, hits)


def test_generated_tokens_are_cached_too():
    engine = Engine(block_size=4)
    engine.add("turn 1", [1, 2, 3], max_tokens=10)
    engine.drain()
    history = [1, 2, 3, *engine.tokens("turn 1")]
    request = engine.add("turn 2", [*history, 5])
    engine.drain()
    engine.check(request)
    assert engine.outputs["turn 2", 0][0].num_cached_tokens == 12, "the last token's KV was never computed"


def test_nothing_is_shared_before_its_step_is_committed():
    engine = Engine(in_flight=2, max_num_batched_tokens=9)
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    engine.add("a", prompt)
    engine.add("b", prompt)
    engine.add("c", prompt)
    assert shape(engine.schedule()) == [(0, 0, 9, True)]
    assert shape(engine.schedule()) == [(1, 0, 9, True)]
    engine.commit()
    assert shape(engine.schedule()) == [(0, 9, 1, True), (2, 8, 1, True)]
    engine.drain()


def test_the_cache_key_separates():
    keys = {"weights": b"1"}
    engine = Engine(cache_key=lambda prompt_len: keys["weights"] + bytes([prompt_len > 10]))
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9]

    def cached(name: str, prompt: list[int]) -> int:
        engine.add(name, prompt)
        engine.drain()
        return engine.outputs[name, 0][0].num_cached_tokens

    assert [cached("a", prompt), cached("b", prompt)] == [0, 8]
    assert [cached("c", prompt + prompt), cached("d", prompt + prompt)] == [0, 16]
    keys["weights"] = b"2"
    assert [cached("e", prompt), cached("f", prompt)] == [0, 8]


def test_a_key_that_changes_while_a_request_waits():
    keys = [b"1"]
    engine = Engine(num_blocks=6, cache_key=lambda prompt_len: keys[0])
    engine.add("a", [1] * 20, max_tokens=5)
    engine.step()
    engine.add("b", [1] * 20, max_tokens=5)
    engine.step()
    assert engine.scheduler.num_waiting == 1
    keys[0] = b"2"
    engine.drain()
    assert engine.outputs["b", 0][0].num_cached_tokens == 0


# --- memory


def test_preemption_keeps_the_tokens_and_takes_the_last_admitted():
    engine = Engine(num_blocks=10, block_size=4)
    requests = [engine.add(name, [i + 1] * 8, max_tokens=20) for i, name in enumerate("abc")]
    preempted, batches = [], []
    while engine.scheduler.has_work:
        before = engine.scheduler.preemptions
        batches.append(engine.step())
        if engine.scheduler.preemptions > before:
            preempted.append(batches[-1].released)
    assert preempted[0] == [2]
    assert engine.scheduler.preemptions == len(preempted) > 1
    again = [new for batch in batches[1:] for new in batch.new if new.seq_id == 2]
    assert all(new.prompt_len == 8 < len(new.token_ids) for new in again)
    assert again[0].token_ids[8:] == engine.tokens("c")[: len(again[0].token_ids) - 8]
    engine.drain()
    for request in requests:
        engine.check(request)


def test_the_preempted_come_back_before_those_who_wait():
    engine = Engine(num_blocks=7, block_size=4)
    engine.add("a", [1] * 4, max_tokens=20)
    engine.add("b", [2] * 4, max_tokens=20)
    engine.step()
    engine.add("c", [3] * 20, max_tokens=2)
    order = []
    while engine.scheduler.has_work:
        order += [new.seq_id for new in engine.step().new]
    assert engine.scheduler.preemptions > 0
    assert order == [1] * (len(order) - 1) + [2]
    engine.drain()


@pytest.mark.parametrize("block_size", [1, 3, 4, 16])
@pytest.mark.parametrize("in_flight", [1, 2, 3])
def test_the_smallest_cache_serves_everyone(block_size, in_flight):
    longest = 30
    engine = Engine(num_blocks=-(-longest // block_size), block_size=block_size, in_flight=in_flight)
    requests = [engine.add(str(i), [i + 1] * (i + 2), max_tokens=longest - i - 2) for i in range(6)]
    engine.drain()
    for request in requests:
        engine.check(request)


def test_a_request_without_an_end_stops_when_the_cache_is_full():
    engine = Engine(num_blocks=3, block_size=4, max_model_len=100)
    engine.add("a", [1, 2, 3], max_tokens=None)
    engine.drain()
    assert len(engine.tokens("a")) == 9
    assert engine.outputs["a", 0][-1].finish_reason is FinishReason.LENGTH


def test_an_admission_leaves_a_block_for_each_running_sequence():
    engine = Engine(num_blocks=4, block_size=4)
    engine.add("a", [1] * 4, max_tokens=3)
    engine.add("b", [2] * 9, max_tokens=3)
    assert shape(engine.step()) == [(0, 0, 4, True)]
    assert shape(engine.step()) == [(0, 4, 1, True)]
    engine.drain()
    assert engine.scheduler.preemptions == 0


# --- n sequences of one prompt


def test_siblings_wait_for_the_prompt_and_share_its_blocks():
    engine = Engine(num_blocks=64, block_size=4, max_num_batched_tokens=8)
    request = engine.add("a", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], n=4, max_tokens=6)
    assert engine.scheduler.num_waiting == 4
    assert engine.scheduler.waiting_tokens == 10, "the prompt counts once"
    assert shape(engine.step()) == [(0, 0, 8, False)]
    assert shape(engine.step()) == [(0, 8, 2, True)]
    used = engine.scheduler.num_blocks - engine.scheduler.free_blocks
    assert shape(engine.step()) == [(0, 10, 1, True), (1, 8, 2, True), (2, 8, 2, True), (3, 8, 2, True)]
    assert engine.scheduler.num_blocks - engine.scheduler.free_blocks == used + 3
    engine.drain()
    for index in range(4):
        engine.check(request, index)
    assert engine.tokens("a", 0) == reference(request.prompt_token_ids, request.params)
    assert len({tuple(engine.tokens("a", index)) for index in range(4)}) == 4


@pytest.mark.parametrize("moment", ["queued", "in flight", "between chunks"])
def test_a_sibling_takes_over_when_the_first_is_aborted(moment):
    engine = Engine(max_num_batched_tokens=8)
    request = engine.add("a", range(1, 12), n=3)
    if moment != "queued":
        engine.schedule()
    if moment == "between chunks":
        engine.commit()
    engine.abort("a", 0)
    if moment == "in flight":
        engine.commit()
    engine.drain()
    assert engine.tokens("a", 0) == []
    engine.check(request, 1)
    engine.check(request, 2)


def test_held_siblings_can_be_aborted():
    engine = Engine(max_num_batched_tokens=8)
    request = engine.add("a", range(1, 12), n=3)
    engine.step()
    engine.abort("a", 1)
    assert engine.scheduler.num_waiting == 1
    engine.drain()
    assert engine.tokens("a", 1) == []
    engine.check(request, 0)
    engine.check(request, 2)


def test_siblings_wait_on_when_the_first_is_preempted():
    engine = Engine(num_blocks=9, block_size=2, max_num_batched_tokens=2)
    older = engine.add("old", [1, 2], max_tokens=15)
    engine.step()
    request = engine.add("a", [3] * 9, n=2, max_tokens=3)
    while not engine.scheduler.preemptions:
        engine.step()
    assert engine.tokens("a") == []
    assert engine.scheduler.num_waiting == 2
    engine.drain()
    engine.check(older)
    engine.check(request, 0)
    engine.check(request, 1)


def test_seeds():
    def specs(**params) -> list[SamplerSpec]:
        engine = Engine()
        engine.add("a", [1, 2], **params)
        batches = [engine.step(), engine.step()]
        return [new.sampler for batch in batches if batch for new in batch.new]

    assert [spec.seed for spec in specs(seed=7, n=1)] == [7]
    several = [spec.seed for spec in specs(seed=7, n=5)]
    assert several[0] == 7
    assert len(set(several)) == 5
    assert several[:3] == [spec.seed for spec in specs(seed=7, n=3)]
    assert specs(seed=-1)[0].seed == (1 << 64) - 1
    drawn = [spec.seed for _ in range(8) for spec in specs(seed=None)]
    assert len(set(drawn)) == 8
    assert all(0 <= seed < 1 << 64 for seed in several + drawn)


# --- stops


def scripted(tokens: list[int], *, max_model_len=100, **params) -> tuple[list[int], SequenceOutput]:
    """What comes out when the model says `tokens`, whatever the sampler is told."""
    engine = Engine(max_model_len=max_model_len)
    engine.add("a", [5, 5, 5], **{"ignore_eos": False, "max_tokens": 50, **params})
    outputs = []
    for token in tokens:
        batch = engine.scheduler.schedule()
        if batch is None:
            break
        (scheduled,) = batch.scheduled
        outputs += engine.scheduler.commit(
            StepResult(batch.step_id, [SequenceResult(scheduled.seq_id, token, None, None)])
        )
        engine.scheduler.check_integrity()
    return [output.token_id for output in outputs], outputs[-1]


@pytest.mark.parametrize(
    ("said", "params", "expected", "reason", "stop_token"),
    [
        ([3, EOS, 4], {}, [3, EOS], "stop", EOS),
        ([3, EOS, 4], {"ignore_eos": True, "max_tokens": 3}, [3, EOS, 4], "length", None),
        ([3, EOS, 4], {"ignore_eos": True, "stop_token_ids": (EOS,)}, [3, EOS], "stop", EOS),
        ([3, 7, 4], {"stop_token_ids": (7, 8)}, [3, 7], "stop", 7),
        ([7, EOS, 7, 7, 1], {"stop_token_ids": (7,), "min_tokens": 3}, [7, EOS, 7, 7], "stop", 7),
        ([1, 2, 7], {"stop_token_ids": (7,), "max_tokens": 3}, [1, 2, 7], "stop", 7),
        ([1, 2, 3, 4], {"max_tokens": 3}, [1, 2, 3], "length", None),
        ([1, 2, 3, 4], {"max_tokens": 1}, [1], "length", None),
        ([1] * 9, {"max_tokens": None, "max_model_len": 8}, [1] * 5, "length", None),
        ([1] * 9, {"max_tokens": 50, "max_model_len": 8}, [1] * 5, "length", None),
    ],
)
def test_stops(said, params, expected, reason, stop_token):
    tokens, last = scripted(said, **params)
    assert tokens == expected
    assert (last.finish_reason, last.stop_token) == (reason, stop_token)


@pytest.mark.parametrize(
    ("params", "suppressed"),
    [({"ignore_eos": False}, [EOS]), ({"ignore_eos": True}, []), ({"stop_token_ids": (9, 4)}, [4, 9])],
)
def test_what_the_sampler_suppresses(params, suppressed):
    engine = Engine()
    engine.add("a", [1], min_tokens=2, logit_bias={3: 1.5}, **params)
    (new,) = engine.step().new
    assert isinstance(new, NewSequence)
    assert (new.sampler.suppressed, new.sampler.min_tokens) == (suppressed, 2)
    assert new.sampler.logit_bias == {3: 1.5}


# --- logprobs of the prompt


@pytest.mark.parametrize("length", [1, 2, 4, 9, 23])
@pytest.mark.parametrize("budget", [1, 3, 64])
def test_prompt_logprobs_come_once_complete_and_aligned(length, budget):
    engine = Engine(max_num_batched_tokens=budget)
    prompt = [i % 9 + 1 for i in range(length)]
    engine.add("warm", prompt)
    engine.drain()
    request = engine.add("a", prompt, prompt_logprobs=1, n=2)
    engine.drain()
    first, *rest = engine.outputs["a", 0]
    assert first.prompt_logprobs == reference_prompt_logprobs(prompt)
    assert first.num_cached_tokens == 0, "every position was computed"
    assert all(output.prompt_logprobs is None for output in [*rest, *engine.outputs["a", 1]])
    assert engine.outputs["a", 1][0].num_cached_tokens == (length - 1) // 4 * 4
    engine.check(request, 0)
    engine.check(request, 1)


@pytest.mark.parametrize("start", [1, 4, 5, 6, 12, 22])
@pytest.mark.parametrize("budget", [1, 3, 64])
def test_prompt_logprobs_from_a_start_leave_what_is_before_it_to_the_cache(start, budget):
    engine = Engine(max_num_batched_tokens=budget)
    prompt = [i % 9 + 1 for i in range(23)]
    engine.add("warm", prompt)
    engine.drain()
    computed, looked_up = engine.ranks.num_computed, engine.scheduler.prefix_query_tokens
    request = engine.add("a", prompt, max_tokens=1, prompt_logprobs=1, prompt_logprobs_start=start)
    engine.drain()
    (only,) = engine.outputs["a", 0]
    assert only.prompt_logprobs == reference_prompt_logprobs(prompt, start)
    cached = (start - 1) // 4 * 4  # the position before `start` is computed: its logits are what is asked for
    assert only.num_cached_tokens == cached
    assert engine.ranks.num_computed - computed == len(prompt) - cached
    assert engine.scheduler.prefix_query_tokens - looked_up == start - 1
    engine.check(request)


def test_prompt_logprobs_survive_preemption_without_being_computed_twice():
    engine = Engine(num_blocks=9, block_size=2, max_num_batched_tokens=2)
    older = engine.add("old", [1, 2], max_tokens=14)
    engine.step()
    prompt = [3, 4, 5, 6, 7, 8, 9, 10, 11]
    request = engine.add("a", prompt, max_tokens=4, prompt_logprobs=1)
    asked = []
    while engine.scheduler.has_work:
        asked += [(new.seq_id, new.sampler.prompt_logprobs) for new in engine.step().new]
    engine.drain()
    assert engine.scheduler.preemptions > 0
    assert asked[0] == (1, 1)
    assert [o.prompt_logprobs for o in engine.outputs["a", 0] if o.prompt_logprobs] == [
        reference_prompt_logprobs(prompt)
    ]
    engine.check(older)
    engine.check(request)


def test_prompt_logprobs_are_not_asked_for_again_once_they_are_out():
    engine = Engine()
    request = engine.add("a", range(1, 10), prompt_logprobs=0)
    engine.step()
    engine.lose_ranks()
    assert engine.step().new[0].sampler.prompt_logprobs is None
    engine.drain()
    engine.check(request)
    assert sum(output.prompt_logprobs is not None for output in engine.outputs["a", 0]) == 1


# --- abort, loss of the ranks


def test_abort_frees_at_once_what_is_not_in_flight():
    engine = Engine()
    engine.add("a", [1] * 9)
    engine.add("b", [2] * 9)
    engine.step()
    free = engine.scheduler.free_blocks
    engine.abort("a")
    assert engine.scheduler.free_blocks == free + 3
    assert engine.step().released == [0]
    engine.abort("a")
    engine.abort("never seen")
    engine.abort("b", 7)
    assert engine.scheduler.num_running == 1
    engine.drain()
    assert len(engine.tokens("a")) == 1


def test_abort_in_flight_frees_at_the_commit_and_puts_nothing_out():
    engine = Engine()
    engine.add("a", [1] * 9)
    engine.schedule()
    engine.abort("a")
    assert engine.scheduler.free_blocks == 61
    assert engine.commit() == []
    assert engine.scheduler.free_blocks == 64
    assert not engine.scheduler.has_work
    assert engine.schedule() is None, "a release alone is no step"
    engine.add("a", [1] * 9)
    assert engine.step().released == [0]
    engine.drain()


def test_abort_of_what_waits():
    engine = Engine(max_num_seqs=1)
    engine.add("a", [1] * 9, n=2)
    engine.add("b", [2] * 9)
    engine.step()
    engine.abort("b")
    assert engine.scheduler.waiting_tokens == 9
    engine.abort("a")
    assert (engine.scheduler.num_waiting, engine.scheduler.waiting_tokens) == (0, 0)
    engine.drain()


def test_when_the_ranks_are_lost_everything_goes_on_where_it_was():
    engine = Engine(in_flight=2, max_num_seqs=3)
    requests = [engine.add(name, [i + 1] * 9, max_tokens=10) for i, name in enumerate("abcd")]
    for _ in range(4):
        engine.step()
    engine.schedule()
    assert engine.pending
    engine.add("e", [5] * 3)
    engine.abort("b")
    engine.lose_ranks()
    assert engine.scheduler.num_running == 0
    assert engine.scheduler.free_blocks == engine.scheduler.num_blocks
    batch = engine.step()
    assert batch.released == []
    assert [new.seq_id for new in batch.new] == [0, 2, 3]
    assert {scheduled.start for scheduled in batch.scheduled} == {0}, "the prefix cache is lost too"
    engine.drain()
    for request in (requests[0], requests[2], requests[3]):
        engine.check(request)
    engine.add("again", [1] * 9)
    engine.drain()
    assert engine.outputs["again", 0][0].num_cached_tokens == 8, "what was computed again is cached again"


def test_an_answer_to_another_step_is_a_bug():
    engine = Engine()
    engine.add("a", [1])
    batch = engine.scheduler.schedule()
    with pytest.raises(AssertionError, match="step 9 answered, step 0 was expected"):
        engine.scheduler.commit(StepResult(9, [SequenceResult(batch.scheduled[0].seq_id, 1, None, None)]))


# --- the bounded queue


def test_an_id_is_free_again_when_its_request_has_ended():
    engine = Engine()
    engine.add("a", [1], max_tokens=1)
    with pytest.raises(InvalidRequestError) as caught:
        engine.add("a", [2])
    assert caught.value.field == "request_id"
    engine.drain()
    engine.add("a", [2])
    engine.drain()


def test_the_queue_is_bounded_by_requests():
    engine = Engine(max_waiting_requests=2, max_num_seqs=1)
    engine.add("a", [1], n=5)
    engine.add("b", [1])
    engine.add("c", [1])
    with pytest.raises(CapacityError, match="3 requests with 3 prompt tokens") as caught:
        engine.add("d", [1])
    assert caught.value.retry_after_s >= 1
    engine.step()
    with pytest.raises(CapacityError):
        engine.add("d", [1])
    engine.drain()
    engine.add("d", [1])


def test_whom_the_next_step_takes_does_not_count_as_waiting():
    engine = Engine(max_waiting_requests=2, max_num_seqs=4)
    for i in range(3):
        engine.add(f"a{i}", [1])
    engine.step()
    for i in range(3):  # one place is left
        engine.add(f"b{i}", [1])
    with pytest.raises(CapacityError):
        engine.add("c", [1])
    engine.drain()


def test_the_queue_is_bounded_by_tokens():
    engine = Engine(max_waiting_tokens=20)
    engine.add("a", [1] * 15)
    with pytest.raises(CapacityError):
        engine.add("b", [1] * 6)
    engine.add("b", [1] * 5)
    engine.drain()
    engine.add("larger than the bound", [1] * 30)
    engine.drain()


def test_when_to_try_again_follows_the_queues_speed(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(waiting_queue.time, "monotonic", lambda: now[0])
    engine = Engine(max_waiting_tokens=40, max_waiting_requests=100, max_num_seqs=1)

    def retry_after(prompt_len: int) -> float:
        with pytest.raises(CapacityError) as caught:
            engine.add("refused", [1] * prompt_len)
        return caught.value.retry_after_s

    for i in range(4):
        engine.add(str(i), [1] * 10, max_tokens=1)
    assert retry_after(1) == 1.0, "nothing is known yet"
    now[0] += 10
    assert retry_after(1) == 10.0, "as long again as the queue has stood"
    engine.step()  # one has left after 10 s
    assert retry_after(11) == 10.0
    assert retry_after(30) == 20.0, "two of ten tokens must leave"
    now[0] += 1000
    assert retry_after(30) == 60.0, "no more than a minute"
    engine.drain()
    now[0] += 1000
    for i in range(4):
        engine.add(str(i), [1] * 10, max_tokens=1)
    assert retry_after(1) == 1.0, "an idle time is no waiting time"


# --- several steps in flight


def test_no_more_steps_than_asked_for_are_in_flight_and_their_sequences_differ():
    engine = Engine(in_flight=3, max_num_seqs=8)
    requests = [engine.add(str(i), [i + 1] * 3, max_tokens=12) for i in range(7)]
    engine.step()
    batches = [engine.schedule() for _ in range(4)]
    assert batches[3] is None
    ids = [[s.seq_id for s in batch.scheduled] for batch in batches[:3]]
    assert ids == [[0, 1, 2], [3, 4, 5], [6]], "each takes its share"
    for _ in range(20):
        engine.commit()
        batch = engine.schedule()
        if batch is not None:
            assert len(batch.scheduled) <= 3
    while engine.pending:
        engine.commit()
    engine.drain()
    for request in requests:
        engine.check(request)


def test_a_sequence_in_flight_is_not_preempted():
    engine = Engine(in_flight=2, num_blocks=4, block_size=2)
    requests = [engine.add("a", [1, 2], max_tokens=6), engine.add("b", [3, 4], max_tokens=6)]
    engine.step()
    assert [shape(engine.schedule()), shape(engine.schedule())] == [[(0, 2, 1, True)], [(1, 2, 1, True)]]
    engine.commit()
    assert shape(engine.schedule()) == [(0, 3, 1, True)]
    engine.commit()
    assert shape(engine.schedule()) == [(1, 3, 1, True)]
    engine.commit()
    assert engine.scheduler.free_blocks == 0
    assert engine.schedule() is None, "a needs a block, and b is in flight"
    assert engine.scheduler.preemptions == 0
    engine.commit()
    assert shape(batch := engine.schedule()) == [(0, 4, 1, True)]
    assert batch.released == [1]
    engine.drain()
    for request in requests:
        engine.check(request)


# --- weights


def test_a_request_keeps_its_weights_and_steps_take_turns():
    engine = Engine()
    engine.scheduler.weight_version = "old"
    requests = [engine.add("a", [1] * 9), engine.add("b", [2] * 9)]
    engine.step()
    engine.scheduler.weight_version = "new"
    requests += [engine.add("c", [1] * 9), engine.add("d", [2] * 9)]
    turns = [(engine.step().weight_version, engine.scheduler.num_running) for _ in range(4)]
    assert turns == [("new", 4), ("old", 4), ("new", 4), ("old", 4)]
    assert engine.scheduler.live_versions == {"old", "new"}
    engine.drain()
    assert engine.scheduler.live_versions == set()
    for request in requests:
        engine.check(request)
    assert engine.tokens("a") != engine.tokens("c")


def test_a_request_may_name_its_weights():
    engine = Engine()
    engine.scheduler.weight_version = "new"
    params = SamplingParams(seed=1, max_tokens=8, ignore_eos=True)
    engine.scheduler.add(Request(request_id="a", prompt_token_ids=(1, 2), params=params, weight_version="old"))
    engine.drain()
    assert engine.tokens("a") == reference([1, 2], params, weights="old")


def test_weights_share_no_prefix():
    engine = Engine()
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    cached = []
    for name, weights in enumerate(["old", "old", "new", "new", "old"]):
        engine.scheduler.weight_version = weights
        request = engine.add(str(name), prompt)
        engine.drain()
        engine.check(request)
        cached.append(engine.outputs[str(name), 0][0].num_cached_tokens)
    assert cached == [0, 8, 0, 8, 8]


@pytest.mark.parametrize("in_flight", [1, 2, 3])
def test_two_versions_in_the_smallest_cache(in_flight):
    """Preemptions go across: who was admitted last gives way, whatever its weights."""
    engine = Engine(num_blocks=10, block_size=2, in_flight=in_flight)
    requests = []
    for i in range(12):
        engine.scheduler.weight_version = "ab"[i % 2]
        requests.append(engine.add(str(i), [i % 5 + 1] * (i % 4 + 1), max_tokens=12))
    engine.drain()
    assert engine.scheduler.preemptions > 0
    for request in requests:
        engine.check(request)


# --- everything at once


class SchedulerMachine(RuleBasedStateMachine):
    """Random clients, losses and changes of weights; the output must be what the model says without any scheduling."""

    @initialize(
        num_blocks=st.integers(6, 24),
        block_size=st.sampled_from([1, 2, 3, 4]),
        in_flight=st.integers(1, 3),
        budget=st.integers(1, 24),
        max_num_seqs=st.integers(1, 6),
        max_model_len=st.integers(8, 40),
    )
    def start(self, num_blocks, block_size, in_flight, budget, max_num_seqs, max_model_len):
        self.max_len = min(max_model_len, num_blocks * block_size)
        self.engine = Engine(
            num_blocks=num_blocks,
            block_size=block_size,
            in_flight=in_flight,
            max_model_len=max_model_len,
            max_num_batched_tokens=budget,
            max_num_seqs=max_num_seqs,
        )
        self.requests: dict[str, Request] = {}
        self.aborted: set[tuple[str, int]] = set()
        self.outputs_at_abort: dict[tuple[str, int], int] = {}

    @rule(
        prompt=st.lists(st.integers(1, 2), min_size=1, max_size=30),
        room=st.integers(1, 16),
        n=st.sampled_from([1, 1, 2, 3]),
        seed=st.integers(-3, 3),
        ends=st.booleans(),
        min_tokens=st.integers(0, 4),
        prompt_logprobs=st.sampled_from([None, None, 2]),
        prompt_logprobs_start=st.sampled_from([1, 3, 8, 17]),
        open_end=st.booleans(),
    )
    def add(self, prompt, room, n, seed, ends, min_tokens, prompt_logprobs, prompt_logprobs_start, open_end):
        prompt = prompt[: self.max_len - 1]
        room = min(room, self.max_len - len(prompt))
        name = str(len(self.requests))
        self.requests[name] = self.engine.add(
            name,
            prompt,
            n=n,
            seed=seed,
            max_tokens=None if open_end else room,
            min_tokens=min(min_tokens, room),
            ignore_eos=not ends,
            stop_token_ids=(3,) if ends else (),
            prompt_logprobs=prompt_logprobs,
            prompt_logprobs_start=1 if prompt_logprobs is None else max(1, min(prompt_logprobs_start, len(prompt) - 1)),
        )

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), index=st.sampled_from([None, 0, 1, 2]))
    def abort(self, data, index):
        name = data.draw(st.sampled_from(sorted(self.requests)))
        for i in range(self.requests[name].params.n) if index is None else (index,):
            if (name, i) not in self.aborted:
                self.aborted.add((name, i))
                self.outputs_at_abort[name, i] = len(self.engine.tokens(name, i))
        self.engine.abort(name, index)

    @rule()
    def schedule(self):
        batch = self.engine.schedule()
        if batch is None:
            assert self.engine.pending or not self.engine.scheduler.has_work, "there is work, but no step"

    @precondition(lambda self: self.engine.pending)
    @rule()
    def commit(self):
        self.engine.commit()

    @rule(steps=st.integers(1, 12))
    def run(self, steps):
        for _ in range(steps):
            self.schedule()
            if self.engine.pending:
                self.engine.commit()

    @rule()
    def lose_ranks(self):
        self.engine.lose_ranks()

    @rule(weights=st.sampled_from(["", "a", "b"]))
    def change_weights(self, weights):
        self.engine.scheduler.weight_version = weights

    @invariant()
    def books_agree(self):
        if hasattr(self, "engine"):
            self.engine.scheduler.check_integrity()

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        self.engine.drain()
        for name, request in self.requests.items():
            sequences = [self.engine.outputs.get((name, index), []) for index in range(request.params.n)]
            for index, outputs in enumerate(sequences):
                self.check_sequence(request, index, outputs)
            self.check_prompt_logprobs(request, sequences)

    def check_sequence(self, request, index, outputs):
        key = (request.request_id, index)
        tokens = [output.token_id for output in outputs]
        weights = self.engine.weights[request.request_id]
        expected = reference(request.prompt_token_ids, request.params, index, self.max_len, weights)
        if key in self.aborted:
            assert len(tokens) == self.outputs_at_abort[key], "an aborted sequence put something out"
            assert tokens == expected[: len(tokens)]
        else:
            assert tokens == expected
            assert [output.finish_reason is None for output in outputs] == [True] * (len(tokens) - 1) + [False]
            stops = expected[-1] in (3, EOS) and not request.params.ignore_eos
            assert outputs[-1].finish_reason is (FinishReason.STOP if stops else FinishReason.LENGTH)

    def check_prompt_logprobs(self, request, sequences):
        given = [o.prompt_logprobs for outputs in sequences for o in outputs if o.prompt_logprobs is not None]
        if request.params.prompt_logprobs is None or not any(sequences):
            assert given == []
        else:
            start = request.params.prompt_logprobs_start
            weights = self.engine.weights[request.request_id]
            assert given == [reference_prompt_logprobs(request.prompt_token_ids, start, weights)]


SchedulerMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestSchedulerMachine = SchedulerMachine.TestCase
