"""Losing the model's ranks at every moment of a workload, in one process: whatever is lost, the answers are the same.

The executor is the one of this process, whose model runner is thrown away and loaded anew. What Ray adds to it is in
`tests/ray/test_recovery.py`.
"""

import asyncio
import itertools
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from rayllm.core.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from rayllm.core.errors import EngineUnavailableError
from rayllm.core.types import Request, SamplingParams
from rayllm.engine.async_engine import AsyncEngine
from rayllm.engine.build import EngineParts, Prepared, build_engine, load_runner, prepare
from rayllm.engine.engine import MAX_LOSSES, Engine
from rayllm.engine.executor import LocalExecutor, Recovery
from rayllm.engine.weights import Weights
from rayllm.models.checkpoint import Checkpoint
from rayllm.models.weight_version import weight_version
from rayllm.parallel.mesh import Mesh
from rayllm.scheduler.batch import Batch, StepResult
from tests.checkpoints import retrained


class LosingExecutor(LocalExecutor):
    """Loses its runner in the calls of `submit` and `collect` whose numbers `losses` has, and in any of `loaded` while
    `loses_load` is set."""

    def __init__(self, prepared: Prepared, losses: set[int]) -> None:
        self._prepared = prepared
        self._held: Sequence[Weights] = [prepared.weights]
        self._losses = losses
        self.num_calls = 0
        self.loses_load = False
        super().__init__(self._load)

    def _load(self):
        shard = msgspec.structs.replace(self._prepared.shard, weights=tuple(self._held))
        runner = load_runner(shard, Mesh.single())
        runner.init_cache(runner.num_blocks_that_fit)
        return runner

    def _count(self) -> None:
        self.num_calls += 1
        if self.num_calls in self._losses:
            raise EngineUnavailableError("the runner is lost")

    def submit(self, batch: Batch) -> None:
        self._count()
        super().submit(batch)

    def collect(self) -> StepResult:
        self._count()
        return super().collect()

    def loaded(self) -> bool:
        if self.loses_load:
            raise EngineUnavailableError("the runner is lost")
        return super().loaded()

    def recover(self, lost: EngineUnavailableError, held: Sequence[Weights]) -> Recovery:
        for submitted in self._submitted:
            submitted.result()
        self._submitted.clear()
        self._loading = None
        self._held = held
        self._runner = self._thread.submit(self._load).result()
        return Recovery(cause=str(lost), detection_s=0.0, recovery_s=0.0)


def start(model: Path, losses: set[int]) -> tuple[EngineParts, LosingExecutor]:
    config = EngineConfig(
        model=ModelConfig(model=str(model), dtype="float32"),
        cache=CacheConfig(num_blocks=24, block_size=4),  # so few that sequences are preempted for want of them too
        scheduler=SchedulerConfig(max_num_batched_tokens=12, max_num_seqs=3),
    )
    executors: list[LosingExecutor] = []

    def start_losing(prepared: Prepared) -> tuple[LosingExecutor, int]:
        executors.append(LosingExecutor(prepared, losses))
        return executors[0], executors[0].num_blocks

    return build_engine(prepare(config), start_losing), executors[0]


def requests() -> list[Request]:
    cases = [
        (range(40, 65), SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, prompt_logprobs=2)),
        (range(40, 57), SamplingParams(temperature=1, seed=3, max_tokens=8, ignore_eos=True, n=2, logprobs=3)),
        (range(40, 50), SamplingParams(temperature=1, seed=4, max_tokens=30, stop=("e", "\u00e9"))),
        ([9], SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, repetition_penalty=1.3)),
    ]
    return [
        Request(request_id=str(i), prompt_token_ids=tuple(prompt), params=params)
        for i, (prompt, params) in enumerate(cases)
    ]


def run(model: Path, losses: set[int]) -> tuple[dict[str, object], list[float], int]:
    """-> what clients were given, but for its logprobs, the logprobs, and the number of calls."""
    parts, executor = start(model, losses)

    async def answer(engine: AsyncEngine, request: Request) -> tuple[object, list[float]]:
        sequences = [([], [], []) for _ in range(request.params.n)]
        prompt_logprobs = None
        async for delta in engine.generate(request):
            tokens, text, logprobs = sequences[delta.index]
            tokens += delta.token_ids
            text.append(delta.text)
            logprobs += [position.logprob for position in delta.logprobs or ()]
            prompt_logprobs = prompt_logprobs or delta.prompt_logprobs
        scored = [position for position in prompt_logprobs or () if position is not None]
        given = [(tokens, "".join(text), len(logprobs)) for tokens, text, logprobs in sequences]
        numbers = [logprob for _, _, logprobs in sequences for logprob in logprobs]
        return (given, [position.token_id for position in scored]), numbers + [position.logprob for position in scored]

    async def all_of_them() -> tuple[dict[str, object], list[float]]:
        engine = AsyncEngine(parts)
        asked = requests()
        answers = await asyncio.gather(*(answer(engine, request) for request in asked))
        stats = engine.stats()
        assert stats.free_blocks == stats.total_blocks
        assert stats.recoveries == len([call for call in losses if call <= executor.num_calls])
        engine.check_integrity()
        await engine.close()
        given = {request.request_id: result for request, (result, _) in zip(asked, answers, strict=True)}
        return given, [logprob for _, logprobs in answers for logprob in logprobs]

    return *asyncio.run(all_of_them()), executor.num_calls


