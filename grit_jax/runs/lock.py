"""One living writer for a run folder: a lock file with a heartbeat, on a disk or in a bucket.

The file names its writer and carries a count that a thread raises every few seconds. Another process takes over the
lock of a dead writer: at once if its process is gone from this machine, or when the heartbeat stands still for
`LIMIT_SECONDS`. Stores have no common clock, so what counts is not a recent time in the file but a changing count.
Every change of the file is a `swap`: of simultaneous ones only one succeeds, and a writer that was thought dead cannot
renew its lock. It finds out at its next heartbeat, at the first `check` after a pause, and at `confirm`, before any
important write.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from grit_jax import files
from grit_jax.errors import InputError
from grit_jax.runs import swap

NAME = "writer.json"
CLAIM = f".{NAME}.claim"  # beside it for a moment, on a disk
BEAT_SECONDS = 10.0
LIMIT_SECONDS = 60.0


@dataclasses.dataclass(frozen=True)
class Writer:
    """The content of the lock file.

    Attributes:
      token: Unique name of this writer.
      host: Name of its machine.
      machine: Identifies machine, boot and container, within which `pid` has a meaning.
      pid: Its process number.
      process_started: When its process started, in the machine's ticks; a later process may have its number.
      started: When it took the lock, in seconds since 1970.
      beat: When it wrote this, in seconds since 1970.
      count: Heartbeats so far.
    """

    token: str
    host: str
    machine: str
    pid: int
    process_started: int
    started: float
    beat: float
    count: int = 0

    @property
    def age(self) -> float:
        """Seconds since the last heartbeat, by this machine's clock."""
        return time.time() - self.beat

    @property
    def here(self) -> bool:
        """Whether its process is, or was, visible from this one."""
        return self.machine == _machine()

    @property
    def dead(self) -> bool:
        """Whether its process is gone; False if that is not visible from here."""
        return self.here and _process_started(self.pid) != self.process_started

    @property
    def alive(self) -> bool:
        """Whether its heartbeat is recent and its process is not known to be gone."""
        return not self.dead and self.age < LIMIT_SECONDS

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.started))
        return f"process {self.pid} on {self.host}, since {since}, last heartbeat {max(0, self.age):.0f} s ago"


def read_writer(folder: files.PathLike) -> Writer | None:
    """The writer in a run folder's lock, dead or alive; None without a lock."""
    content = files.read_bytes(files.join(folder, NAME))
    return None if content is None else _named(content)


def _named(content: bytes) -> Writer | None:
    """The writer in a lock file; None if the file is not ours."""
    try:
        return Writer(**json.loads(content))
    except (ValueError, TypeError):  # not ours, or from another version
        return None


def refuse_living(folder: files.PathLike, *, limit: float = LIMIT_SECONDS) -> swap.Seen | None:
    """Checks that a run folder has no living writer.

    If only the heartbeat can tell, this watches it, for up to `limit` seconds after a writer's death.

    Returns:
      The lock of a dead writer.

    Raises:
      InputError: There is one.
    """
    path = files.join(folder, NAME)
    seen = swap.look(path)
    found = seen and _named(seen.content)
    if found is None or found.dead or found.age >= limit:
        return seen
    if found.here:
        raise _refusal(folder, found)
    deadline = time.monotonic() + min(limit, limit - found.age)
    while time.monotonic() < deadline:
        time.sleep(min(1.0, limit / 10))
        now = swap.look(path)
        if now is None:
            return None
        writer = _named(now.content)
        if writer and (writer.token, writer.count) != (found.token, found.count):
            raise _refusal(folder, writer)
        seen = now
    return seen


