"""A replica that cannot have the weights which it is to serve: how often it tries, and what it says."""

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from rayllm.core.config import CacheConfig, EngineConfig, ModelConfig
from rayllm.core.errors import PromotionError
from rayllm.engine.async_engine import AsyncEngine
from rayllm.engine.build import Prepared, build_engine, prepare, start_local
from rayllm.engine.weights import Weights
from rayllm.models.checkpoint import Checkpoint
from rayllm.serve import weight_keeper
from rayllm.serve.promoter import Promoter
from rayllm.serve.weight_keeper import WeightKeeper
from rayllm.serve.weight_record import Candidate, ReplicaReport, WeightRecord
from tests.checkpoints import retrained


class Store:
    """In this process; Ray keeps the real one."""

    def __init__(self) -> None:
        self.record: WeightRecord | None = None
        self.reported: list[ReplicaReport] = []

    def read(self) -> WeightRecord | None:
        return self.record

    def write(self, record: WeightRecord) -> None:
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


async def test_a_candidate_is_tried_once(engine: AsyncEngine, prepared: Prepared, other: Weights) -> None:
    store = Store()
    keeper = WeightKeeper(engine, store, "r")  # type: ignore[arg-type]
    shutil.rmtree(other.directory)
    store.record = WeightRecord(1, prepared.weights, None, Candidate(other, ("r",), is_gated=False))
    await keeper._look()
    keeper._again_at = 0.0
    await keeper._look()
    assert len(store.reported) == 1
    assert store.reported[-1].problem is not None


async def test_who_rolls_back_is_told_that_a_replica_stays_behind(prepared: Prepared, other: Weights) -> None:
    store = Store()
    store.record = WeightRecord(1, prepared.weights, other)
    store.reported.append(ReplicaReport(2, prepared.weights.version, "the disk is gone"))
    promoter = Promoter(prepared, store)  # type: ignore[arg-type]
    with pytest.raises(PromotionError, match=f"{other.version} is served, but not yet by every replica: the disk is"):
        async for _ in promoter.rollback():
            pass
    assert store.record == WeightRecord(2, other, prepared.weights)
