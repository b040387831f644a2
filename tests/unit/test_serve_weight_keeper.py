"""Weights that an endpoint cannot have, or is not to have: how often a replica tries, what it says, who is refused."""

import math
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from torch import Tensor

from rayllm.core.config import CacheConfig, EngineConfig, ModelConfig
from rayllm.core.errors import PromotionError
from rayllm.engine.async_engine import AsyncEngine
from rayllm.engine.build import Prepared, build_engine, prepare, start_local
from rayllm.engine.weights import Weights
from rayllm.models.checkpoint import Checkpoint
from rayllm.serve import promoter, weight_keeper
from rayllm.serve.config import ServeConfig
from rayllm.serve.deployment import _prepare
from rayllm.serve.gate import check_perplexity
from rayllm.serve.promoter import Promoter
from rayllm.serve.weight_keeper import WeightKeeper
from rayllm.serve.weight_record import Candidate, ReplicaReport, WeightRecord
from tests.checkpoints import changed, retrained


class Store:
    """In this process; Ray keeps the real one."""

    def __init__(self) -> None:
        self.record: WeightRecord | None = None
        self.reported: list[ReplicaReport] = []

    def read(self) -> WeightRecord | None:
        return self.record

    def write(self, record: WeightRecord) -> None:
        if self.record is not None and self.record.serial >= record.serial:
            raise PromotionError("another change of the weights took the place of this one")
        self.record = record

    def report(self, replica: str, report: ReplicaReport) -> None:
        self.reported.append(report)

    def reports(self) -> dict[str, ReplicaReport | None]:
        return {"r": self.reported[-1] if self.reported else None}


@pytest.fixture
def prepared(tiny_model: Path) -> Prepared:
    return prepare(EngineConfig(model=ModelConfig(model=str(tiny_model)), cache=CacheConfig(num_blocks=20)))


@pytest_asyncio.fixture
async def engine(prepared: Prepared) -> AsyncIterator[AsyncEngine]:
    engine = AsyncEngine(build_engine(prepared, start_local))
    yield engine
    await engine.close()


@pytest.fixture
def other(tiny_model: Path, tmp_path: Path) -> Weights:
    return Weights.of(Checkpoint.open(retrained(tiny_model, tmp_path / "other", seed=1)))


async def test_what_all_are_to_serve_is_tried_again(
    engine: AsyncEngine, prepared: Prepared, other: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store()
    keeper = WeightKeeper(engine, store, "r")  # type: ignore[arg-type]
    hidden = Path(other.directory).with_name("hidden")
    shutil.move(other.directory, hidden)
    store.record = WeightRecord(1, other, prepared.weights)
    await keeper._look()
    assert store.reported[-1].serial == 1
    assert store.reported[-1].problem is not None
    assert engine.weight_version == prepared.weights.version
    shutil.move(hidden, other.directory)
    await keeper._look()
    assert len(store.reported) == 1, "not at once"
    monkeypatch.setattr(weight_keeper, "_AGAIN_S", 0.0)
    keeper._again_at = 0.0
    await keeper._look()
    assert store.reported[-1].problem is None
    assert engine.weight_version == other.version


async def test_whatever_goes_wrong_is_told(
    engine: AsyncEngine, prepared: Prepared, other: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the replica goes on keeping its weights."""
    store = Store()
    keeper = WeightKeeper(engine, store, "r")  # type: ignore[arg-type]

    async def load_weights(directory: Path) -> str:
        raise OverflowError("math range error")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "load_weights", load_weights)
        store.record = WeightRecord(1, prepared.weights, None, Candidate(other, ("r",)))
        await keeper._look()
    assert store.reported[-1].problem == "OverflowError: math range error"
    store.record = WeightRecord(2, other)
    await keeper._look()
    assert (store.reported[-1].problem, engine.weight_version) == (None, other.version)


async def test_weights_that_diverged_do_not_pass_the_gate(
    engine: AsyncEngine, prepared: Prepared, tiny_model: Path, tmp_path: Path
) -> None:
    """Their perplexity is beyond what a float holds."""

    def blow_up(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"].mul_(1e5)

    bad = await engine.load_weights(changed(tiny_model, tmp_path / "bad", blow_up))
    good = prepared.weights.version
    with pytest.raises(PromotionError, match=f"by {bad}, more than 1% above the"):
        await check_perplexity(engine, "a text " * 10, new=bad, before=good)
    new, before = await check_perplexity(engine, "a text " * 10, new=good, before=bad)
    assert new < before < math.inf


async def test_a_promotion_that_another_has_overtaken_is_refused(prepared: Prepared, other: Weights) -> None:
    """Both have read the same record."""
    store = Store()
    promotion = Promoter(prepared, store).promote(Path(other.directory), share=None, gate=None)  # type: ignore[arg-type]
    assert (await anext(promotion))["event"] == "trying"
    overtaking = WeightRecord(1, prepared.weights, None, Candidate(prepared.weights, ("r",)))
    store.write(overtaking)
    with pytest.raises(PromotionError, match="another change of the weights took the place of this one"):
        await anext(promotion)
    assert store.record == overtaking


async def test_whoever_promotes_is_told_for_whom_it_waits(
    prepared: Prepared, other: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(promoter, "_SILENT_S", 0.0)
    store = Store()
    promotion = Promoter(prepared, store).promote(Path(other.directory), share=None, gate=None)  # type: ignore[arg-type]
    events = []
    async for event in promotion:
        events.append(event)
        if event["event"] == "waiting":
            assert store.record is not None
            store.reported.append(ReplicaReport(store.record.serial, other.version))
    assert [event["event"] for event in events] == ["trying", "waiting", "serving", "waiting", "done"]
    assert events[1]["waiting_for"] == ["r"]


@pytest.mark.parametrize("previous", [True, False], ids=["the previous ones", "the configuration's"])
def test_a_replica_starts_without_weights_that_are_gone(tiny_model: Path, tmp_path: Path, previous: bool) -> None:
    gone, before = (Weights.of(Checkpoint.open(retrained(tiny_model, tmp_path / str(i), seed=i))) for i in (1, 2))
    config = ServeConfig(engine=EngineConfig(model=ModelConfig(model=str(tiny_model))))
    store = Store()
    store.record = WeightRecord(3, gone, before if previous else None)
    assert _prepare(config, store).weights == gone  # type: ignore[arg-type]
    shutil.rmtree(gone.directory)
    expected = before if previous else Weights.of(Checkpoint.open(tiny_model))
    assert _prepare(config, store).weights == expected  # type: ignore[arg-type]


async def test_a_candidate_is_tried_once(engine: AsyncEngine, prepared: Prepared, other: Weights) -> None:
    store = Store()
    keeper = WeightKeeper(engine, store, "r")  # type: ignore[arg-type]
    shutil.rmtree(other.directory)
    store.record = WeightRecord(1, prepared.weights, None, Candidate(other, ("r",)))
    await keeper._look()
    keeper._again_at = 0.0
    await keeper._look()
    assert len(store.reported) == 1
    assert store.reported[-1].problem is not None


async def test_who_rolls_back_is_told_that_a_replica_stays_behind(prepared: Prepared, other: Weights) -> None:
    store = Store()
    store.record = WeightRecord(1, prepared.weights, other)
    store.reported.append(ReplicaReport(2, prepared.weights.version, "the disk is gone"))
    rollback = Promoter(prepared, store).rollback()  # type: ignore[arg-type]
    with pytest.raises(PromotionError, match=f"{other.version} is served, but not yet by every replica: the disk is"):
        async for _ in rollback:
            pass
    assert store.record == WeightRecord(2, other, prepared.weights)
