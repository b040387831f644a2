"""What replicas know of each other: bounded, ageing, and the same names for the same prefixes in every process."""

import os
import random
import subprocess
import sys
from dataclasses import replace

import msgspec
import pytest

from rayllm.core.config import SchedulerConfig
from rayllm.core.errors import (
    CapacityError,
    DeadlineExceededError,
    EngineUnavailableError,
    InvalidRequestError,
    ModelOutputError,
    RayLLMError,
    RequestAbortedError,
)
from rayllm.core.types import FinishReason, Request, SamplingParams, TokenLogprobs
from rayllm.engine.outputs import OutputDelta
from rayllm.scheduler.batch import SequenceResult, StepResult
from rayllm.scheduler.block_manager import BlockManager
from rayllm.scheduler.scheduler import Scheduler
from rayllm.serve import replica_state
from rayllm.serve.local_state import LocalState
from rayllm.serve.peer_messages import Failed, Piece, Run, decode_answer, decode_question, decode_state, encode
from rayllm.serve.replica_state import (
    KEY_BYTES,
    MAX_KEYS,
    ExpectedKeys,
    ReplicaState,
    ReplicaView,
    Snapshot,
    prefix_keys,
)

SNAPSHOT = Snapshot(weight_version="v1", queued_tokens=7, running=2, is_full=False, is_draining=False)


def keys(*names: int) -> frozenset[bytes]:
    return frozenset(name.to_bytes(KEY_BYTES) for name in names)


def scheduler(**options) -> Scheduler:
    return Scheduler(
        SchedulerConfig(), num_blocks=64, block_size=4, max_model_len=200, eos_token_ids=frozenset(), **options
    )


def request(tokens: int, **params) -> Request:
    return Request(request_id="r", prompt_token_ids=tuple(range(tokens)), params=SamplingParams(**params))


def told(view: ReplicaView | None, before: Snapshot | None, after: Snapshot) -> ReplicaView:
    """By way of the wire."""
    state = decode_state(encode(after.since(before.keys if before is not None else frozenset())))
    assert isinstance(state, ReplicaState)
    if view is None:
        return ReplicaView.of(state)
    view.take(state)
    return view


def test_a_view_follows_the_replica_by_differences_alone():
    rng = random.Random(3)
    before, view = None, None
    for _ in range(200):
        after = replace(SNAPSHOT, keys=keys(*(rng.randrange(60) for _ in range(30))), running=rng.randrange(9))
        view = told(view, before, after)
        assert view.keys == after.keys
        assert view.state.running == after.running
        before = after
    unchanged = before.since(before.keys)
    assert (unchanged.added, unchanged.removed) == (b"", b"")
    assert len(encode(unchanged)) < 40


def test_what_a_view_holds_is_bounded():
    full = replace(SNAPSHOT, keys=keys(*range(MAX_KEYS)))
    view = told(None, None, full)
    assert len(encode(full.since(frozenset()))) < MAX_KEYS * KEY_BYTES + 100
    with pytest.raises(ValueError, match="4097 blocks, at most 4096"):
        view.take(replace(SNAPSHOT, keys=keys(1 << 60)).since(frozenset()))
    with pytest.raises(ValueError, match="no whole number"):
        view.take(msgspec.structs.replace(SNAPSHOT.since(frozenset()), added=b"123"))
    expected = ExpectedKeys()
    for start in range(0, 3 * MAX_KEYS, 64):
        expected.add([number.to_bytes(KEY_BYTES) for number in range(start, start + 64)])
    assert expected.blocks([(3 * MAX_KEYS - 1).to_bytes(KEY_BYTES)]) == 1
    assert expected.blocks([(0).to_bytes(KEY_BYTES)]) == 0, "the oldest went"


def test_the_deepest_known_block_counts():
    prompt = prefix_keys([number.to_bytes(32, "little") for number in (5, 6, 7, 8)])
    view = told(None, None, replace(SNAPSHOT, keys=frozenset(prompt[1:3])))
    assert view.cached_blocks(prompt) == 3
    assert view.cached_blocks(prompt[:1]) == 0
    assert view.cached_blocks([]) == 0


