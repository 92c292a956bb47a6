"""The run folder's lock, in a job of many processes: process 0 holds it, and a refusal ends them all."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TypeVar

import jax
import numpy as np

from grit_jax import files
from grit_jax.config import InputError
from grit_jax.watch.lock import WriterLock, refuse_living

T = TypeVar("T")

_MESSAGE_BYTES = 1024


def refuse_other_writers(folder: files.PathLike) -> None:
    """Returns when nobody else writes to a run folder; writes nothing.

    Raises:
      InputError: A writer lives, in every process of the job.
    """
    _together(lambda: refuse_living(folder))


@contextmanager
def sole_writer(folder: files.PathLike) -> Generator[Callable[[], None]]:
    """Holds the lock of a run folder; gives the check that every step begins with, see `WriterLock.check`.

    Raises:
      InputError: A writer lives, in every process of the job.
    """
    lock = _together(lambda: WriterLock(folder))
    try:
        yield lock.check if lock else lambda: None
    finally:
        if lock:
            lock.release()


def _together(action: Callable[[], T]) -> T | None:
    """What `action` gives in process 0, None in the others; an InputError of it is raised in all."""
    result, message = None, ""
    if jax.process_index() == 0:
        try:
            result = action()
        except InputError as error:
            message = str(error)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        sent = message.encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES)
        received = multihost_utils.broadcast_one_to_all(np.frombuffer(sent, np.uint8))
        message = np.asarray(received).tobytes().decode(errors="ignore").rstrip()
    if message:
        raise InputError(message)
    return result
