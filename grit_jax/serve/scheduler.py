"""The thread that owns the model: packs texts of many requests together, and writes answers in between."""

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
from grit_jax.serve.errors import RequestError
from grit_jax.serve.fairness import Caller, FairQueue
from grit_jax.serve.metrics import Metrics
from grit_jax.text.prompts import TokenizedPrompt

T = TypeVar("T")

_log = logging.getLogger(__name__)

Kind = Literal["embed", "write"]
Work = Literal[Kind, "find"]

_KEPT_ROWS = 8  # of so many rows of a lane one is kept from a request that has all others


class _Stopped(Exception):
    """The thread is to end."""


class _Texts:
    """Texts of one request that are embedded: how many have no vector yet, and the vectors of the others."""

    def __init__(self, count: int, future: asyncio.Future[np.ndarray]):
        self.num_left, self.future = count, future
        self.vectors: dict[int, np.ndarray] = {}


class _Text(NamedTuple):
    """A text that waits to be embedded, and its place in its request."""

    owner: _Texts
    place: int
    prompt: TokenizedPrompt


class _Embedding(NamedTuple):
    """Texts under way, and the batches that hold them."""

    texts: list[_Text]
    batches: list[StartedEmbedding]


class _Answers:
    """Answers that one lane of the engine writes, and those that wait for a row of it.

    A row that is free is given in turns. One request never has all rows of a lane that has several: who comes while it
    has many long answers under way would wait until one of them ends.
    """

    def __init__(self, rows: int):
        self._rows = rows
        self._most_of_request = rows - -(-rows // _KEPT_ROWS) if rows > 1 else rows
        self._under_way: dict[Continuation, Caller] = {}
        self._of_request = Counter[Caller]()
        self.waiting = FairQueue[Continuation]()

    def begin(self) -> list[Continuation]:
        """Takes the answers for which there is a row now."""
        found = []
        while len(self._under_way) < self._rows and (caller := self.waiting.first(self._may)):
            continuation = self.waiting.pop(caller)
            self.waiting.rotate(caller)
            self._under_way[continuation] = caller
            self._of_request[caller] += 1
            found.append(continuation)
        return found

    def end(self, continuation: Continuation, caller: Caller) -> None:
        """Forgets an answer, which need not be here."""
        self.waiting.discard(caller, continuation)
        if self._under_way.pop(continuation, None):
            self._of_request[caller] -= 1
            self._of_request += Counter()  # keeps what is above 0

    def _may(self, caller: Caller) -> bool:
        return self._of_request[caller] < self._most_of_request


class _Sink(NamedTuple):
    """Where blocks of an answer go, and whose it is."""

    tell: Callable[[Block | Exception], None]
    caller: Caller
    answers: _Answers


class Scheduler:
    """Runs a model for requests of an event loop, in a thread of its own.

    Each turn embeds one packed batch of the texts that wait and writes one block of the answers that are under way, so
    neither kind of request keeps the other waiting for longer. While the device does one of them, the thread takes the
    results of the other and makes its next call ready. Requests of one kind take turns, and so do their clients.

    What fails for one request fails that request alone. A failure of the device, whose state is then lost, is told to
    all of them.

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
        self._texts = FairQueue[_Text]()
        self._embedding: _Embedding | None = None
        self._answers = [_Answers(rows) for rows in engine.lane_rows]
        self._sinks: dict[Continuation, _Sink] = {}
        self._calls = FairQueue[Callable[[], None]]()
        self._places: dict[Kind, Counter[str]] = {"embed": Counter(), "write": Counter()}
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

    @property
    def num_waiting(self) -> int:
        """Answers that wait for a row."""
        return sum(len(answers.waiting) for answers in self._answers)

    @contextmanager
    def place(self, kind: Kind, client: str) -> Generator[None]:
        """A request's place among those of its kind that wait or are under way.

        A client that has none is let in beyond the limit, up to twice of it, so that another cannot take all places.

        Raises:
          RequestError: There is none left.
        """
        places = self._places[kind]
        taken = places.total()
        if taken >= (self._queue if places[client] else 2 * self._queue):
            raise RequestError(429, f"{taken} such requests wait or are under way; try again later", "queue_full")
        places[client] += 1
        try:
            yield
        finally:
            places[client] -= 1
            if not places[client]:
                del places[client]

    async def embed(self, texts: Sequence[TokenizedPrompt], caller: Caller) -> np.ndarray:
        """Vectors of texts, float32 [texts, embed].

        Raises:
          RequestError: The model has failed.
        """
        job = _Texts(len(texts), asyncio.get_running_loop().create_future())

        def submit() -> None:
            for place, text in enumerate(texts):
                self._texts.put(caller, _Text(job, place, text))

        with self._told_of_failure(lambda error: _settle(job.future, error=error)):
            self._command(submit)
            return await job.future

    async def write(self, continuation: Continuation, caller: Caller) -> AsyncGenerator[Block]:
        """Blocks of an answer as they are written; ends it when whoever asks leaves.

        Raises:
          RequestError: The model has failed.
          InputError: Prompt and answer do not fit.
        """
        loop, blocks = asyncio.get_running_loop(), asyncio.Queue[Block | Exception]()

        def tell(found: Block | Exception) -> None:
            loop.call_soon_threadsafe(blocks.put_nowait, found)

        def submit() -> None:
            try:
                answers = self._answers[self._engine.lane(continuation)]
            except InputError as error:
                tell(error)
                return
            self._sinks[continuation] = _Sink(tell, caller, answers)
            answers.waiting.put(caller, continuation)

        def leave() -> None:
            self._end(continuation)
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

    async def call(self, function: Callable[[], T], caller: Caller) -> T:
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
            except jax.errors.JaxRuntimeError:
                raise
            except Exception as error:  # of this request
                _settle(future, error=error)

        with self._told_of_failure(lambda error: _settle(future, error=error)):
            self._command(lambda: self._calls.put(caller, run))
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
                    self._begin_answers()
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
            busy = self._texts or self._embedding or self._calls or self._engine.is_busy or self.num_waiting
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
        except jax.errors.JaxRuntimeError:
            raise
        except Exception:
            _log.exception("what is done while nobody waits failed")
            return True

    def _start_embedding(self) -> None:
        """Gives the device the texts whose turn it is, as many as go through the model at a time.

        A request with more of them comes last then, so that it does not keep the others waiting.
        """
        taken: list[_Text] = []
        num_tokens = 0
        while caller := self._texts.first():
            text = self._texts.peek(caller)
            if not text.owner.future.cancelled():
                num_tokens += len(text.prompt.tokens)
                if taken and num_tokens > self._model.batch_tokens:
                    if taken[-1].owner is text.owner:
                        self._texts.rotate(caller)
                    break
                taken.append(text)
            self._texts.pop(caller)
        if not taken:
            return
        with self._timed("embed"):
            batches = list(self._model.start_embedding([text.prompt for text in taken]))
        self._metrics.tokens.labels("embedded").inc(sum(len(text.prompt.tokens) for text in taken))
        self._embedding = _Embedding(taken, batches)

    def _finish_embedding(self) -> None:
        if not self._embedding:
            return
        (texts, batches), self._embedding = self._embedding, None
        with self._timed("embed"):
            vectors = [
                (place, vector)
                for batch in batches
                for place, vector in zip(batch.indices, batch.vectors(), strict=True)
            ]
        for number, vector in vectors:
            job, place, prompt = texts[number]
            # In a packed row a number that is not finite is felt by the texts beside it.
            job.vectors[place] = vector if np.isfinite(vector).all() else self._model.embed([prompt])[0]
            job.num_left -= 1
            if not job.num_left:
                _settle(job.future, np.stack([vector for _, vector in sorted(job.vectors.items())]))

    def _begin_answers(self) -> None:
        """Gives the engine the answers for which it has a row."""
        for answers in self._answers:
            for continuation in answers.begin():
                self._engine.submit(continuation)

    def _finish_writing(self) -> None:
        with self._timed("write"):
            blocks = self._engine.finish()
        for block in blocks:
            self._metrics.tokens.labels("written").inc(len(block.tokens))
            self._sinks[block.continuation].tell(block)
            if block.finish:
                self._end(block.continuation)

    def _end(self, continuation: Continuation) -> None:
        """Forgets an answer, which may have ended before."""
        if sink := self._sinks.pop(continuation, None):
            sink.answers.end(continuation, sink.caller)

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
