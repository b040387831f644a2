"""One replica's way to the weights that the endpoint's record asks of it.

Whoever changes the record need not know how: a replica that was away, or starts anew, finds what it is to serve. It
tries a candidate once; for what all replicas are to serve it tries on, for it would stay behind the others.
"""

import asyncio
import logging
import time
from pathlib import Path
from typing import Final

from ray.exceptions import RayError

from rayllm.core.errors import EngineUnavailableError, PromotionError, RayLLMError
from rayllm.engine.async_engine import AsyncEngine
from rayllm.engine.weights import Weights
from rayllm.serve.gate import check_perplexity
from rayllm.serve.weight_record import ReplicaReport, WeightRecord
from rayllm.serve.weight_store import WeightStore

logger = logging.getLogger(__name__)

_LOOK_S: Final = 0.5
_AGAIN_S: Final = 10.0  # between tries, each of which may read a whole checkpoint


class WeightKeeper:
    def __init__(self, engine: AsyncEngine, store: WeightStore, replica: str) -> None:
        self._engine = engine
        self._store = store
        self._replica = replica
        self._serial = 0  # of the record that was last worked through
        self._failed = 0  # of the record to be tried again, and from when on
        self._again_at = 0.0

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            try:
                await self._look()
            except RayError as error:  # the record's service is away; what is served stays
                logger.warning("the record of the weights cannot be read: %s", error)
            await asyncio.sleep(_LOOK_S)

    async def _look(self) -> None:
        record = await asyncio.to_thread(self._store.read)
        if record is None or record.serial == self._serial:
            return
        if record.serial == self._failed and time.monotonic() < self._again_at:
            return
        try:
            found = await self._change(record)
            problem = None
        except EngineUnavailableError as error:  # ranks were lost meanwhile: again, once new ones are there
            logger.warning("the weights were not changed: %s", error)
            return
        except RayError:
            raise
        except (RayLLMError, OSError) as error:  # whoever promotes is told, and waits for nobody
            logger.error("the weights were not changed: %s", error)
            found, problem = None, str(error)
        except Exception as error:
            logger.exception("the weights were not changed")
            found, problem = None, f"{type(error).__name__}: {error}"
        if problem is not None and record.wanted(self._replica) is record.current:
            self._failed, self._again_at = record.serial, time.monotonic() + _AGAIN_S
        else:
            self._serial = record.serial
        report = ReplicaReport(record.serial, self._engine.weight_version, problem, found)
        await asyncio.to_thread(self._store.report, self._replica, report)

    async def _change(self, record: WeightRecord) -> tuple[float, float] | None:
        """What the gate found, if it was asked."""
        wanted, tried = record.wanted(self._replica), record.candidate
        found = None
        await self._hold(wanted)
        if tried is not None and tried.gate is not None and wanted is tried.weights:
            await self._hold(record.current)
            text = await asyncio.to_thread(self._store.gate, tried.gate)
            found = await check_perplexity(self._engine, text, new=wanted.version, before=record.current.version)
        self._engine.use_weights(wanted.version)
        return found

    async def _hold(self, wanted: Weights) -> None:
        if self._engine.holds_weights(wanted.version):
            return
        version = await self._engine.load_weights(Path(wanted.directory))
        if version != wanted.version:
            raise PromotionError(f"{wanted.directory} holds {version}, not {wanted.version}")