def test_what_was_sent_counts_until_the_replica_speaks_for_itself(monkeypatch):
    now = 100.0
    monkeypatch.setattr(replica_state.time, "monotonic", lambda: now)
    view = told(None, None, SNAPSHOT)
    prompt = [number.to_bytes(KEY_BYTES) for number in range(4)]
    view.sent(prompt, tokens=300, sequences=2)
    assert (view.sent_tokens, view.sent_sequences, view.cached_blocks(prompt)) == (300, 2, 4)
    now += 1
    view = told(view, SNAPSHOT, replace(SNAPSHOT, queued_tokens=310))
    assert (view.sent_tokens, view.sent_sequences) == (0, 0)
    assert view.cached_blocks(prompt) == 4, "its cache will hold it once the prompt is computed"
    now += 60
    assert view.cached_blocks(prompt) == 0


def test_digests_are_what_the_cache_finds_the_prompt_by():
    mine = scheduler(weight_version="v1")
    prompt = request(18, max_tokens=4)
    digests = mine.prompt_digests(prompt, "v1", max_blocks=99)
    assert len(digests) == len(set(digests)) == 4
    assert mine.prompt_digests(prompt, "v1", max_blocks=3) == digests[:3]
    assert mine.cached_blocks(digests) == 0
    mine.add(prompt)
    batch = mine.schedule()
    mine.commit(StepResult(batch.step_id, [SequenceResult(batch.scheduled[0].seq_id, 5, None, None)]))
    assert mine.cached_blocks(digests) == 4
    assert set(mine.recent_digests(99)) == set(digests)
    assert mine.recent_digests(2) == digests[:1:-1], "the newest"
    mine.check_integrity()


def test_found_again_is_as_new():
    blocks = BlockManager(8, 4)
    table = blocks.take((), 3)
    for block, digest in zip(table, (b"a", b"b", b"c"), strict=True):
        blocks.cache(block, digest)
    blocks.free(table)
    assert blocks.recent_digests(9) == [b"c", b"b", b"a"]
    again = blocks.take(blocks.match([b"a", b"b"]), 0)
    assert blocks.recent_digests(2) == [b"a", b"b"]
    blocks.free(again)
    blocks.check_integrity([])


def test_only_what_a_cache_can_spare_is_looked_for():
    mine = scheduler()
    assert len(mine.prompt_digests(request(16), "v", max_blocks=99)) == 3, "the last token is computed in any case"
    assert mine.prompt_digests(request(16, prompt_logprobs=1), "v", max_blocks=99) == []
    late = request(16, prompt_logprobs=1, prompt_logprobs_start=9)
    assert len(mine.prompt_digests(late, "v", max_blocks=99)) == 2


def test_other_weights_other_scaling_and_other_tokens_have_other_digests():
    plain, by_length = scheduler(), scheduler(cache_key=lambda prompt_len: prompt_len.to_bytes(8))
    variants = [
        plain.prompt_digests(request(17), "v1", max_blocks=9),
        plain.prompt_digests(request(17), "v2", max_blocks=9),
        by_length.prompt_digests(request(17), "v1", max_blocks=9),
        by_length.prompt_digests(request(18), "v1", max_blocks=9),
        plain.prompt_digests(replace(request(17), prompt_token_ids=(9, *range(1, 17))), "v1", max_blocks=9),
    ]
    all_keys = [key for digests in variants for key in prefix_keys(digests)]
    assert len(all_keys) == len(set(all_keys)) == 20


def test_digests_are_the_same_in_every_process():
    """Not salted, whatever PYTHONHASHSEED is."""
    code = (
        "from tests.unit.test_serve_replica_state import request, scheduler\n"
        "print([each.hex() for each in scheduler().prompt_digests(request(17), 'v1', max_blocks=9)])"
    )
    mine = [each.hex() for each in scheduler().prompt_digests(request(17), "v1", max_blocks=9)]
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
        assert out.stdout.strip() == str(mine)


