"""What a request must bring before anything of it is read."""

from __future__ import annotations

import hmac
import re
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from grit_jax.errors import InputError
from grit_jax.serve.errors import RequestError

ANY_HOST = "*"

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_NAME, _IP = "[A-Za-z0-9._-]+", "[0-9a-fA-F:.]+"
_HOST = re.compile(rf"(\[(?P<ip>{_IP})\]|(?P<name>{_NAME}))(:[0-9]{{1,5}})?")
_KEY = re.compile(r"[!-~]+")


class KnownHosts:
    """Middleware that refuses requests to hosts with other names than the server's.

    A page of a stranger, whose name is made to lead to this server, could otherwise talk to it from a browser here. The
    server's names are those of this machine to itself, the address that a connection was made to, and what is allowed.

    Args:
      app: What takes the other requests.
      allowed: Further names; `*` is any.
    """

    def __init__(self, app: ASGIApp, *, allowed: Sequence[str]):
        self._app, self._allowed = app, {name.lower() for name in allowed}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or refuses it."""
        if scope["type"] == "http" and not self._knows(scope):
            given = Headers(scope=scope).get("host", "")
            error = RequestError(
                400, f"Host: {given[:100]!r} is not this server's name; start it with --allow-host NAME", "unknown_host"
            )
            await JSONResponse(error.content(), error.status, {"connection": "close"})(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        if ANY_HOST in self._allowed:
            return True
        found = _HOST.fullmatch(Headers(scope=scope).get("host", ""))
        host = found and (found["ip"] or found["name"]).lower()
        reached = (scope.get("server") or ("",))[0].removeprefix("::ffff:")  # an IPv4 address as IPv6 has it
        return host in {*_LOOPBACK, reached, *self._allowed}


def check_api_key(key: str, *, source: str) -> None:
    """Refuses a key that no client could send.

    Args:
      key: What clients must send.
      source: Where it comes from, for messages.

    Raises:
      InputError: It is empty, or has other characters than a header can hold.
    """
    if not key:
        raise InputError(f"{source} is empty; give it a key, or unset it to ask clients for none")
    if not _KEY.fullmatch(key):
        raise InputError(f"{source}: a key has no spaces and only printable ASCII characters; choose another")


def check_host(name: str, *, source: str) -> None:
    """Refuses a name that no request could come to; arguments as of `check_api_key`.

    Raises:
      InputError: It has a scheme, a port or a path, or no name at all.
    """
    if name != ANY_HOST and not re.fullmatch(f"{_NAME}|{_IP}", name):
        raise InputError(f"{source} {name}: give the name alone, such as grit.example, or {ANY_HOST} for any")


def check_authorization(request: Request, api_key: str | None) -> None:
    """Compares the key that a client sends.

    Raises:
      RequestError: It is not the server's.
    """
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    right = hmac.compare_digest(given.strip().encode(), (api_key or "").encode()) and scheme.lower() == "bearer"
    if api_key is not None and not right:
        raise RequestError(401, "the API key is missing or wrong; send Authorization: Bearer KEY", "invalid_api_key")


def check_content_type(request: Request) -> None:
    """Refuses bodies that are not announced as JSON, which a foreign page could send without being asked.

    Raises:
      RequestError: The type is another, or missing.
    """
    kind, _, parameters = ",".join(request.headers.getlist("content-type")).lower().partition(";")
    charset = parameters.replace(" ", "").replace('"', "")
    if kind.strip() != "application/json" or charset not in ("", "charset=utf-8"):
        raise RequestError(415, "the body must be JSON; send Content-Type: application/json", "unsupported_media_type")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise RequestError(415, "the body must not be compressed; send no Content-Encoding", "unsupported_media_type")
