"""A run as its callbacks see it, and what they are told of it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Literal

import jax
import numpy as np

from grit_jax.data.batch import Batch
from grit_jax.train.metrics import Meter
from grit_jax.train.step import Metrics

if TYPE_CHECKING:
    from grit_jax.train.loop import Trainer

# What a run is doing: asking for a batch, handing a step to the devices, or one of the things that they wait for.
Phase = Literal["data", "step", "compile", "evaluation", "checkpoint"]


class Callback:
    """Watches a run, or does something besides training. What is not overridden does nothing.

    In a run of several processes each has callbacks of its own, which are told the same things in the same order; what
    is `due` must be so in all of them.
    """

    @contextmanager
    def running(self, run: Run) -> Generator[None]:
        """Around all steps of a session; what comes after the `yield` is not reached where an error ends the run."""
        yield

    def during(self, run: Run, phase: Phase, what: str) -> AbstractContextManager[None]:
        """Around a phase; `what` describes it, such as `the data of step 3`."""
        return nullcontext()

    def before_step(self, run: Run, step: int, batch: Batch) -> None:
        """The next step is about to begin, with parameters as they are."""

    def step_started(self, run: Run, step: int, metrics: Metrics) -> None:
        """A step was handed to the devices, which may work on it for a while: to read its metrics is to wait."""

    def due(self, run: Run, step: int) -> bool:
        """Whether `step_ended` of this step needs the state that it leaves: then no other step begins before."""
        return False

    def step_ended(self, run: Run, step: int, values: dict[str, float]) -> None:
        """A step has ended with these numbers, to which more may be added; unless it is `due`, the next one runs."""

    def said(self, run: Run, text: str) -> None:
        """There is a line for whoever watches."""


class Run:
    """What callbacks are given.

    Args:
      trainer: Whose run it is.
      proceed: `JointStop.proceed`.
      confirm: `SoleWriter.confirm`.

    Attributes:
      trainer: Its config, folder, data, state and model.
      start: Updates done before this session.
      step: The newest step that was begun.
      meter: Reads and times the steps.
      proceed: Whether another piece of work may begin, such as an evaluation; every process asks, and gets one answer.
      confirm: Raises where another process writes to the run folder; to be called before anything that counts is saved.
    """

    def __init__(self, trainer: Trainer, *, proceed: Callable[[], bool], confirm: Callable[[], None]):
        self.trainer, self.proceed, self.confirm = trainer, proceed, confirm
        self.start = self.step = trainer.step
        self.meter = Meter(trainer.config.model.architecture, trainer.mesh)
        self._compiled: set[tuple[tuple[int, ...], ...]] = set()

    def reached(self, step: int, every: int | None) -> bool:
        """Whether a step is the run's last, or a multiple of `every`."""
        return step == self.trainer.config.train.steps or (every is not None and step % every == 0)

    def say(self, text: str) -> None:
        """A line for whoever watches."""
        for callback in self.trainer.callbacks:
            callback.said(self, text)

    @contextmanager
    def aside(self, phase: Phase, what: str | None = None) -> Generator[None]:
        """Around what devices wait for: begins when the step in flight has ended, and is no part of a step's time."""
        self.meter.wait()
        with self._during(phase, what or f"{phase} after step {self.step}"):
            yield
        self.meter.restart()

    @contextmanager
    def watched(self) -> Generator[Run]:
        """Around the loop. Where no error ends it, callbacks have all numbers before they end, the last one first."""
        with ExitStack() as stack:
            for callback in self.trainer.callbacks:
                stack.enter_context(callback.running(self))
            self.meter.restart()
            yield self
            self._hand_out()

    def next_batch(self, batches: Iterator[Batch]) -> Batch:
        """The batch of the next step."""
        with self._during("data", f"the data of step {self.step + 1}"), self.meter.waiting():
            return next(batches)

    @contextmanager
    def computing(self, batch: Batch) -> Generator[None]:
        """Around the call of the compiled step, which compiles when the batch has a new shape."""
        for callback in self.trainer.callbacks:
            callback.before_step(self, self.step + 1, batch)
        self.step += 1
        shapes = tuple(np.shape(leaf) for leaf in jax.tree.leaves(batch))
        known = shapes in self._compiled
        self._compiled.add(shapes)
        what = f"step {self.step}"
        with self._during("step", what) if known else self.aside("compile", what):
            yield

    def started(self, metrics: Metrics) -> None:
        """Takes the metrics of the step that was begun, and hands out the numbers of the one before.

        Where a callback needs the state that the step leaves, its own numbers follow at once.
        """
        for callback in self.trainer.callbacks:
            callback.step_started(self, self.step, metrics)
        self._hand_out()
        self.meter.take(self.step, metrics)
        if any(callback.due(self, self.step) for callback in self.trainer.callbacks):
            self._hand_out()

    def _hand_out(self) -> None:
        if self.meter.unread:
            step, values = self.meter.read()
            for callback in self.trainer.callbacks:
                callback.step_ended(self, step, values)

    @contextmanager
    def _during(self, phase: Phase, what: str) -> Generator[None]:
        with ExitStack() as stack:
            for callback in self.trainer.callbacks:
                stack.enter_context(callback.during(self, phase, what))
            yield
