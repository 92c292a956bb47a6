"""Fair turns: clients take turns, and so do the requests of each client.

A client is an address. A connection carries one request at a time, so a request also identifies its connection.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Caller(NamedTuple):
    """A waiting request.

    Attributes:
      client: Address of the client.
      request: Unique number of the request.
    """

    client: str
    request: int


class FairQueue(Generic[T]):
    """Items that wait for the turns of their requests.

    The client that has waited longest gets the next turn, for its request that has waited longest.
    """

    def __init__(self):
        self._clients: OrderedDict[str, OrderedDict[int, deque[T]]] = OrderedDict()

    def __len__(self) -> int:
        return sum(len(items) for requests in self._clients.values() for items in requests.values())

    def put(self, caller: Caller, item: T) -> None:
        """Appends an item to those of its request."""
        requests = self._clients.setdefault(caller.client, OrderedDict())
        requests.setdefault(caller.request, deque()).append(item)

    def first(self, may: Callable[[Caller], bool] = lambda caller: True) -> Caller | None:
        """The request whose turn it is among those that `may` have one; None if there is none."""
        callers = (Caller(client, request) for client, requests in self._clients.items() for request in requests)
        return next(filter(may, callers), None)

    def peek(self, caller: Caller) -> T:
        """The next item of a waiting request."""
        return self._clients[caller.client][caller.request][0]

    def pop(self, caller: Caller) -> T:
        """Takes the next item of a waiting request, whose turn ends with its last item or with `rotate`."""
        items = self._clients[caller.client][caller.request]
        item = items.popleft()
        if not items:
            self._remove(caller)
        return item

    def rotate(self, caller: Caller) -> None:
        """Ends the turn of a request: it goes last among its client's, and the client goes last."""
        if caller.request in (requests := self._clients.get(caller.client, OrderedDict())):
            requests.move_to_end(caller.request)
            self._clients.move_to_end(caller.client)

    def discard(self, caller: Caller, item: T) -> None:
        """Removes an item, if it is there."""
        items = self._clients.get(caller.client, {}).get(caller.request, deque())
        if item in items:
            items.remove(item)
            if not items:
                self._remove(caller)

    def _remove(self, caller: Caller) -> None:
        requests = self._clients[caller.client]
        del requests[caller.request]
        self._clients.move_to_end(caller.client)
        if not requests:
            del self._clients[caller.client]


class FairSemaphore:
    """A semaphore of an event loop that requests acquire in fair turns.

    Args:
      count: Requests that may hold it at a time.
    """

    def __init__(self, count: int):
        self._free, self._waiting = count, FairQueue[asyncio.Future[None]]()

    @asynccontextmanager
    async def room(self, caller: Caller) -> AsyncGenerator[None]:
        """Holds the semaphore during the block, once it is the request's turn."""
        if self._free:
            self._free -= 1
        else:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.put(caller, turn)
            try:
                await turn
            except asyncio.CancelledError:
                self._waiting.discard(caller, turn)
                if not turn.cancelled():  # it had its turn and was cancelled at once
                    self._release()
                raise
        try:
            yield
        finally:
            self._release()

    def _release(self) -> None:
        while caller := self._waiting.first():
            turn = self._waiting.pop(caller)
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1
