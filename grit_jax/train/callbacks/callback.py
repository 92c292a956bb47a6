"""A run as its callbacks see it, and the calls they get."""

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

# What a run is doing: waiting for a batch, dispatching a step, or something the devices wait for.
Phase = Literal["data", "step", "compile", "evaluation", "checkpoint"]


class Callback:
    """Watches a run, or does something besides training. Methods that are not overridden do nothing.

    Each process of a run has its own callbacks, with the same calls in the same order; `due` must return the same in
    all of them.
    """

    @contextmanager
    def running(self, run: Run) -> Generator[None]:
        """Around all steps of a session; code after the `yield` is skipped where an error ends the run."""
        yield

    def during(self, run: Run, phase: Phase, what: str) -> AbstractContextManager[None]:
        """Around a phase; `what` describes it, such as `the data of step 3`."""
        return nullcontext()

    def before_step(self, run: Run, step: int, batch: Batch) -> None:
        """Before a step begins, with the parameters it will update."""

    def step_started(self, run: Run, step: int, metrics: Metrics) -> None:
        """After a step is dispatched; reading its metrics waits for the devices."""

    def due(self, run: Run, step: int) -> bool:
        """Whether `step_ended` of this step needs the state after it, so that the next step has to wait."""
        return False

    def step_ended(self, run: Run, step: int, values: dict[str, float]) -> None:
        """After a step has ended; may add to its metrics. Unless the step is `due`, the next one is already running."""

    def said(self, run: Run, text: str) -> None:
        """Takes a line for the user."""


class Run:
    """A run, as its callbacks see it.

    Args:
      trainer: The run's trainer.
      proceed: `JointStop.proceed`.
      confirm: `SoleWriter.confirm`.

    Attributes:
      trainer: Its config, folder, data, state and model.
      start: Updates done before this session.
      step: The newest step that began.
      meter: Reads and times the steps.
      proceed: Whether more work may begin, such as an evaluation; all processes call it, with the same result.
      confirm: Raises where another process writes to the run folder; called before saving.
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
        """Hands callbacks a line for the user."""
        for callback in self.trainer.callbacks:
            callback.said(self, text)

    @contextmanager
    def aside(self, phase: Phase, what: str | None = None) -> Generator[None]:
        """Around work that devices wait for: begins after the step in flight, and is no part of any step's time."""
        self.meter.wait()
        with self._during(phase, what or f"{phase} after step {self.step}"):
            yield
        self.meter.restart()

    @contextmanager
    def watched(self) -> Generator[Run]:
        """Around the loop. Unless an error ends it, callbacks get all metrics before they end, in reverse order."""
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
        """Around the call of the step, which compiles when the batch has a new shape."""
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
        """Takes the metrics of the step in flight, and hands those of the step before to callbacks.

        If the step is `due`, its own metrics follow at once.
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
