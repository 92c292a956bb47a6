"""A profiler's trace of a window of steps, for xprof and TensorBoard."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import jax

from grit_jax import files


class ProfileWindow:
    """Traces the steps of a window into a folder; in every process, as each sees its own devices.

    Args:
      window: First and last step; None traces nothing.
      path: The folder for the trace, which may be in a bucket.
    """

    def __init__(self, window: Sequence[int] | None, path: files.PathLike):
        self._window, self._path = window, path
        self._folder: tempfile.TemporaryDirectory | None = None
        self._tracing = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._tracing:
            self._stop()

    def before(self, step: int) -> None:
        """Starts with the first step of the window, or with the first that a resumed run does within it."""
        if self._window and not self._tracing and self._window[0] <= step <= self._window[1]:
            # The profiler writes to disks alone.
            if files.is_bucket(self._path):
                self._folder = tempfile.TemporaryDirectory()
            jax.profiler.start_trace(self._folder.name if self._folder else str(self._path))
            self._tracing = True

    def after(self, step: int, result: Any) -> None:
        """Stops with the last step of the window, when its result is there."""
        if self._tracing and self._window and step >= self._window[1]:
            jax.block_until_ready(result)
            self._stop()

    def _stop(self) -> None:
        self._tracing = False
        jax.profiler.stop_trace()
        if self._folder:
            root = Path(self._folder.name)
            for file in root.rglob("*"):
                if file.is_file():
                    files.write_bytes(files.join(self._path, str(file.relative_to(root))), file.read_bytes())
            self._folder.cleanup()
            self._folder = None
