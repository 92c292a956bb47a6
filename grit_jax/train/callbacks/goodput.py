"""Where the time of a run goes."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import jax

from grit_jax import files
from grit_jax.runs import folder
from grit_jax.runs.goodput import Clock, goodput_of
from grit_jax.runs.logs import LineWriter, read_lines
from grit_jax.train.callbacks.callback import Callback, Phase, Run

_WRITE_SECONDS = 30.0  # between lines of goodput.jsonl


class Goodput(Callback):
    """Counts seconds by cause, writes them to goodput.jsonl, and adds `goodput` to a step's metrics.

    Args:
      began: When the session started, by `time.monotonic`.
    """

    def __init__(self, began: float):
        self._began = began

    @contextmanager
    def running(self, run: Run) -> Generator[None]:
        """Opens the log in process 0, and completes it however the run ends."""
        self._clock, self._starting = Clock(began=self._began, from_step=run.start), True
        self._earlier: list[dict[str, Any]] = []
        self._log: LineWriter | None = None
        self._written = time.time()
        if jax.process_index() == 0:
            path = files.join(run.trainer.folder, folder.GOODPUT)
            self._earlier = list({line["session"]: line for line in read_lines(path)}.values())
            self._log = LineWriter(path)
            self._write(run)
        try:
            yield
        finally:
            if self._log:
                self._write(run)
                self._log.close()

    @contextmanager
    def during(self, run: Run, phase: Phase, what: str) -> Generator[None]:
        """Counts the time of a phase, unless steps ran during it."""
        if self._starting:
            self._clock.add("startup", time.monotonic() - self._began)
            self._starting = False
        if phase == "data":
            yield
            if run.meter.idle:
                self._clock.add("data", run.meter.waited)
        elif phase == "step":
            yield
        else:
            with self._clock.spent(phase):
                yield

    def step_ended(self, run: Run, step: int, values: dict[str, float]) -> None:
        """Adds the share of useful time."""
        if values["skipped"]:
            self._clock.add("skipped", values["step_seconds"])
        values["goodput"] = goodput_of([*self._earlier, self._clock.line(step)]).ratio
        if time.time() - self._written > _WRITE_SECONDS:
            self._write(run)

    def _write(self, run: Run) -> None:
        if self._log:
            self._log.write(self._clock.line(run.step))
        self._written = time.time()
