"""The bodies of requests: how large they may be, alone and together, and how long they may take."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from starlette.requests import Request

from grit_jax.serve.errors import RequestError

_SECONDS = 20.0  # that a body may take, however small
_BYTES_PER_SECOND = 100_000  # that it must have on average beyond them


@dataclasses.dataclass(eq=False)
class _Body:
    """A body that is on its way.

    Attributes:
      deadline: When it must be there.
      size: Bytes that have come.
      given_up: Whether it has lost its room to another.
    """

    deadline: asyncio.Timeout
    size: int = 0
    given_up: bool = False


class Bodies:
    """Room for the bodies of all requests under way.

    Where there is none for a new one, the body that has been on its way longest is given up, so that clients that send
    slowly keep nobody out.

    Args:
      most_bytes: Of one of them.
      all_bytes: Of all of them together.
      seconds: Most that one may take, however large.
    """

    def __init__(self, most_bytes: int, all_bytes: int, *, seconds: float):
        self._most_bytes, self._free, self._seconds = most_bytes, all_bytes, seconds
        self._coming: list[_Body] = []  # longest first

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncGenerator[bytes]:
        """The body of a request, whose room is free again after the block.

        Raises:
          RequestError: It is too large, comes too slowly, or there is no room for it.
        """
        self._check(int(request.headers.get("content-length", 0)))
        started = asyncio.get_running_loop().time()
        body, pieces = _Body(asyncio.timeout_at(started + self._allowed(0))), []
        try:
            self._coming.append(body)
            try:
                async with body.deadline:
                    async for piece in request.stream():
                        self._take(body, len(piece))
                        pieces.append(piece)
                        if not body.given_up:
                            body.deadline.reschedule(started + self._allowed(body.size))
            except TimeoutError:
                raise RequestError(408, "the body comes too slowly; send it without a pause", "timeout") from None
            finally:
                self._coming.remove(body)
            yield b"".join(pieces)
        finally:
            self._free += body.size

    def _allowed(self, size: int) -> float:
        """Seconds for a body of which so many bytes have come."""
        return min(self._seconds, _SECONDS + size / _BYTES_PER_SECOND)

    def _check(self, count: int) -> None:
        if count > self._most_bytes:
            raise RequestError(413, f"the body is over {self._most_bytes} bytes; send less at a time", "too_large")

    def _take(self, body: _Body, count: int) -> None:
        self._check(body.size + count)
        while count > self._free:
            longest = next((other for other in self._coming if other.size), body)
            if longest is body:
                raise RequestError(
                    503, "the requests under way fill the server's memory; try again later", "overloaded"
                )
            longest.given_up = True
            longest.deadline.reschedule(0)
            self._free, longest.size = self._free + longest.size, 0
        body.size, self._free = body.size + count, self._free - count
