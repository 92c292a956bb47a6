"""ASGI applications that answer POST requests: the body, clients that leave, responses whole and as events."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from grit_jax.serve.bodies import Bodies
from grit_jax.serve.errors import RequestError, as_refusal
from grit_jax.serve.fairness import Caller
from grit_jax.serve.guards import check_authorization, check_content_type
from grit_jax.serve.metrics import Metrics

Response = Mapping[str, Any] | AsyncGenerator[Mapping[str, Any]]
Handler = Callable[[bytes, Caller], Awaitable[Response]]

_numbers = itertools.count()
_to_json = functools.partial(json.dumps, allow_nan=False)


class Endpoint:
    """An ASGI application that answers POST requests with JSON or a stream of events.

    Args:
      handle: From the body and who sends it to an object, or to the objects of a stream.
      metrics: What is counted.
      check: Raises RequestError where requests are not taken now.
      place: Where a request of a client is among others until it is answered; entering raises RequestError where it is
        full.
      api_key: What clients must send; None for nothing.
      bodies: Room for their bodies, which several endpoints share.
      seconds: Within which a response is made.
    """

    def __init__(
        self,
        handle: Handler,
        *,
        metrics: Metrics,
        check: Callable[[], None],
        place: Callable[[str], AbstractContextManager[None]],
        api_key: str | None,
        bodies: Bodies,
        seconds: float,
    ):
        self._handle, self._metrics, self._check, self._place = handle, metrics, check, place
        self._api_key, self._bodies, self._seconds = api_key, bodies, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        request, started, status = Request(scope, receive, send), time.perf_counter(), 499  # the client left
        caller = Caller(request.client.host if request.client else "", next(_numbers))
        answered = _Answered(send)
        try:
            check_authorization(request, self._api_key)
            check_content_type(request)
            self._check()
            async with self._bodies.read(request) as body:
                answered.keeps_alive = True
                with self._place(caller.client):
                    async with asyncio.timeout(self._seconds):
                        await _while_connected(receive, self._respond(body, caller, answered))
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

    async def _respond(self, body: bytes, caller: Caller, answered: _Answered) -> None:
        result = await self._handle(body, caller)
        if isinstance(result, Mapping):
            await answered.send_json(200, await asyncio.to_thread(as_json, result))
            return
        async with contextlib.aclosing(result) as events:
            async for event in events:
                await answered.send_event(_to_json(event))
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

    async def send_json(self, status: int, content: bytes, headers: Mapping[str, str] | None = None) -> None:
        told = {"content-type": "application/json", "content-length": str(len(content))} | dict(headers or {})
        if not self.keeps_alive:
            told["connection"] = "close"
        raw_headers = [(name.encode(), value.encode()) for name, value in told.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": raw_headers})
        await self._send({"type": "http.response.body", "body": content})

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
                    await self.send_event(_to_json(error.content()))
                    await self.end()
                else:
                    await self.send_json(error.status, as_json(error.content()), error.headers())


def as_json(content: Mapping[str, Any]) -> bytes:
    """JSON of an object.

    Items of its lists, which may be iterators, are made one at a time, so that a long response does not keep the
    interpreter from other threads.
    """

    def told(value: Any) -> str:
        if isinstance(value, (list, Iterator)):
            return "[" + ", ".join(map(_to_json, value)) + "]"
        return _to_json(value)

    return ("{" + ", ".join(f"{_to_json(name)}: {told(value)}" for name, value in content.items()) + "}").encode()


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
