"""The routes that change an endpoint's weights. Each call carries the operator's key (`admin_key`), and is answered by
a stream of events that tells how far it is: closing it takes back what is not complete.
"""

import hmac
import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path

import msgspec
from pydantic import Field
from starlette.responses import Response

from rayllm.core.errors import InvalidRequestError, PermissionDeniedError
from rayllm.core.tokenizer import check_text
from rayllm.serve.admin_key import VARIABLE
from rayllm.serve.http_reply import Reply
from rayllm.serve.openai_response import DONE, event
from rayllm.serve.openai_schema import Wire, parse
from rayllm.serve.promoter import Event, Promoter
from rayllm.serve.service import InferenceService

MAX_GATE_CHARS = 1 << 20


class PromoteRequest(Wire):
    """`checkpoint`: a directory as the replicas see it; `canary`: the share of them that is to have it first; `gate`: a
    text whose perplexity is to be about that of the weights before."""

    checkpoint: str
    canary: float | None = Field(default=None, gt=0, le=1)
    gate: str | None = Field(default=None, max_length=MAX_GATE_CHARS)


class AdminFace:
    def __init__(self, service: InferenceService, promoter: Promoter) -> None:
        self._service = service
        self._promoter = promoter

    async def weights(self) -> Response:
        async def work(reply: Reply) -> None:
            await reply.send_json(msgspec.json.encode(await self._promoter.state()))

        return self._reply(work)

    async def promote(self) -> Response:
        async def work(reply: Reply) -> None:
            wire = parse(PromoteRequest, await reply.read_body())
            if wire.gate is not None:
                check_text(wire.gate, "gate")
                if not wire.gate.strip():
                    raise InvalidRequestError("gate", "holds no text")
            events = self._promoter.promote(Path(wire.checkpoint), share=wire.canary, gate=wire.gate)
            await reply.while_connected(_send(reply, events))

        return self._reply(work)

    async def rollback(self) -> Response:
        async def work(reply: Reply) -> None:
            await reply.read_body()
            await reply.while_connected(_send(reply, self._promoter.rollback()))

        return self._reply(work)

    def _reply(self, work: Callable[[Reply], Awaitable[None]]) -> Response:
        async def authorised(reply: Reply) -> None:
            _check_key(reply.header("authorization"))
            await work(reply)

        return Reply(authorised, weight_version=self._service.weight_version, headers={})


def _check_key(authorization: str) -> None:
    key = os.environ.get(VARIABLE)
    if not key:
        raise PermissionDeniedError(
            f"the weights of this endpoint cannot be changed: it was started without {VARIABLE}"
        )
    if not hmac.compare_digest(authorization.encode(), f"Bearer {key}".encode()):
        raise PermissionDeniedError(f"authorization: must be Bearer and the endpoint's {VARIABLE}")


async def _send(reply: Reply, events: AsyncGenerator[Event, None]) -> None:
    async with aclosing(events):
        async for each in events:
            await reply.send_event(event(msgspec.json.encode(each)))
    await reply.send_event(DONE, last=True)
