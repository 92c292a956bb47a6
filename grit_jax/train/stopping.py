"""Stopping soon: a run hears that it is to stop, and has not queued steps by then that it would have to wait for."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

_AHEAD_SECONDS = 1.0  # how long before the end of a step the next one is handed to the devices
_LOOK_SECONDS = 0.02  # between looks whether the step has ended before its time: devices are idle for that long at most


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

    What is queued has to be done, also when the run is told to stop meanwhile.

    Args:
      running: An array that the running step makes; None when there is no step.
      ends: When that is expected to end, by `time.monotonic`.
      stop: Ends the waiting when it is set.
    """
    while running is not None and not running.is_ready():
        left = ends - _AHEAD_SECONDS - time.monotonic()
        if left <= 0 or stop.wait(min(left, _LOOK_SECONDS)):
            return
