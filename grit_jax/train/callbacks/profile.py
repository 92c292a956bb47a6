"""A profiler's trace of a window of steps, for xprof and TensorBoard."""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import jax

from grit_jax import files
from grit_jax.data.batch import Batch
from grit_jax.runs import folder
from grit_jax.train.callbacks.callback import Callback, Run
from grit_jax.train.step import Metrics


class Profile(Callback):
    """Traces the steps of a window into the run folder, in every process, for its own devices.

    Args:
      window: First and last step; None traces nothing.
    """

    def __init__(self, window: Sequence[int] | None):
        self._window = window
        self._disk: tempfile.TemporaryDirectory | None = None
        self._tracing = False

    @contextmanager
    def running(self, run: Run) -> Generator[None]:
        """Ends the trace if the run ends within the window."""
        try:
            yield
        finally:
            if self._tracing:
                self._stop(run)

    def before_step(self, run: Run, step: int, batch: Batch) -> None:
        """Starts with the window's first step, or with the first step within it of a resumed run."""
        if self._window and not self._tracing and self._window[0] <= step <= self._window[1]:
            # The profiler writes only to disks.
            if files.is_bucket(run.trainer.folder):
                self._disk = tempfile.TemporaryDirectory()
            jax.profiler.start_trace(self._disk.name if self._disk else _output(run))
            self._tracing = True

    def step_started(self, run: Run, step: int, metrics: Metrics) -> None:
        """Stops after the last step of the window."""
        if self._tracing and self._window and step >= self._window[1]:
            jax.block_until_ready(metrics)
            self._stop(run)

    def _stop(self, run: Run) -> None:
        self._tracing = False
        jax.profiler.stop_trace()
        if self._disk:
            root = Path(self._disk.name)
            for file in root.rglob("*"):
                if file.is_file():
                    files.write_bytes(files.join(_output(run), str(file.relative_to(root))), file.read_bytes())
            self._disk.cleanup()
            self._disk = None


def _output(run: Run) -> str:
    return files.join(run.trainer.folder, folder.PROFILE)
