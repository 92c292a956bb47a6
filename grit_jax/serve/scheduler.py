"""The thread that owns the model: packs texts of many requests together, and writes answers in between."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple, TypeVar, cast

import numpy as np
from safetensors import SafetensorError

from grit_jax.config import InputError
from grit_jax.engine import Block, Continuation, Engine
from grit_jax.files import UnreachableError
from grit_jax.inference import GritModel, StartedEmbedding
from grit_jax.prompts import TokenizedPrompt
from grit_jax.serve.metrics import Metrics
from grit_jax.serve.protocol import RequestError

T = TypeVar("T")

_log = logging.getLogger(__name__)

Kind = Literal["embed", "write"]
Work = Literal[Kind, "find"]

# What a call may raise without harm to the device: it is asked for what cannot be, or a file cannot be read.
_NOT_OF_THE_DEVICE = (InputError, OSError, UnreachableError, SafetensorError)


class _Stopped(Exception):
    """The thread is to end."""


class _Texts:
    """Texts of one request that are embedded: those that wait with their places, and the vectors of the others."""

    def __init__(self, texts: Sequence[TokenizedPrompt], future: asyncio.Future[np.ndarray]):
        self.waiting, self.future = deque(enumerate(texts)), future
        self.vectors: dict[int, np.ndarray] = {}


class _Embedding(NamedTuple):
    """Texts under way: the request of each and its place there, and the batches that hold them."""

    owners: list[tuple[_Texts, int]]
    batches: list[StartedEmbedding]


class Scheduler:
    """Runs a model for requests of an event loop, in a thread of its own.

    Each turn embeds one packed batch of the texts that wait and writes one block of the answers that are under way, so
    neither kind of request keeps the other waiting for longer. While the device does one of them, the thread takes the
    results of the other and makes its next call ready.

    Args:
      model: Embeds.
      engine: Writes.
      metrics: What is counted.
      queue: Most requests of a kind that are under way or wait.
      prepare: Called in the thread before anything else, with what it calls now and then to be ended by `stop`.
      idle: Called while nothing else is to do; returns whether it did anything.
    """

    def __init__(
        self,
        model: GritModel,
        engine: Engine,
        metrics: Metrics,
        *,
        queue: int,
        prepare: Callable[[Callable[[int], None]], None] = lambda progress: None,
        idle: Callable[[], bool] = lambda: False,
    ):
        self._model, self._engine, self._metrics, self._queue, self._idle = model, engine, metrics, queue, idle
        self._prepare = prepare
        self._wake = threading.Condition()
        self._commands: deque[Callable[[], None]] = deque()
        self._texts: deque[_Texts] = deque()
        self._embedding: _Embedding | None = None
        self._sinks: dict[Continuation, Callable[[Block | Exception], None]] = {}
        self._calls: deque[Callable[[], None]] = deque()
        self._places: dict[Kind, int] = {"embed": 0, "write": 0}
        self._fail: dict[object, Callable[[Exception], None]] = {}
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)
        self.failure: RequestError | None = None

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after its turn; what is under way then is not answered."""
        self._stopped = True
        self._command(lambda: None)
        self._thread.join()

    @contextmanager
    def place(self, kind: Kind) -> Generator[None]:
        """A request's place among those of its kind that wait or are under way.

        Raises:
          RequestError: There is none left.
        """
        taken = self._places[kind]
        if taken >= self._queue:
            raise RequestError(429, f"{taken} such requests wait or are under way; try again later", "queue_full")
        self._places[kind] += 1
        try:
            yield
        finally:
            self._places[kind] -= 1

    async def embed(self, texts: Sequence[TokenizedPrompt]) -> np.ndarray:
        """Vectors of texts, float32 [texts, embed].

        Raises:
          RequestError: The model has failed.
        """
        job = _Texts(texts, asyncio.get_running_loop().create_future())
        with self._told_of_failure(lambda error: _settle(job.future, error=error)):
            self._command(lambda: self._texts.append(job))
            return await job.future

    async def write(self, continuation: Continuation) -> AsyncGenerator[Block]:
        """Blocks of an answer as they are written; ends it when the caller leaves.

        Raises:
          RequestError: The model has failed.
          InputError: Prompt and answer do not fit.
        """
        loop, blocks = asyncio.get_running_loop(), asyncio.Queue[Block | Exception]()

        def tell(found: Block | Exception) -> None:
            loop.call_soon_threadsafe(blocks.put_nowait, found)

        def submit() -> None:
            try:
                self._engine.submit(continuation)
                self._sinks[continuation] = tell
            except InputError as error:
                tell(error)

        def leave() -> None:
            self._sinks.pop(continuation, None)
            self._engine.cancel(continuation)

        with self._told_of_failure(tell):
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
                self._command(leave)

    async def call(self, function: Callable[[], T]) -> T:
        """The result of a function that runs on the device, such as a search, and what it raises.

        Raises:
          RequestError: The model has failed.
        """
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def run() -> None:
            if future.done():  # whoever asked has left
                return
            try:
                _settle(future, function())
            except _NOT_OF_THE_DEVICE as error:
                _settle(future, error=error)

        with self._told_of_failure(lambda error: _settle(future, error=error)):
            self._command(lambda: self._calls.append(run))
            return await future

    @contextmanager
    def _told_of_failure(self, fail: Callable[[Exception], None]) -> Generator[None]:
        """Calls `fail` where the model fails meanwhile."""
        key = object()
        self._fail[key] = fail  # before the look at `failure`, which the thread sets before it tells those who are here
        try:
            if self.failure:
                raise self.failure
            yield
        finally:
            del self._fail[key]

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
                    self._engine.start()
                self._finish_embedding()
                self._take_commands()
                if self._calls:
                    with self._timed("find"):
                        self._calls.popleft()()
                self._start_embedding()
                self._finish_writing()
        except _Stopped:
            pass
        except Exception:  # of the device, whose state is lost
            _log.exception("the model failed; every request is answered with 503 from now on")
            self.failure = RequestError(503, "the model has failed; see the server's log", "model_failed")
            for fail in list(self._fail.values()):
                fail(self.failure)

    def _end_if_stopped(self, _: int) -> None:
        if self._stopped:
            raise _Stopped

    def _wait_for_work(self) -> None:
        while True:
            self._take_commands()
            busy = self._texts or self._embedding or self._calls or self._engine.is_busy
            if self._stopped or busy or self._did_idle():
                return
            with self._wake:
                if not self._commands:
                    self._wake.wait()

    def _take_commands(self) -> None:
        """Does what the event loop has asked for."""
        with self._wake:
            commands, self._commands = self._commands, deque()
        for command in commands:
            command()

    def _did_idle(self) -> bool:
        try:
            return self._idle()
        except _NOT_OF_THE_DEVICE:
            _log.exception("what is done while nobody waits failed")
            return True

    def _start_embedding(self) -> None:
        """Gives the device the texts that have waited longest, as many as go through the model at a time.

        A request with more of them comes last then, so that it does not keep the others waiting.
        """
        taken: list[tuple[_Texts, int, TokenizedPrompt]] = []
        num_tokens = 0
        while self._texts:
            job = self._texts[0]
            if job.future.cancelled() or not job.waiting:
                self._texts.popleft()
                continue
            place, text = job.waiting[0]
            num_tokens += len(text.tokens)
            if taken and num_tokens > self._model.batch_tokens:
                if taken[-1][0] is job:
                    self._texts.rotate(-1)
                break
            job.waiting.popleft()
            taken.append((job, place, text))
        if not taken:
            return
        texts = [text for *_, text in taken]
        with self._timed("embed"):
            batches = list(self._model.start_embedding(texts))
        self._metrics.tokens.labels("embedded").inc(sum(len(text.tokens) for text in texts))
        self._embedding = _Embedding([(job, place) for job, place, _ in taken], batches)

    def _finish_embedding(self) -> None:
        if not self._embedding:
            return
        (owners, batches), self._embedding = self._embedding, None
        with self._timed("embed"):
            vectors = [
                (place, vector)
                for batch in batches
                for place, vector in zip(batch.places, batch.vectors(), strict=True)
            ]
        for number, vector in vectors:
            job, place = owners[number]
            job.vectors[place] = vector
        for job in dict.fromkeys(job for job, _ in owners):
            if not job.waiting:
                _settle(job.future, np.stack([vector for _, vector in sorted(job.vectors.items())]))

    def _finish_writing(self) -> None:
        with self._timed("write"):
            blocks = self._engine.finish()
        for block in blocks:
            self._metrics.tokens.labels("written").inc(len(block.tokens))
            sink = self._sinks.pop(block.continuation) if block.finish else self._sinks[block.continuation]
            sink(block)

    @contextmanager
    def _timed(self, work: Work) -> Generator[None]:
        started = time.perf_counter()
        yield
        self._metrics.device_seconds.labels(work).inc(time.perf_counter() - started)


def _settle(future: asyncio.Future[T], result: T | None = None, *, error: Exception | None = None) -> None:
    """Gives a future its result from another thread; one that nobody waits for any more is let be."""

    def settle() -> None:
        if not future.done():
            if error:
                future.set_exception(error)
            else:
                future.set_result(cast(T, result))

    future.get_loop().call_soon_threadsafe(settle)
