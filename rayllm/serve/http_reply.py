"""An HTTP answer as a piece of work: its body is read, what it comes to is sent, errors as OpenAI's error objects."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from rayllm.serve.errors import PayloadTooLargeError, failure
from rayllm.serve.openai_response import DONE, event

MAX_BODY_BYTES = 16 << 20
JSON = "application/json"


class Reply(Response):
    """Runs `work` once the server is ready for the answer, and turns what it raises into an error for the client:
    a status and OpenAI's error object, or an event of the stream if that has begun.

    `weight_version`: what is said in the header; an answer's own, once it is known."""

    def __init__(
        self, work: Callable[["Reply"], Awaitable[None]], *, weight_version: str, headers: Mapping[str, str]
    ) -> None:
        super().__init__()
        self.weight_version = weight_version
        self._work = work
        self._extra_headers = headers
        self._streaming = False
        self._receive: Receive
        self._send: Send

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self._request_headers = dict(scope["headers"])
        try:
            await self._work(self)
        except ClientDisconnect:
            return
        except Exception as error:  # noqa: BLE001 - the edge: a client gets an error of ours, whatever happened
            told = failure(error)
            if self._streaming:
                await self.send_event(event(told.openai_body) + DONE, last=True)
            else:
                await self._send_whole(told.http_status, told.openai_body, told.http_headers)

    def header(self, name: str) -> str:
        """Of the request; empty if it has none."""
        value: bytes = self._request_headers.get(name.lower().encode(), b"")
        return value.decode("latin-1")

    async def read_body(self) -> bytes:
        """Raises PayloadTooLargeError as soon as that is known, ClientDisconnect when it never ends."""
        content_length = self._request_headers.get(b"content-length", b"0")
        if content_length.isdigit() and int(content_length[:20]) > MAX_BODY_BYTES:
            raise PayloadTooLargeError(f"the body is larger than {MAX_BODY_BYTES} bytes")
        parts: list[bytes] = []
        size = 0
        async for part in _body_parts(self._receive):
            size += len(part)
            if size > MAX_BODY_BYTES:
                raise PayloadTooLargeError(f"the body is larger than {MAX_BODY_BYTES} bytes")
            parts.append(part)
        return b"".join(parts)

    async def while_connected(self, work: Coroutine[Any, Any, None]) -> None:
        """Do the work, and give it up as soon as the client is gone, whether or not the server cancels this task."""
        working = asyncio.create_task(work)
        listening = asyncio.create_task(_disconnected(self._receive))
        try:
            await asyncio.wait((working, listening), return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()
        finally:
            working.cancel()
            listening.cancel()
            await asyncio.gather(working, listening, return_exceptions=True)

    async def send_json(self, body: bytes) -> None:
        await self._send_whole(200, body, {})

    async def send_event(self, chunk: bytes, *, last: bool = False) -> None:
        if not self._streaming:
            self._streaming = True
            headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
            await self._send(self._start(200, headers))
        await self._send({"type": "http.response.body", "body": chunk, "more_body": not last})

    async def _send_whole(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        headers = {"content-type": JSON, "content-length": str(len(body)), **headers}
        await self._send(self._start(status, headers))
        await self._send({"type": "http.response.body", "body": body})

    def _start(self, status: int, headers: dict[str, str]) -> Message:
        headers = {**headers, "x-weight-version": self.weight_version, **self._extra_headers}
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        return {"type": "http.response.start", "status": status, "headers": pairs}


async def _body_parts(receive: Receive) -> AsyncIterator[bytes]:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        yield message.get("body", b"")
        if not message.get("more_body", False):
            return


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
