"""Prompt stopping: when a run notices a signal, it has queued no steps that it must wait for."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

_AHEAD_SECONDS = 1.0  # before the end of a step, when the next one is dispatched
_LOOK_SECONDS = 0.02  # between looks at a step; devices may idle this long if it ends early


@contextmanager
def stop_signals() -> Generator[threading.Event]:
    """An event that SIGTERM and SIGINT set; a second signal acts as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    old = {}

    def handle(number, frame):
        stop.set()
        signal.signal(number, old[number])

    for number in (signal.SIGTERM, signal.SIGINT):
        old[number] = signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def wait_for_turn(running: Any, ends: float, stop: threading.Event) -> None:
    """Returns when it is time to queue the next step: shortly before the running one ends, or when it has ended.

    A queued step must run, even if the run is stopped meanwhile.

    Args:
      running: An array of the running step; None without one.
      ends: Its expected end, by `time.monotonic`.
      stop: Ends the waiting when set.
    """
    while running is not None and not running.is_ready():
        left = ends - _AHEAD_SECONDS - time.monotonic()
        if left <= 0 or stop.wait(min(left, _LOOK_SECONDS)):
            return
