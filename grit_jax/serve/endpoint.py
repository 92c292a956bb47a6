"""An ASGI application for POST requests: reads bodies, notices leaving clients, sends responses whole or as events."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import itertools
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from typing import Any, Generic

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from grit_jax.serve.fairness import Caller
from grit_jax.serve.guards import check_authorization, check_content_type
from grit_jax.serve.protocol import T, parse
from grit_jax.serve.request_errors import RequestError, as_request_error
from grit_jax.serve.scheduler import Skill
from grit_jax.serve.service import Service

Result = Mapping[str, Any] | AsyncGenerator[Mapping[str, Any]]

_numbers = itertools.count()
_to_json = functools.partial(json.dumps, allow_nan=False)


@dataclasses.dataclass(frozen=True)
class Endpoint(Generic[T]):
    """An ASGI application that answers POST requests with JSON or a stream of events.

    Attributes:
      service: The model and the server's limits.
      request_type: Type that bodies are parsed to.
      handle: Turns a request into an object, or into the objects of a stream.
      skill: Skill in whose queue requests wait.
    """

    service: Service
    request_type: type[T]
    handle: Callable[[Service, T, Caller], Awaitable[Result]]
    skill: Skill

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        service, counters = self.service, self.service.counters
        request, started, status = Request(scope, receive, send), time.perf_counter(), 499  # the client left
        caller = Caller(request.client.host if request.client else "", next(_numbers))
        responder = _Responder(request, send)
        try:
            check_authorization(request, service.api_key)
            check_content_type(request)
            service.check_ready()
            async with service.bodies.read(request) as body:
                responder.keeps_alive = True
                with service.scheduler.admit(self.skill, caller.client):
                    async with asyncio.timeout(service.limits.seconds):
                        await _while_connected(receive, self._respond(body, caller, responder))
            status = 200
        except ClientDisconnect:
            pass
        except (Exception, asyncio.CancelledError) as error:
            request_error = as_request_error(error)
            status = request_error.status
            await responder.send_error(request_error)
        finally:
            counters.requests.labels(scope["path"], status).inc()
            counters.seconds.labels(scope["path"]).observe(time.perf_counter() - started)

    async def _respond(self, body: bytes, caller: Caller, responder: _Responder) -> None:
        request = await asyncio.to_thread(lambda: parse(self.request_type, body))
        self.service.refuse_other_model(request.model)
        result = await self.handle(self.service, request, caller)
        if isinstance(result, Mapping):
            await responder.send(Response(await asyncio.to_thread(as_json, result), media_type="application/json"))
            return
        async with contextlib.aclosing(result) as events:
            async for event in events:
                await responder.send_event(_to_json(event))
        await responder.send_event("[DONE]")
        await responder.end_events()


class _Responder:
    """Sends a response.

    Attributes:
      keeps_alive: Whether the connection stays open; false while nobody reads the arriving body.
    """

    def __init__(self, request: Request, send: Send):
        self._request, self._send, self._streams = request, send, False
        self.keeps_alive = False

    async def send(self, response: Response) -> None:
        if not self.keeps_alive:
            response.headers["connection"] = "close"
        await response(self._request.scope, self._request.receive, self._send)

    async def send_event(self, data: str) -> None:
        if not self._streams:
            self._streams = True
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})

    async def end_events(self) -> None:
        await self._send({"type": "http.response.body", "body": b""})

    async def send_error(self, error: RequestError) -> None:
        """Sends an error, within the stream if one has begun, and gives up on a client that does not read."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):
                if self._streams:
                    await self.send_event(_to_json(error.content()))
                    await self.end_events()
                else:
                    await self.send(error.response())


def as_json(content: Mapping[str, Any]) -> bytes:
    """JSON of an object.

    Lists, which may be iterators, are encoded item by item, so that a long response does not block other threads.
    """

    def encoded(value: Any) -> str:
        if isinstance(value, (list, Iterator)):
            return "[" + ", ".join(map(_to_json, value)) + "]"
        return _to_json(value)

    return ("{" + ", ".join(f"{_to_json(name)}: {encoded(value)}" for name, value in content.items()) + "}").encode()


async def _while_connected(receive: Receive, work: Awaitable[None]) -> None:
    """Awaits `work`, and cancels it when the client leaves.

    Raises:
      ClientDisconnect: The client has left.
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