class WriterLock:
    """The lock of a run folder, held from construction to `release`.

    Raises:
      InputError: Another writer is alive.
    """

    def __init__(self, folder: files.PathLike, *, beat: float = BEAT_SECONDS, limit: float = LIMIT_SECONDS):
        self.folder, self._beat, self._limit = folder, beat, limit
        self._path = files.join(folder, NAME)
        now, pid = time.time(), os.getpid()
        started = _process_started(pid)
        self._writer = Writer(
            uuid.uuid4().hex, socket.gethostname(), _machine(), pid, 0 if started is None else started, now, now
        )
        self._lost: str | None = None  # to whom
        while not self._swap(refuse_living(folder, limit=limit), self._content):
            continue  # another was faster: it is alive, or has ended
        self._checked = _clock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """For every step, at no cost: looks at the lock only after a pause in which it may have been lost.

        Raises:
          InputError: Another writer has taken the folder over.
        """
        if _clock() - self._checked > self._limit / 2:
            with contextlib.suppress(OSError, files.UnreachableError):  # an unreachable store does not stop a run
                self._look()
        self._checked = _clock()
        if self._lost:
            raise InputError(
                f"{self.folder} was taken over by {self._lost}, which found no heartbeat of this process; "
                "end one of the two, this one has stopped writing"
            )

    def confirm(self) -> None:
        """Like `check`, but always looks at the lock, so that the next write is the only writer's.

        Raises:
          InputError: Another writer has taken the folder over.
          OSError: The lock cannot be read.
          UnreachableError: The store cannot be reached at the moment.
        """
        self._look()
        self.check()

    def release(self) -> None:
        """Frees the folder."""
        self._ended.set()
        self._thread.join()
        seen = self._look()
        if not self._lost:
            self._swap(seen, None)

    def _run(self) -> None:
        while not self._ended.wait(self._beat) and not self._lost:
            # A network may fail for a while; the limit is several heartbeats.
            with contextlib.suppress(OSError, files.UnreachableError):
                self._renew()

    def _renew(self) -> None:
        seen = self._look()
        if not self._lost:
            self._writer = dataclasses.replace(self._writer, beat=time.time(), count=self._writer.count + 1)
            if not self._swap(seen, self._content):
                self._look()

    def _look(self) -> swap.Seen | None:
        """Reads the lock file, and notes who has it if that is not this writer."""
        seen = swap.look(self._path)
        found = seen and _named(seen.content)
        if found is None:
            self._lost = "another process, which has ended since or whose lock is damaged"
        elif found.token != self._writer.token:
            self._lost = str(found)
        return seen

    @property
    def _content(self) -> bytes:
        return json.dumps(dataclasses.asdict(self._writer)).encode() + b"\n"

    def _swap(self, seen: swap.Seen | None, content: bytes | None) -> bool:
        return swap.swap(self._path, seen, content, self._content, is_gone=_is_gone, limit=self._limit)


def _is_gone(claim: bytes) -> bool:
    writer = _named(claim)
    return writer is not None and writer.dead


def _clock() -> float:
    """Seconds on a clock that also runs while the machine sleeps, if there is one."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


@contextmanager
def writer_lock(folder: files.PathLike) -> Generator[WriterLock]:
    """Holds a `WriterLock`.

    Raises:
      InputError: Another writer is alive.
    """
    lock = WriterLock(folder)
    try:
        yield lock
    finally:
        lock.release()


def _refusal(folder: files.PathLike, writer: Writer) -> InputError:
    return InputError(
        f"{folder} is being written by {writer}; wait for it, end it, or choose another folder "
        f"(a writer that died is taken over after {LIMIT_SECONDS:.0f} s)"
    )


def _machine() -> str:
    """Identifies this machine, its boot and the container of this process."""
    parts = [socket.gethostname()]
    boot = Path("/proc/sys/kernel/random/boot_id")
    if boot.exists():
        parts.append(boot.read_text().strip())
    with contextlib.suppress(OSError):  # only Linux has them
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _process_started(pid: int) -> int | None:
    """When a process of this machine started, in ticks; 0 if only its existence is known, None if it is gone."""
    try:
        # After the name, which may contain anything, come the state and, as 20th field, the start (man 5 proc).
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] == "Z" else int(fields[19])
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self/stat").exists():
            return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # another user's process
        return 0
    return 0
