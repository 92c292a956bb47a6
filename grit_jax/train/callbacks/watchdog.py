"""Ends a hanging run."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import jax

from grit_jax import files
from grit_jax.runs import folder, watchdog
from grit_jax.train.callbacks.callback import Callback, Phase, Run

_UNTIMED = ("compile", "evaluation")  # may take any time


class Watchdog(Callback):
    """Watches every phase with `runs.watchdog`, from its beginning to that of the next one.

    Args:
      seconds: Longest time of a phase; None for no watchdog.
    """

    def __init__(self, seconds: float | None):
        self._seconds = seconds

    @contextmanager
    def running(self, run: Run) -> Generator[None]:
        """Starts the watchdog, and ends it."""
        stacks = files.join(run.trainer.folder, folder.stacks(jax.process_index()))
        with watchdog.Watchdog(self._seconds, stacks) as self._watchdog:
            yield

    def during(self, run: Run, phase: Phase, what: str) -> AbstractContextManager[None]:
        """Restarts the timer."""
        self._watchdog.beat(what)
        return self._watchdog.paused() if phase in _UNTIMED else nullcontext()
