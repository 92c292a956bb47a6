"""The thread that owns the model: embeds the texts of many requests together, and generates text in between."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple, TypeVar, cast

import jax
import numpy as np

from grit_jax.errors import InputError
from grit_jax.inference.embedder import StartedEmbedding
from grit_jax.inference.engine import Block, Continuation, Engine
from grit_jax.inference.model import GritModel
from grit_jax.serve.counters import Counters
from grit_jax.serve.fairness import Caller, FairQueue
from grit_jax.serve.request_errors import RequestError
from grit_jax.text.prompts import TokenizedPrompt

T = TypeVar("T")

_log = logging.getLogger(__name__)

Skill = Literal["embed", "write"]
Work = Literal[Skill, "find"]

_ROWS_PER_RESERVED = 8  # one in this many rows of a lane is denied to a request that holds all others


class _Stopped(Exception):
    """Ends the thread."""


class _EmbedJob:
    """The texts that one request embeds: the vectors so far, and the number of texts without one."""

    def __init__(self, num_texts: int, future: asyncio.Future[np.ndarray]):
        self.num_left, self.future = num_texts, future
        self.vectors: dict[int, np.ndarray] = {}


class _Text(NamedTuple):
    """A text that waits to be embedded, and its index in its request."""

    job: _EmbedJob
    index: int
    prompt: TokenizedPrompt


class _Embedding(NamedTuple):
    """Texts that the device is embedding, and their batches."""

    texts: list[_Text]
    batches: list[StartedEmbedding]


class _LaneQueue:
    """Completions that a lane of the engine is writing, and those that wait for one of its rows.

    Requests take turns to get a free row. No request ever has all rows of a lane with several: many long completions
    would keep the next request waiting until one of them ends.
    """

    def __init__(self, rows: int):
        self._rows = rows
        self._most_of_request = rows - -(-rows // _ROWS_PER_RESERVED) if rows > 1 else rows
        self._active: dict[Continuation, Caller] = {}
        self._num_active = Counter[Caller]()
        self.waiting = FairQueue[Continuation]()

    def take(self) -> list[Continuation]:
        """Takes the completions that have a row now."""
        found = []
        while len(self._active) < self._rows and (caller := self.waiting.first(self._may_have_row)):
            continuation = self.waiting.pop(caller)
            self.waiting.rotate(caller)
            self._active[continuation] = caller
            self._num_active[caller] += 1
            found.append(continuation)
        return found

    def remove(self, continuation: Continuation, caller: Caller) -> None:
        """Removes a completion, if it is here."""
        self.waiting.discard(caller, continuation)
        if self._active.pop(continuation, None):
            self._num_active[caller] -= 1
            self._num_active += Counter()  # drops zeros

    def _may_have_row(self, caller: Caller) -> bool:
        return self._num_active[caller] < self._most_of_request


class _Sink(NamedTuple):
    """Where the blocks of a completion go, its request, and its lane."""

    put: Callable[[Block | Exception], None]
    caller: Caller
    lane: _LaneQueue


class Scheduler:
    """Runs a model for requests of an event loop, in a thread of its own.

    Each turn embeds one packed batch of the waiting texts and writes one block of each active completion, so no skill
    waits longer for the other. While the device works on one, the thread takes the results of the other and prepares
    its next call. Requests to a skill take turns, and so do their clients.

    An error of one request fails that request alone. An error of the device, whose state is then lost, fails all.

    Args:
      model: The model, which embeds.
      engine: Its engine, which writes.
      counters: The server's counters.
      queue: Most requests to a skill, waiting or in progress.
      prepare: Called first in the thread, with a function that it calls often so that `stop` can end it.
      idle: Called while there is nothing else to do; returns whether it did anything.
    """

    def __init__(
        self,
        model: GritModel,
        engine: Engine,
        counters: Counters,
        *,
        queue: int,
        prepare: Callable[[Callable[[int], None]], None] = lambda progress: None,
        idle: Callable[[], bool] = lambda: False,
    ):
        self._model, self._engine, self._counters, self._queue, self._idle = model, engine, counters, queue, idle
        self._prepare = prepare
        self._wake = threading.Condition()
        self._commands: deque[Callable[[], None]] = deque()
        self._texts = FairQueue[_Text]()
        self._embedding: _Embedding | None = None
        self._lanes = [_LaneQueue(rows) for rows in engine.lane_rows]
        self._sinks: dict[Continuation, _Sink] = {}
        self._calls = FairQueue[Callable[[], None]]()
        self._admitted: dict[Skill, Counter[str]] = {"embed": Counter(), "write": Counter()}
        self._failure_callbacks: dict[object, Callable[[Exception], None]] = {}
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)
        self.failure: RequestError | None = None

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after its turn, dropping the work in progress."""
        self._stopped = True
        self._command(lambda: None)
        self._thread.join()

    @property
    def num_waiting(self) -> int:
        """Completions that wait for a row."""
        return sum(len(lane.waiting) for lane in self._lanes)

    @contextmanager
    def admit(self, skill: Skill, client: str) -> Generator[None]:
        """Counts a request among those to its skill, waiting or in progress.

        A client without a request is admitted up to twice the limit, so that another client cannot fill the queue.

        Raises:
          RequestError: The queue is full.
        """
        admitted = self._admitted[skill]
        total = admitted.total()
        if total >= (self._queue if admitted[client] else 2 * self._queue):
            raise RequestError(429, f"{total} such requests wait or are in progress; try again later", "queue_full")
        admitted[client] += 1
        try:
            yield
        finally:
            admitted[client] -= 1
            if not admitted[client]:
                del admitted[client]

    async def embed(self, texts: Sequence[TokenizedPrompt], caller: Caller) -> np.ndarray:
        """Vectors of texts, float32 [texts, embed].

        Raises:
          RequestError: The model has failed.
        """
        job = _EmbedJob(len(texts), asyncio.get_running_loop().create_future())

        def submit() -> None:
            for index, text in enumerate(texts):
                self._texts.put(caller, _Text(job, index, text))

        with self._fails_through(lambda error: _settle(job.future, error=error)):
            self._command(submit)
            return await job.future

    async def write(self, continuation: Continuation, caller: Caller) -> AsyncGenerator[Block]:
        """Blocks of a completion as they are written; closing the iterator ends it.

        Raises:
          RequestError: The model has failed.
          InputError: Prompt and completion do not fit.
        """
        loop, blocks = asyncio.get_running_loop(), asyncio.Queue[Block | Exception]()

        def put(found: Block | Exception) -> None:
            loop.call_soon_threadsafe(blocks.put_nowait, found)

        def submit() -> None:
            try:
                lane = self._lanes[self._engine.lane(continuation)]
            except InputError as error:
                put(error)
                return
            self._sinks[continuation] = _Sink(put, caller, lane)
            lane.waiting.put(caller, continuation)

        def cancel() -> None:
            self._remove(continuation)
            self._engine.cancel(continuation)

        with self._fails_through(put):
            self._command(submit)
            try:
                while True:
                    block = await blocks.get()
                    if isinstance(block, Exception):
                        raise block
                    yield block
                    if block.finish:
                        return
            finally:
                self._command(cancel)

    async def call(self, function: Callable[[], T], caller: Caller) -> T:
        """Runs a function on the thread, such as a search, and returns its result or raises its error.

        Raises:
          RequestError: The model has failed.
        """
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def run() -> None:
            if future.done():  # the client has left
                return
            try:
                _settle(future, function())
            except jax.errors.JaxRuntimeError:
                raise
            except Exception as error:  # this request's own
                _settle(future, error=error)

        with self._fails_through(lambda error: _settle(future, error=error)):
            self._command(lambda: self._calls.put(caller, run))
            return await future

    @contextmanager
    def _fails_through(self, fail: Callable[[Exception], None]) -> Generator[None]:
        """Calls `fail` if the model fails meanwhile."""
        key = object()
        self._failure_callbacks[key] = fail  # before reading `failure`, which the thread sets before it calls these
        try:
            if self.failure:
                raise self.failure
            yield
        finally:
            del self._failure_callbacks[key]

    def _command(self, action: Callable[[], None]) -> None:
        with self._wake:
            self._commands.append(action)
            self._wake.notify()

    def _run(self) -> None:
        try:
            self._prepare(self._end_if_stopped)
            while not self._stopped:
                self._wait_for_work()
                if not self._embedding:
                    self._start_embedding()
                with self._timed("write"):
                    for lane in self._lanes:
                        for continuation in lane.take():
                            self._engine.submit(continuation)
                    self._engine.start()
                self._finish_embedding()
                self._take_commands()
                if caller := self._calls.first():
                    with self._timed("find"):
                        self._calls.pop(caller)()
                self._start_embedding()
                self._finish_writing()
        except _Stopped:
            pass
        except Exception:  # an error of the device, whose state is lost
            _log.exception("the model failed; every request is answered with 503 from now on")
            self.failure = RequestError(503, "the model has failed; see the server's log", "model_failed")
            for fail in list(self._failure_callbacks.values()):
                fail(self.failure)

    def _end_if_stopped(self, _: int) -> None:
        if self._stopped:
            raise _Stopped

    def _wait_for_work(self) -> None:
        while True:
            self._take_commands()
            busy = self._texts or self._embedding or self._calls or self._engine.is_busy or self.num_waiting
            if self._stopped or busy or self._did_idle():
                return
            with self._wake:
                if not self._commands:
                    self._wake.wait()

    def _take_commands(self) -> None:
        """Runs the commands of the event loop."""
        with self._wake:
            commands, self._commands = self._commands, deque()
        for command in commands:
            command()

    def _did_idle(self) -> bool:
        try:
            return self._idle()
        except jax.errors.JaxRuntimeError:
            raise
        except Exception:
            _log.exception("the work of an idle server failed")
            return True

    def _start_embedding(self) -> None:
        """Gives the device as many of the texts whose turn it is as it takes at a time.

        A request with more texts then goes last, so that it does not keep others waiting.
        """
        taken: list[_Text] = []
        num_tokens = 0
        while caller := self._texts.first():
            text = self._texts.peek(caller)
            if not text.job.future.cancelled():
                num_tokens += len(text.prompt.tokens)
                if taken and num_tokens > self._model.batch_tokens:
                    if taken[-1].job is text.job:
                        self._texts.rotate(caller)
                    break
                taken.append(text)
            self._texts.pop(caller)
        if not taken:
            return
        with self._timed("embed"):
            batches = list(self._model.start_embedding([text.prompt for text in taken]))
        self._counters.tokens.labels("embedded").inc(sum(len(text.prompt.tokens) for text in taken))
        self._embedding = _Embedding(taken, batches)

    def _finish_embedding(self) -> None:
        if not self._embedding:
            return
        (texts, batches), self._embedding = self._embedding, None
        with self._timed("embed"):
            vectors = [pair for batch in batches for pair in zip(batch.indices, batch.vectors(), strict=True)]
        for number, vector in vectors:
            job, index, prompt = texts[number]
            # A number that is not finite spreads to other texts in its packed row.
            job.vectors[index] = vector if np.isfinite(vector).all() else self._model.embed([prompt])[0]
            job.num_left -= 1
            if not job.num_left:
                _settle(job.future, np.stack([vector for _, vector in sorted(job.vectors.items())]))

    def _finish_writing(self) -> None:
        with self._timed("write"):
            blocks = self._engine.finish()
        for block in blocks:
            self._counters.tokens.labels("written").inc(len(block.tokens))
            self._sinks[block.continuation].put(block)
            if block.finish:
                self._remove(block.continuation)

    def _remove(self, continuation: Continuation) -> None:
        """Removes a completion, unless it has already ended."""
        if sink := self._sinks.pop(continuation, None):
            sink.lane.remove(continuation, sink.caller)

    @contextmanager
    def _timed(self, work: Work) -> Generator[None]:
        started = time.perf_counter()
        yield
        self._counters.device_seconds.labels(work).inc(time.perf_counter() - started)


def _settle(future: asyncio.Future[T], result: T | None = None, *, error: Exception | None = None) -> None:
    """Sets the result of a future from another thread, unless it was cancelled."""

    def settle() -> None:
        if not future.done():
            if error:
                future.set_exception(error)
            else:
                future.set_result(cast(T, result))

    future.get_loop().call_soon_threadsafe(settle)
