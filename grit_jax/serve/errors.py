"""What clients are told when a request is not answered."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from grit_jax.errors import InputError, NotFiniteError
from grit_jax.retrieval.layout import DamagedError

_log = logging.getLogger(__name__)

_LONGEST_MESSAGE = 1000  # characters: it may quote what the client has sent
_KINDS = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}


class RequestError(Exception):
    """A request that is not answered.

    Args:
      status: Of HTTP.
      message: What is wrong, and the remedy.
      code: What programs tell it by.
      param: The field of the request that is wrong, where it is one.
    """

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None):
        if len(message) > _LONGEST_MESSAGE:
            message = f"{message[:_LONGEST_MESSAGE]}…"
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def content(self) -> dict[str, Any]:
        """The body of the response, in OpenAI's form."""
        kind = _KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """What the response says beside its status: when to ask again, in seconds."""
        return {"retry-after": "1"} if self.status in (429, 503) else {}


def not_finite(what: str) -> RequestError:
    """The model computes a number that is no number."""
    return RequestError(500, f"the model gives {what} that is not finite; other requests are answered", "not_finite")


def as_refusal(error: BaseException) -> RequestError:
    """What a client is told about an error."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, asyncio.CancelledError):
        return RequestError(503, "the server is being stopped; ask again later", "stopped")
    if isinstance(error, DamagedError):
        _log.error("a request failed: %s", error)
        return RequestError(500, "a document of the index cannot be read; the server's log names it", "index_damaged")
    if isinstance(error, NotFiniteError):
        return RequestError(500, f"{error}; other requests are answered", "not_finite")
    if isinstance(error, InputError):
        return RequestError(400, str(error))
    if isinstance(error, TimeoutError):
        return RequestError(503, "the answer took longer than the server's limit; ask for less, or later", "timeout")
    _log.error("a request failed", exc_info=error)
    return RequestError(500, "the server failed; see its log", "server_failed")


async def http_error(request: Request, error: Exception) -> Response:
    """Answers errors outside endpoints, such as paths that do not exist."""
    if isinstance(error, HTTPException):
        error = RequestError(error.status_code, f"{request.method} {request.url.path[:100]}: {error.detail}")
    refusal = as_refusal(error)
    return JSONResponse(refusal.content(), refusal.status, refusal.headers())