def check_losses(model: Path, losses: set[int], expected: dict[str, object], logprobs: list[float]) -> None:
    """Logprobs to within the order of sums, for what was lost is computed anew in chunks of other sizes."""
    given, numbers, _ = run(model, losses)
    assert given == expected, f"lost in the calls {losses}"
    assert numbers == pytest.approx(logprobs, abs=5e-5), f"lost in the calls {losses}"


def test_a_loss_at_every_moment_changes_nothing(tiny_model: Path) -> None:
    *expected, num_calls = run(tiny_model, set())
    assert num_calls > 40
    for call in range(1, num_calls + 1):
        check_losses(tiny_model, {call}, *expected)


def test_many_losses(tiny_model: Path) -> None:
    """Apart enough for every request to get on between them."""
    *expected, num_calls = run(tiny_model, set())
    losses = set(range(5, num_calls, 34))
    assert len(losses) >= 2
    check_losses(tiny_model, losses, *expected)


def steps_of(engine: Engine) -> list[int]:
    tokens = []
    while engine.has_work:
        tokens += [output.token_id for output in engine.step()]
    return tokens


@pytest.mark.parametrize("stride", [2, 60])
def test_who_gets_no_further_ends(tiny_model: Path, stride: int) -> None:
    """Losses in every step are blamed on the request that runs in them; losses far apart are not."""
    request = Request(
        request_id="a",
        prompt_token_ids=(5, 6, 7),
        params=SamplingParams(temperature=0, max_tokens=80, ignore_eos=True),
    )
    expected = start(tiny_model, set())[0].engine
    expected.add(request)
    whole = steps_of(expected)
    engine = start(tiny_model, {stride * i for i in range(1, MAX_LOSSES + 1)})[0].engine
    engine.add(request)
    if stride == 2:
        with pytest.raises(EngineUnavailableError, match="the runner is lost"):
            steps_of(engine)
        assert engine.num_recoveries == MAX_LOSSES - 1
        assert not engine.has_work
    else:
        assert steps_of(engine) == whole
    engine.scheduler.check_integrity()
    engine.close()
    expected.close()


@pytest.fixture(scope="module")
def other_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return retrained(tiny_model, tmp_path_factory.mktemp("other") / "model", seed=1)


def greedy(name: str) -> Request:
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    return Request(request_id=name, prompt_token_ids=(5, 6, 7), params=params)


def load(engine: Engine, model: Path) -> str:
    weights = Weights.of(Checkpoint.open(model))
    done = engine.weights.load(weights)
    while not done.done():
        engine.step()
    done.result()
    return weights.version


def old_and_new(model: Path, other: Path, losses: set[int]) -> tuple[dict[str, list[int]], int]:
    """A request that begins before the weights are changed, and one after; -> their tokens, the number of calls."""
    parts, executor = start(model, losses)
    engine = parts.engine
    version = load(engine, other)
    engine.add(greedy("old"))
    tokens: dict[str, list[int]] = {"old": [], "new": []}
    for step in itertools.count():
        if step == 4:
            engine.weights.use(version)
            engine.add(greedy("new"))
        if not engine.has_work:
            break
        for output in engine.step():
            tokens[output.request_id].append(output.token_id)
    engine.scheduler.check_integrity()
    engine.close()
    return tokens, executor.num_calls


def test_a_loss_while_two_versions_run(tiny_model: Path, other_model: Path) -> None:
    expected, num_calls = old_and_new(tiny_model, other_model, set())
    assert expected["old"] != expected["new"]
    engine = start(other_model, set())[0].engine
    engine.add(greedy("new"))
    assert expected["new"] == steps_of(engine)
    engine.close()
    for call in range(9, num_calls, 11):  # four steps of the old one alone have two calls each
        assert old_and_new(tiny_model, other_model, {call})[0] == expected, f"lost in call {call}"


def test_a_loss_while_weights_are_loaded(tiny_model: Path, other_model: Path) -> None:
    """Ends the load and nothing else; the next one succeeds."""
    parts, executor = start(tiny_model, set())
    engine = parts.engine
    engine.add(greedy("a"))
    executor.loses_load = True
    with pytest.raises(EngineUnavailableError, match="a shard was lost while it loaded the new weights"):
        load(engine, other_model)
    executor.loses_load = False
    assert engine.num_recoveries == 1
    assert [each.version for each in engine.weights.all] == [weight_version(tiny_model)]
    engine.weights.use(load(engine, other_model))
    steps_of(engine)
    engine.scheduler.check_integrity()
    engine.close()
