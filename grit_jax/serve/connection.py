"""HTTP/1.1 that is strict with the heads of requests, and patient with them for so long only."""

from __future__ import annotations

import asyncio
import contextlib
import re
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

_END_OF_HEAD = re.compile(rb"\n\r?\n")
_SIZE = re.compile(rb"\n(content-length|transfer-encoding)[ \t]*:([^\r\n]*)", re.IGNORECASE)


class StrictConnection(h11.Connection):
    """A connection whose requests say once how long they are.

    h11 takes a length that is told twice, and one beside chunks. A proxy before this server may read such a request in
    another way, and then pass on a part of its body as a request of somebody else.
    """

    def next_event(self) -> Any:
        """The next event.

        Raises:
          h11.RemoteProtocolError: As of `h11.Connection`, or a request tells its length more than once.
        """
        if self.their_state is h11.IDLE:
            received, _ = self.trailing_data
            head = _END_OF_HEAD.split(received, 1)[0]
            sizes = _SIZE.findall(head)
            if len(sizes) > 1 or any(b"," in value for _, value in sizes):
                raise h11.RemoteProtocolError("the length of the body is told more than once")
        return super().next_event()


class PatientProtocol(H11Protocol):
    """uvicorn's protocol with strict heads; it ends a connection when the head of its next request does not come.

    Attributes:
      head_seconds: For a client to send it.
    """

    head_seconds = 20.0
    _clock: asyncio.TimerHandle | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.conn = StrictConnection(h11.SERVER)

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

    def send_400_response(self, msg: str) -> None:
        """Answers what is no HTTP, unless a response has begun: the connection ends in either case."""
        with contextlib.suppress(h11.LocalProtocolError):
            super().send_400_response(msg)
        self.transport.close()

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
