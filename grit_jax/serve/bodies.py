"""The bodies of requests: limits on their size, alone and together, and on their time."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from starlette.requests import Request

from grit_jax.serve.request_errors import RequestError

_SECONDS = 20.0  # for any body
_BYTES_PER_SECOND = 100_000  # on average, after those seconds


@dataclasses.dataclass(eq=False)
class _Body:
    """A body that is being received.

    Attributes:
      deadline: When it must be complete.
      size: Bytes received.
      dropped: Whether its memory has gone to another body.
    """

    deadline: asyncio.Timeout
    size: int = 0
    dropped: bool = False


class Bodies:
    """Memory for the bodies of all requests in progress.

    When it is full, a new body displaces the one that has been arriving longest, so that slow clients keep nobody out.

    Args:
      most_bytes: Limit of one body.
      all_bytes: Limit of all bodies together.
      seconds: Most time for one body, however large.
    """

    def __init__(self, most_bytes: int, all_bytes: int, *, seconds: float):
        self._most_bytes, self._free, self._seconds = most_bytes, all_bytes, seconds
        self._arriving: list[_Body] = []  # longest first

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncGenerator[bytes]:
        """The body of a request; its memory is free again after the block.

        Raises:
          RequestError: It is too large, arrives too slowly, or there is no memory for it.
        """
        self._check(int(request.headers.get("content-length", 0)))
        started = asyncio.get_running_loop().time()
        body, pieces = _Body(asyncio.timeout_at(started + self._allowed(0))), []
        try:
            self._arriving.append(body)
            try:
                async with body.deadline:
                    async for piece in request.stream():
                        self._reserve(body, len(piece))
                        pieces.append(piece)
                        if not body.dropped:
                            body.deadline.reschedule(started + self._allowed(body.size))
            except TimeoutError:
                raise RequestError(408, "the body arrives too slowly; send it without a pause", "timeout") from None
            finally:
                self._arriving.remove(body)
            yield b"".join(pieces)
        finally:
            self._free += body.size

    def _allowed(self, size: int) -> float:
        """Seconds for a body with `size` bytes received."""
        return min(self._seconds, _SECONDS + size / _BYTES_PER_SECOND)

    def _check(self, size: int) -> None:
        if size > self._most_bytes:
            raise RequestError(413, f"the body is over {self._most_bytes} bytes; send less at a time", "too_large")

    def _reserve(self, body: _Body, size: int) -> None:
        self._check(body.size + size)
        while size > self._free:
            longest = next((other for other in self._arriving if other.size), body)
            if longest is body:
                message = "the requests in progress fill the server's memory; try again later"
                raise RequestError(503, message, "overloaded")
            longest.dropped = True
            longest.deadline.reschedule(0)
            self._free, longest.size = self._free + longest.size, 0
        body.size, self._free = body.size + size, self._free - size