class Cache:
    weight_version = "v1"
    digests: tuple[bytes, ...] = ()
    is_recovering = False
    failure: EngineUnavailableError | None = None

    def check_health(self):
        if self.failure is not None:
            raise self.failure

    def cached_blocks(self, digests):
        return sum(digest in self.digests for digest in digests)

    def recent_digests(self, limit):
        return list(self.digests[:limit])


async def test_local_work_is_told_until_its_prompt_is_computed():
    draining = False
    cache = Cache()
    state = LocalState(cache, block_size=4, max_num_seqs=3, is_draining=lambda: draining)
    idle = state.snapshot()
    assert state.snapshot() is idle
    changed = state.changed
    with state.working(tokens=40, sequences=2) as work:
        assert changed.is_set()
        assert (state.snapshot().queued_tokens, state.snapshot().running, state.snapshot().is_full) == (40, 2, False)
        with state.working(tokens=10, sequences=1):
            assert (state.snapshot().queued_tokens, state.snapshot().is_full) == (50, True)
        cache.digests = (b"x" * 32, b"y" * 32)
        work.computed()
        work.computed()
        snapshot = state.snapshot()
        assert (snapshot.queued_tokens, snapshot.running, snapshot.keys) == (0, 2, {b"x" * 8, b"y" * 8})
        assert state.candidate("a", [b"x" * 32]).cached_tokens == 4
    assert state.snapshot().running == 0
    cache.weight_version = "v2"
    assert state.snapshot().weight_version == "v2", "nobody is told when weights change"
    cache.is_recovering = True
    state.notify()
    assert state.snapshot().is_full
    assert state.candidate("a", []).is_full
    assert state.is_healthy
    assert not state.snapshot().is_draining
    cache.is_recovering = False
    cache.failure = EngineUnavailableError("its shards are gone")
    assert not state.is_healthy
    assert state.snapshot().is_draining, "nothing is to be sent there"
    cache.failure = None
    draining = True
    assert state.snapshot().is_draining
    draining = False
    state.end()
    assert state.snapshot().is_draining


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequestError("prompt", "is bad"),
        CapacityError("full", retry_after_s=3.5),
        EngineUnavailableError("gone", retry_after_s=2.5),
        DeadlineExceededError("late"),
        RequestAbortedError("aborted"),
        ModelOutputError("nan"),
        RayLLMError("bug"),
    ],
)
def test_errors_are_themselves_on_the_other_side(error):
    failed = decode_answer(encode(Failed.of(error)))
    assert isinstance(failed, Failed)
    again = failed.error()
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)


def test_requests_and_answers_cross_whole():
    params = SamplingParams(
        n=3,
        temperature=0.5,
        logit_bias={5: -1.5},
        seed=-4,
        max_tokens=None,
        stop=("안녕",),
        stop_token_ids=(4,),
        logprobs=2,
    )
    sent = Request(
        request_id="x",
        prompt_token_ids=(1, 2, 3),
        params=params,
        weight_version="v",
        resume=((1,), None, ()),
        session="s",
    )
    run = decode_question(encode(Run.of(sent, 16)))
    assert isinstance(run, Run)
    assert run.request_as("x") == sent
    late = decode_question(encode(Run.of(replace(sent, deadline=replica_state.time.monotonic() + 50), 0)))
    assert 49 < late.request_as("y").deadline - replica_state.time.monotonic() <= 50
    delta = OutputDelta(
        index=1,
        text="a",
        token_ids=[4],
        logprobs=[TokenLogprobs(token_id=4, logprob=-0.1, rank=1, top=((4, -0.1), (9, float("-inf"))))],
        finish_reason=FinishReason.STOP,
        stop_reason=4,
        prompt_logprobs=[None, TokenLogprobs(token_id=2, logprob=-3.0, rank=7)],
        num_cached_tokens=16,
        queue_s=0.25,
    )
    piece = decode_answer(encode(Piece(delta)))
    assert piece.delta == delta
