"""Errors of requests, in OpenAI's form."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from grit_jax.errors import InputError, NotFiniteError
from grit_jax.retrieval.manifest import DamagedError

_log = logging.getLogger(__name__)

_LONGEST_MESSAGE = 1000  # characters: it may quote the request
_TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}


class RequestError(Exception):
    """An error response.

    Args:
      status: HTTP status.
      message: What is wrong, and the remedy.
      code: Identifies the error for programs.
      param: The wrong field of the request, if there is one.
    """

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None):
        if len(message) > _LONGEST_MESSAGE:
            message = f"{message[:_LONGEST_MESSAGE]}…"
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def content(self) -> dict[str, Any]:
        """The body of the response, in OpenAI's form."""
        error_type = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": error_type, "param": self.param, "code": self.code}}

    def response(self, **headers: str) -> Response:
        """The response; if a later request may succeed, it says when, in seconds."""
        if self.status in (429, 503):
            headers["retry-after"] = "1"
        content = json.dumps(self.content())
        return Response(content, self.status, headers, media_type="application/json")


def not_finite(what: str) -> RequestError:
    """The error for results of the model that are not finite."""
    return RequestError(500, f"the model gives {what} that is not finite; other requests are answered", "not_finite")


def as_request_error(error: BaseException) -> RequestError:
    """The error that a client sees; logs details for the server's operator."""
    match error:
        case RequestError():
            return error
        case asyncio.CancelledError():
            return RequestError(503, "the server is being stopped; ask again later", "stopped")
        case DamagedError():
            _log.error("a request failed: %s", error)
            message = "a document of the index cannot be read; the server's log names it"
            return RequestError(500, message, "index_damaged")
        case NotFiniteError():
            return RequestError(500, f"{error}; other requests are answered", "not_finite")
        case InputError():
            return RequestError(400, str(error))
        case TimeoutError():
            return RequestError(
                503, "the response took longer than the server's limit; ask for less, or later", "timeout"
            )
        case _:
            _log.error("a request failed", exc_info=error)
            return RequestError(500, "the server failed; see its log", "server_failed")


async def http_error(request: Request, error: Exception) -> Response:
    """The response to an error outside the endpoints, such as an unknown path."""
    if isinstance(error, HTTPException):
        error = RequestError(error.status_code, f"{request.method} {request.url.path[:100]}: {error.detail}")
    return as_request_error(error).response()
