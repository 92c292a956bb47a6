"""HTTP as the server needs it: bodies with a limit, clients that leave, events, errors in OpenAI's form."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import h11
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from grit_jax.config import InputError
from grit_jax.serve.metrics import Metrics
from grit_jax.serve.protocol import RequestError

_log = logging.getLogger(__name__)

Handler = Callable[[bytes], Awaitable[Mapping[str, Any] | AsyncGenerator[Mapping[str, Any]]]]


class PatientProtocol(H11Protocol):
    """HTTP/1.1 that ends a connection when the head of its next request does not come.

    Attributes:
      head_seconds: For a client to send it.
    """

    head_seconds = 20.0
    _clock: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Starts the clock."""
        super().connection_made(transport)
        self._wait()

    def handle_events(self) -> None:
        """Stops the clock when a head is there, and starts it after the response."""
        super().handle_events()
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the clock."""
        self._stop()
        super().connection_lost(exc)

    def _wait(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop()
        elif self._clock is None:
            self._clock = self.loop.call_later(self.head_seconds, self._give_up)

    def _stop(self) -> None:
        if self._clock:
            self._clock.cancel()
            self._clock = None

    def _give_up(self) -> None:
        self.transport.write(b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
        self.transport.close()


class Bodies:
    """Room for the bodies of all requests under way.

    Args:
      most_bytes: Of one of them.
      all_bytes: Of all of them together.
    """

    def __init__(self, most_bytes: int, all_bytes: int):
        self._most_bytes, self._free = most_bytes, all_bytes

    def check(self, count: int) -> None:
        """Refuses a body of so many bytes where it is too large.

        Raises:
          RequestError: It is.
        """
        if count > self._most_bytes:
            raise RequestError(413, f"the body is over {self._most_bytes} bytes; send less at a time", "too_large")

    @contextlib.contextmanager
    def room(self) -> Generator[Callable[[int], None]]:
        """Gives what takes room for so many bytes, which are free again after the block.

        Raises:
          RequestError: There is no room for them.
        """
        taken = 0

        def take(count: int) -> None:
            nonlocal taken
            self.check(taken + count)
            if count > self._free:
                raise RequestError(
                    503, "the requests under way fill the server's memory; try again later", "overloaded"
                )
            taken, self._free = taken + count, self._free - count

        try:
            yield take
        finally:
            self._free += taken


class Endpoint:
    """An ASGI application that answers POST requests with JSON or a stream of events.

    Args:
      handle: From the body to an object, or to the objects of a stream.
      metrics: What is counted.
      check: Raises RequestError where requests are not taken now.
      place: Where a request is among others until it is answered; entering raises RequestError where it is full.
      api_key: What clients must send; None for nothing.
      bodies: Room for their bodies, which several endpoints share.
      seconds: Within which a body is sent and a response is made.
    """

    def __init__(
        self,
        handle: Handler,
        *,
        metrics: Metrics,
        check: Callable[[], None],
        place: Callable[[], AbstractContextManager[None]],
        api_key: str | None,
        bodies: Bodies,
        seconds: float,
    ):
        self._handle, self._metrics, self._check, self._place = handle, metrics, check, place
        self._api_key, self._bodies, self._seconds = api_key, bodies, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        request, started, status = Request(scope, receive, send), time.perf_counter(), 499  # the client left
        answered = _Answered(send)
        try:
            check_key(request, self._api_key)
            self._check()
            with self._bodies.room() as take:
                body = await self._body(request, take)
                answered.keeps_alive = True
                with self._place():
                    async with asyncio.timeout(self._seconds):
                        await _while_connected(receive, self._respond(body, answered))
            status = 200
        except ClientDisconnect:
            pass
        except (Exception, asyncio.CancelledError) as error:
            refusal = as_refusal(error)
            status = refusal.status
            await answered.refuse(refusal)
        finally:
            self._metrics.requests.labels(scope["path"], status).inc()
            self._metrics.seconds.labels(scope["path"]).observe(time.perf_counter() - started)

    async def _body(self, request: Request, take: Callable[[int], None]) -> bytes:
        self._bodies.check(int(request.headers.get("content-length", 0)))
        pieces = []
        try:
            async with asyncio.timeout(self._seconds):
                async for piece in request.stream():
                    take(len(piece))
                    pieces.append(piece)
        except TimeoutError:
            raise RequestError(408, f"the body did not come within {self._seconds:g} s", "timeout") from None
        return b"".join(pieces)

    async def _respond(self, body: bytes, answered: _Answered) -> None:
        result = await self._handle(body)
        if isinstance(result, Mapping):
            await answered.send_json(200, result)
            return
        async with contextlib.aclosing(result) as events:
            async for event in events:
                await answered.send_event(json.dumps(event))
        await answered.send_event("[DONE]")
        await answered.end()


class _Answered:
    """A response on its way.

    Attributes:
      keeps_alive: Whether the connection is of use afterwards: not while a body is on its way that nobody reads.
    """

    def __init__(self, send: Send):
        self._send, self._streams = send, False
        self.keeps_alive = False

    async def send_json(self, status: int, content: Mapping[str, Any]) -> None:
        headers = _headers(status) | ({} if self.keeps_alive else {"connection": "close"})
        response = JSONResponse(content, status, headers)
        await self._send({"type": "http.response.start", "status": status, "headers": response.raw_headers})
        await self._send({"type": "http.response.body", "body": response.body})

    async def send_event(self, data: str) -> None:
        if not self._streams:
            self._streams = True
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": b""})

    async def refuse(self, error: RequestError) -> None:
        """Tells an error, in the stream where one has begun; for no longer than a client needs that reads."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):
                if self._streams:
                    await self.send_event(json.dumps(error.content()))
                    await self.end()
                else:
                    await self.send_json(error.status, error.content())


def as_refusal(error: BaseException) -> RequestError:
    """What a client is told about an error."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, asyncio.CancelledError):
        return RequestError(503, "the server is being stopped; ask again later", "stopped")
    if isinstance(error, InputError):
        return RequestError(400, str(error))
    if isinstance(error, TimeoutError):
        return RequestError(503, "the answer took longer than the server's limit; ask for less, or later", "timeout")
    _log.error("a request failed", exc_info=error)
    return RequestError(500, "the server failed; see its log", "server_failed")


def check_key(request: Request, api_key: str | None) -> None:
    """Compares the key that a client sends.

    Raises:
      RequestError: It is not the server's.
    """
    given = request.headers.get("authorization", "")
    if api_key is not None and not hmac.compare_digest(given.encode(), f"Bearer {api_key}".encode()):
        raise RequestError(401, "the API key is missing or wrong; send Authorization: Bearer KEY", "invalid_api_key")


async def http_error(request: Request, error: Exception) -> Response:
    """Answers errors outside endpoints, such as paths that do not exist."""
    if isinstance(error, HTTPException):
        error = RequestError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
    refusal = as_refusal(error)
    return JSONResponse(refusal.content(), refusal.status, _headers(refusal.status))


def _headers(status: int) -> dict[str, str]:
    """What a client is told beside a status: when to ask again, in seconds."""
    return {"retry-after": "1"} if status in (429, 503) else {}


async def _while_connected(receive: Receive, work: Awaitable[None]) -> None:
    """Waits for `work`, and cancels it when the client leaves.

    Raises:
      ClientDisconnect: It has left.
    """

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
