"""A folder's lock in a job of many processes: process 0 holds it, and a refusal ends them all."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import NamedTuple

from grit_jax import files
from grit_jax.parallel.distributed import in_first_process
from grit_jax.runs.lock import WriterLock, refuse_living


def refuse_other_writers(folder: files.PathLike) -> None:
    """Returns when nobody else writes to a folder; writes nothing.

    Raises:
      InputError: Another writer is alive; raised in every process of the job.
    """
    in_first_process(lambda: refuse_living(folder))


def _nothing() -> None:
    """No check: the other processes learn of a lost lock from process 0."""


class SoleWriter(NamedTuple):
    """The lock's checks in one process of the job.

    Attributes:
      check: `WriterLock.check` in process 0; call it before every piece of work.
      confirm: `WriterLock.confirm` in process 0; call it before every write that counts.
    """

    check: Callable[[], None] = _nothing
    confirm: Callable[[], None] = _nothing


@contextmanager
def sole_writer(folder: files.PathLike) -> Generator[SoleWriter]:
    """Holds the lock of a folder.

    Raises:
      InputError: Another writer is alive; raised in every process of the job.
    """
    lock = in_first_process(lambda: WriterLock(folder))
    try:
        yield SoleWriter(lock.check, lock.confirm) if lock else SoleWriter()
    finally:
        if lock:
            lock.release()
