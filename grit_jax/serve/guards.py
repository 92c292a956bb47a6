"""Requirements that a request must meet before its body is read: strict and timely headers, known host, key, type."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import re
from collections.abc import Sequence
from typing import Any

import h11
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from grit_jax.errors import InputError
from grit_jax.serve.request_errors import RequestError

ANY_HOST = "*"

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_NAME, _IP = "[A-Za-z0-9._-]+", "[0-9a-fA-F:.]+"
_HOST = re.compile(rf"(\[(?P<ip>{_IP})\]|(?P<name>{_NAME}))(:[0-9]{{1,5}})?")
_KEY = re.compile(r"[!-~]+")
_END_OF_HEAD = re.compile(rb"\n\r?\n")
_LENGTH = re.compile(rb"\n(content-length|transfer-encoding)[ \t]*:([^\r\n]*)", re.IGNORECASE)


class StrictConnection(h11.Connection):
    """A connection whose requests state the length of their body once.

    h11 accepts a length stated twice, or along with chunks. A proxy in front of this server may read such a request
    differently, and then forward a part of its body as somebody else's request.
    """

    def next_event(self) -> Any:
        """The next event.

        Raises:
          h11.RemoteProtocolError: As in `h11.Connection`, or a request states its length more than once.
        """
        if self.their_state is h11.IDLE:
            received, _ = self.trailing_data
            head = _END_OF_HEAD.split(received, 1)[0]
            lengths = _LENGTH.findall(head)
            if len(lengths) > 1 or any(b"," in value for _, value in lengths):
                raise h11.RemoteProtocolError("the length of the body is stated more than once")
        return super().next_event()


class StrictProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 with strict heads; closes a connection whose next head is late.

    Attributes:
      head_seconds: Time limit of a head.
    """

    head_seconds = 20.0
    _timer: asyncio.TimerHandle | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.conn = StrictConnection(h11.SERVER)

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Starts the timer."""
        super().connection_made(transport)
        self._set_timer()

    def handle_events(self) -> None:
        """Stops the timer when a head has come, and starts it after the response."""
        super().handle_events()
        self._set_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the timer."""
        self._stop_timer()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answers malformed HTTP, unless a response has begun, and closes the connection."""
        with contextlib.suppress(h11.LocalProtocolError):
            super().send_400_response(msg)
        self.transport.close()

    def _set_timer(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.head_seconds, self._time_out)

    def _stop_timer(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def _time_out(self) -> None:
        self.transport.write(b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
        self.transport.close()


class KnownHosts:
    """Middleware that refuses requests whose Host is not a name of this server.

    Otherwise a stranger's page whose name resolves to this server could talk to it from a browser here. The server's
    names are the loopback names, the address that a connection was made to, and the allowed ones.

    Args:
      app: Receives the other requests.
      allowed: Further names; `*` is any.
    """

    def __init__(self, app: ASGIApp, *, allowed: Sequence[str]):
        self._app, self._allowed = app, {name.lower() for name in allowed}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or refuses it."""
        app = self._app
        if scope["type"] == "http" and not self._knows(scope, host := Headers(scope=scope).get("host", "")):
            message = f"Host: {host[:100]!r} is not this server's name; start it with --allow-host NAME"
            app = RequestError(400, message, "unknown_host").response(connection="close")
        await app(scope, receive, send)

    def _knows(self, scope: Scope, given: str) -> bool:
        if ANY_HOST in self._allowed:
            return True
        found = _HOST.fullmatch(given)
        host = found and (found["ip"] or found["name"]).lower()
        reached = (scope.get("server") or ("",))[0].removeprefix("::ffff:")  # an IPv4 address in IPv6 notation
        return host in {*_LOOPBACK, reached, *self._allowed}


def check_api_key(key: str, *, source: str) -> None:
    """Refuses a key that no client could send; `source` is its origin, for messages.

    Raises:
      InputError: It is empty, or has characters that a header cannot hold.
    """
    if not key:
        raise InputError(f"{source} is empty; give it a key, or unset it to ask clients for none")
    if not _KEY.fullmatch(key):
        raise InputError(f"{source}: a key has no spaces and only printable ASCII characters; choose another")


def check_host(name: str, *, source: str) -> None:
    """Refuses a name that no request could have as its Host; `source` as in `check_api_key`.

    Raises:
      InputError: It has a scheme, a port or a path, or is empty.
    """
    if name != ANY_HOST and not re.fullmatch(f"{_NAME}|{_IP}", name):
        raise InputError(f"{source} {name}: give the name alone, such as grit.example, or {ANY_HOST} for any")


def check_authorization(request: Request, api_key: str | None) -> None:
    """Compares the key of a request with the server's, if it has one.

    Raises:
      RequestError: They differ.
    """
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    right = hmac.compare_digest(given.strip().encode(), (api_key or "").encode()) and scheme.lower() == "bearer"
    if api_key is not None and not right:
        raise RequestError(401, "the API key is missing or wrong; send Authorization: Bearer KEY", "invalid_api_key")


def check_content_type(request: Request) -> None:
    """Refuses bodies not declared as JSON, which a foreign page could send without a preflight request.

    Raises:
      RequestError: The type is wrong or missing, or the body is compressed.
    """
    media_type, _, parameters = ",".join(request.headers.getlist("content-type")).lower().partition(";")
    charset = parameters.replace(" ", "").replace('"', "")
    if media_type.strip() != "application/json" or charset not in ("", "charset=utf-8"):
        raise RequestError(415, "the body must be JSON; send Content-Type: application/json", "unsupported_media_type")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise RequestError(415, "the body must not be compressed; send no Content-Encoding", "unsupported_media_type")
