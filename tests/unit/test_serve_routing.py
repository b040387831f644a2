"""Which replica a request goes to, on figures made up; nothing runs here."""

import random
from collections import Counter

import pytest

from rayllm.core.errors import ConfigError
from rayllm.serve.config import ServeConfig
from rayllm.serve.routing import POLICIES, Candidate, Decision, Reason, decide
from tests.unit.test_async_engine import config


def route(*candidates: Candidate, local: str = "a", policy: str = "prefix", session: str | None = None, seed: int = 0):
    return decide(candidates, local=local, policy=policy, prompt_tokens=100, session=session, rng=random.Random(seed))


A, B, C = Candidate(name="a"), Candidate(name="b"), Candidate(name="c")


def test_alone_all_is_local():
    assert route(A) == Decision("a", Reason.LOCAL)
    assert route() == Decision("a", Reason.LOCAL)


def test_equal_replicas_keep_what_the_proxy_gave_them():
    assert {route(A, B, C, seed=seed) for seed in range(20)} == {Decision("a", Reason.LOCAL)}


def test_the_prefix_decides_wherever_it_is():
    holder = Candidate(name="b", cached_tokens=96)
    assert route(A, holder, C) == Decision("b", Reason.PREFIX)
    assert route(Candidate(name="a", cached_tokens=96), B) == Decision("a", Reason.PREFIX)
    assert route(Candidate(name="a", cached_tokens=64), holder) == Decision("b", Reason.PREFIX)


def test_a_small_gain_is_not_worth_a_hop():
    assert route(A, Candidate(name="b", cached_tokens=16)) == Decision("a", Reason.LOCAL)
    assert route(Candidate(name="a", cached_tokens=80), Candidate(name="b", cached_tokens=96)).replica == "a"


@pytest.mark.parametrize(("queued", "chosen"), [(0, "b"), (60, "b"), (70, "a"), (500, "a")])
def test_a_prefix_is_given_up_where_more_waits_than_it_spares(queued, chosen):
    assert route(A, Candidate(name="b", cached_tokens=96, queued_tokens=queued)).replica == chosen


def test_running_sequences_weigh_too():
    assert route(A, Candidate(name="b", cached_tokens=96, running=8)).replica == "a"


def test_a_full_replica_is_passed_over_while_another_is_not():
    full = Candidate(name="b", cached_tokens=96, is_full=True)
    assert route(A, full).replica == "a"
    assert route(Candidate(name="a", is_full=True), full) == Decision("b", Reason.PREFIX), "both are: as ever"
    assert route(Candidate(name="a", is_full=True), B) == Decision("b", Reason.LOAD)


def test_two_choices_are_the_one_here_and_one_at_random():
    busy = Candidate(name="a", queued_tokens=1000)
    chosen = Counter(route(busy, B, C, seed=seed).replica for seed in range(200))
    assert set(chosen) == {"b", "c"}
    assert min(chosen.values()) > 60
    rivals = [Candidate(name="b", queued_tokens=2000), C]
    kept = Counter(route(busy, *rivals, seed=seed) for seed in range(200))
    assert set(kept) == {Decision("a", Reason.LOCAL), Decision("c", Reason.LOAD)}, (
        "of three, the best is not always seen"
    )


def test_weights_that_are_elsewhere_only():
    """The replica that has the request is no candidate."""
    assert {route(B, C, seed=seed).reason for seed in range(9)} == {Reason.LOAD}
    assert route(Candidate(name="b", queued_tokens=500), C) == Decision("c", Reason.LOAD)
    assert route(B) == Decision("b", Reason.LOAD)


def test_a_session_has_one_replica_whoever_is_asked():
    for session in map(str, range(50)):
        answers = {route(A, B, C, local=local, session=session) for local in "abc"}
        answers |= {route(C, B, A, local=local, session=session) for local in "abc"}
        assert len(answers) == 1
        assert answers.pop().reason is Reason.SESSION


def test_sessions_are_spread_and_stay_when_others_come_and_go():
    sessions = [f"user-{i}" for i in range(600)]
    owners = {session: route(A, B, C, session=session).replica for session in sessions}
    assert min(Counter(owners.values()).values()) > 150
    for session in sessions:
        if owners[session] != "c":
            assert route(A, B, session=session).replica == owners[session]


def test_a_session_leaves_a_replica_that_is_overloaded_and_no_other():
    session = next(each for each in map(str, range(99)) if route(A, B, session=each).replica == "b")
    assert route(A, Candidate(name="b", queued_tokens=1000), session=session).replica == "b"
    assert route(A, Candidate(name="b", queued_tokens=2000), session=session) == Decision("a", Reason.LOCAL)
    assert route(Candidate(name="a", queued_tokens=2000), Candidate(name="b", queued_tokens=2000), session=session) == (
        Decision("b", Reason.SESSION)
    )
    assert route(A, Candidate(name="b", is_full=True), session=session).replica == "a"
    assert route(Candidate(name="a", cached_tokens=96), B, session=session).replica == "b", "it goes before a prefix"


def test_policies():
    holder = Candidate(name="b", cached_tokens=96)
    assert route(A, holder, policy="power-of-two") == Decision("a", Reason.LOCAL)
    assert route(Candidate(name="a", queued_tokens=200), holder, policy="power-of-two") == Decision("b", Reason.LOAD)
    assert route(Candidate(name="a", queued_tokens=200), holder, policy="none") == Decision("a", Reason.LOCAL)


def test_settings(tmp_path):
    engine = config(tmp_path)
    assert ServeConfig(engine=engine, num_replicas=2).is_routed
    assert ServeConfig(engine=engine, max_replicas=3).is_routed
    assert not ServeConfig(engine=engine).is_routed, "one replica has nobody to ask"
    assert not ServeConfig(engine=engine, num_replicas=2, routing="none").is_routed
    with pytest.raises(ConfigError, match="routing: 'sticky' is not one of prefix"):
        ServeConfig(engine=engine, routing="sticky")
    assert POLICIES[0] == ServeConfig(engine=engine).routing
