"""Ends a hanging process after dumping its stacks."""

from __future__ import annotations

import faulthandler
import os
import sys
import tempfile
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Self

from grit_jax import files

EXIT_CODE = 70
_WRITE_SECONDS = 30.0  # for the stacks' file, whose disk or network may be the one that hangs
_GRACE_SECONDS = 60.0


class Watchdog:
    """Dumps the stacks of all threads to stderr and a file, and ends the process, if nothing happens for too long.

    If a thread blocks all others, a timer of the interpreter does so, with the stacks only on stderr.

    Args:
      seconds: Longest time between two `beat`s; None watches nothing.
      path: The file for the stacks.
    """

    def __init__(self, seconds: float | None, path: files.PathLike):
        self._seconds, self._path = seconds, path
        self._what, self._begun = "", time.monotonic()
        self._watching, self._ended = False, threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._rest()
        self._ended.set()
        if self._seconds:
            self._thread.join()

    def beat(self, what: str) -> None:
        """Restarts the timer for `what` begins now, such as `step 7`."""
        self._what, self._begun, self._watching = what, time.monotonic(), True
        if self._seconds:
            faulthandler.dump_traceback_later(self._seconds + _GRACE_SECONDS, exit=True, file=_stderr())

    @contextmanager
    def paused(self) -> Generator[None]:
        """Stops the timer during work that may take any time, such as compiling."""
        self._rest()
        try:
            yield
        finally:
            self.beat(self._what)

    def _rest(self) -> None:
        self._watching = False
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()

    def _run(self) -> None:
        seconds = self._seconds or 0.0
        while not self._ended.wait(min(1.0, seconds / 4)):
            if self._watching and time.monotonic() - self._begun > seconds:
                self._bark(seconds)
                return

    def _bark(self, seconds: float) -> None:
        print(
            f"{self._what} has taken more than train.watchdog_seconds={seconds:g}: the process hangs and ends now; "
            f"all threads' stacks follow and are in {self._path}. Run the same command again to resume from the last "
            "checkpoint; raise train.watchdog_seconds if steps do take that long.",
            file=sys.stderr,
            flush=True,
        )
        stderr = _stderr()
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file=file, all_threads=True)
            file.seek(0)
            stacks = file.read()
        os.write(stderr, stacks.encode())
        text = f"{self._what}, after {seconds:g} s\n\n{stacks}"
        writing = threading.Thread(target=files.write_text, args=(self._path, text), daemon=True)
        writing.start()
        writing.join(_WRITE_SECONDS)
        os._exit(EXIT_CODE)


def _stderr() -> int:
    """The file descriptor of the process's standard error, even if `sys.stderr` is replaced."""
    return 2
