"""Changes the weights of a whole endpoint, from whichever of its replicas was asked to.

It changes the record and watches how the replicas follow. If one of them cannot, or the caller goes away, the record
says again what it said before. Should this replica itself be lost, the record stays as it is: some replicas try the
candidate, until it is promoted again or rolled back.
"""

import asyncio
import math
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from pathlib import Path
from typing import Any

from rayllm.core.errors import CheckpointError, ConfigError, PromotionError
from rayllm.engine.build import Prepared
from rayllm.engine.weights import Weights
from rayllm.serve.weight_record import Candidate, ReplicaReport, WeightRecord
from rayllm.serve.weight_store import WeightStore

_LOOK_S = 0.2
_SILENT_S = 10.0  # then whoever asked is told for whom it waits

Event = dict[str, Any]


class Promoter:
    def __init__(self, prepared: Prepared, store: WeightStore) -> None:
        """`prepared`: what this replica started with; if nobody has changed the weights yet, so did all others."""
        self._prepared = prepared
        self._store = store

    async def state(self) -> Event:
        record = await self._read()
        reports = await asyncio.to_thread(self._store.reports)
        return {"event": "state", **_described(record), "replicas": len(reports)}

    async def promote(self, checkpoint: Path, *, share: float | None, gate: str | None) -> AsyncGenerator[Event, None]:
        """What happens, as it does; ends when the weights are what was asked for. Raises PromotionError.

        With `share`, only that share of the replicas (one at least) gets the weights; with `gate` too, the others
        follow once the text has passed on these. With `gate` alone one replica is the first.
        """
        record = await self._read()
        weights = await self._checked(checkpoint)
        tried = record.candidate
        if tried is not None and tried.weights.version != weights.version:
            raise PromotionError(
                f"{tried.weights.version} is being tried by {len(tried.replicas)} of the replicas: wait, if somebody is"
                " just promoting it; a canary is to be promoted or rolled back"
            )
        if tried is None and weights.version == record.current.version:
            yield {"event": "done", **_described(record)}
            return
        gate_name = None if gate is None else await asyncio.to_thread(self._store.keep_gate, gate)
        replicas = await self._replicas()
        first = len(replicas) if share is None else math.ceil(share * len(replicas))
        if share is None and gate is not None:
            first = 1
        try:
            record = record.trying(Candidate(weights, tuple(replicas[:first]), gate_name))
            yield {"event": "trying", "weight_version": weights.version, "replicas": first, "of": len(replicas)}
            async for event in self._change(record):
                yield event
            _, reports = await self._look(record)
            yield {"event": "serving", "replicas": len(reports), **_measured(reports)}
            if share is not None and gate is None:
                yield {"event": "canary", **_described(record)}
                return
            if first < len(replicas):
                record = record.trying(Candidate(weights, tuple(await self._replicas())))
                everyone = len(replicas)
                yield {"event": "trying", "weight_version": weights.version, "replicas": everyone, "of": everyone}
                async for event in self._change(record):
                    yield event
        except PromotionError as error:
            if await self._read() != record:
                raise
            try:
                async for event in self._change(record.withdrawn()):
                    yield event
            except PromotionError:
                raise error from None
            raise PromotionError(f"{error}; {record.current.version} is served as before") from error
        except BaseException:  # the caller is gone
            if await self._read() == record:
                with suppress(PromotionError):
                    await asyncio.to_thread(self._store.write, record.withdrawn())
            raise
        record = record.taken()
        async for event in self._follow(record):
            yield event
        yield {"event": "done", **_described(record)}

    async def rollback(self) -> AsyncGenerator[Event, None]:
        """To what all replicas served before a candidate, or else before the last promotion. Raises PromotionError."""
        record = await self._read()
        if record.candidate is None and record.previous is None:
            raise PromotionError("there are no weights to go back to")
        record = record.rolled_back()
        yield {"event": "returning", "weight_version": record.current.version}
        async for event in self._follow(record):
            yield event
        yield {"event": "done", **_described(record)}

    async def _read(self) -> WeightRecord:
        record = await asyncio.to_thread(self._store.read)
        return record or WeightRecord(serial=0, current=self._prepared.weights)

    async def _checked(self, checkpoint: Path) -> Weights:
        if not checkpoint.is_absolute():
            raise PromotionError(f"{checkpoint}: must be an absolute path, as the replicas see it")
        try:
            return await asyncio.to_thread(self._prepared.replacement, checkpoint)
        except (CheckpointError, ConfigError) as error:
            raise PromotionError(str(error)) from error

    async def _replicas(self) -> list[str]:
        return sorted(await asyncio.to_thread(self._store.reports))

    async def _follow(self, record: WeightRecord) -> AsyncGenerator[Event, None]:
        """`_change` to what all replicas are to serve from now on, and try to until they do."""
        try:
            async for event in self._change(record):
                yield event
        except PromotionError as error:
            if await self._read() != record:
                raise
            raise PromotionError(
                f"{record.current.version} is served, but not yet by every replica: {error}"
            ) from error

    async def _change(self, record: WeightRecord) -> AsyncGenerator[Event, None]:
        """Ends when every replica that the record concerns has followed: those that try a candidate, else all. Tells
        for whom it waits, if that is long."""
        await asyncio.to_thread(self._store.write, record)
        said, silent_until = set[str](), time.monotonic() + _SILENT_S
        while True:
            await asyncio.sleep(_LOOK_S)
            behind, _ = await self._look(record)
            if not behind:
                return
            if behind != said and time.monotonic() >= silent_until:
                yield {"event": "waiting", "waiting_for": sorted(behind)}
                said, silent_until = behind, time.monotonic() + _SILENT_S

    async def _look(self, record: WeightRecord) -> tuple[set[str], dict[str, ReplicaReport]]:
        """-> the replicas that have not followed, and what those say that have. Raises PromotionError for a problem of
        one of them, and when the record is no longer the last."""
        if await self._read() != record:
            raise PromotionError("another change of the weights took the place of this one")
        reports = await asyncio.to_thread(self._store.reports)
        concerned = set(reports) if record.candidate is None else set(reports) & set(record.candidate.replicas)
        if not concerned:
            raise PromotionError("the replicas that were to try the weights are gone")
        followed = {
            replica: report
            for replica in concerned
            if (report := reports[replica]) is not None and report.serial >= record.serial
        }
        for report in followed.values():
            if report.problem is not None:
                raise PromotionError(report.problem)
        return concerned - set(followed), followed


def _described(record: WeightRecord) -> Event:
    tried = record.candidate
    return {
        "weight_version": record.current.version,
        "previous": None if record.previous is None else record.previous.version,
        "candidate": None if tried is None else tried.weights.version,
    }


def _measured(reports: dict[str, ReplicaReport]) -> Event:
    found = [report.perplexities for report in reports.values() if report.perplexities is not None]
    if not found:
        return {}
    new, before = max(found)
    return {"perplexity": new, "perplexity_before": before}
