"""A folder's lock, in a job of many processes: process 0 holds it, and a refusal ends them all."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from grit_jax import files
from grit_jax.parallel.distributed import in_first_process
from grit_jax.runs.lock import WriterLock, refuse_living


def refuse_other_writers(folder: files.PathLike) -> None:
    """Returns when nobody else writes to a folder; writes nothing.

    Raises:
      InputError: A writer lives, in every process of the job.
    """
    in_first_process(lambda: refuse_living(folder))


class SoleWriter:
    """What a process of the job knows of the lock; the others than process 0 learn of its loss from that one.

    Args:
      lock: Of the folder, in process 0; None in the others.
    """

    def __init__(self, lock: WriterLock | None = None):
        self._lock = lock

    def check(self) -> None:
        """`WriterLock.check`, before every piece of work.

        Raises:
          InputError: Another writer has taken the folder over.
        """
        if self._lock:
            self._lock.check()

    def confirm(self) -> None:
        """`WriterLock.confirm`, before anything is written that counts.

        Raises:
          InputError: Another writer has taken the folder over.
          OSError: The lock cannot be read.
          UnreachableError: The same, for a while.
        """
        if self._lock:
            self._lock.confirm()


@contextmanager
def sole_writer(folder: files.PathLike) -> Generator[SoleWriter]:
    """Holds the lock of a folder.

    Raises:
      InputError: A writer lives, in every process of the job.
    """
    lock = in_first_process(lambda: WriterLock(folder))
    try:
        yield SoleWriter(lock)
    finally:
        if lock:
            lock.release()
