"""A folder's lock, in a job of many processes: process 0 holds it, and a refusal ends them all."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

from grit_jax import files
from grit_jax.distributed import in_first_process
from grit_jax.watch.lock import WriterLock, refuse_living


def refuse_other_writers(folder: files.PathLike) -> None:
    """Returns when nobody else writes to a folder; writes nothing.

    Raises:
      InputError: A writer lives, in every process of the job.
    """
    in_first_process(lambda: refuse_living(folder))


@contextmanager
def sole_writer(folder: files.PathLike) -> Generator[Callable[[], None]]:
    """Holds the lock of a folder; gives the check that every step begins with, see `WriterLock.check`.

    Raises:
      InputError: A writer lives, in every process of the job.
    """
    lock = in_first_process(lambda: WriterLock(folder))
    try:
        yield lock.check if lock else lambda: None
    finally:
        if lock:
            lock.release()
