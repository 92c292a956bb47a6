"""Files on a disk or in a gs:// or other bucket: written whole, read uncached, retried after temporary failures.

A lost connection, a store's 429 or 5xx, and a disk's EIO or ESTALE are retried a few times with growing waits, each
with a logged warning; a missing or forbidden file raises at once. On a disk `retrying` does so, in a bucket its client:
6 times within half a minute, or within 4 minutes if the store accepts calls but does not respond.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import errno
import functools
import hashlib
import io
import logging
import os
import shutil
import stat
import sys
import time
import uuid
from collections.abc import Callable, Generator
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

T = TypeVar("T")

PathLike = str | os.PathLike[str]

_TRIES = 5
_FIRST_WAIT = 0.5  # seconds, twice as long each time
_CONNECT_SECONDS, _SILENT_SECONDS = 10.0, 30.0  # after which a call to a bucket is retried
_PASSING = {
    errno.EIO, errno.EAGAIN, errno.EBUSY, errno.ESTALE,
    errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH,
}  # fmt: skip

_VERSIONS = ("generation", "ETag", "etag", "mtime", "LastModified")  # stores' names for the version of an object

_log = logging.getLogger(__name__)
_asked_for = contextvars.ContextVar("asked_for", default="a bucket")  # used in the client's own thread too


class DeniedError(OSError):
    """The credentials found here, if any, do not allow reading or writing a bucket."""


class UnreachableError(Exception):
    """A disk or a bucket failed several times in a way that may be temporary.

    Not an OSError, so that handlers of missing or forbidden files do not catch it.
    """


def is_bucket(path: PathLike) -> bool:
    """Whether `path` is in an object store, such as `gs://bucket/run`, where objects are written whole."""
    return "://" in os.fspath(path)


def join(folder: PathLike, *names: str) -> str:
    """The path of an entry of a folder."""
    return "/".join([os.fspath(folder).rstrip("/"), *names])


def retrying(path: PathLike, action: Callable[[], T]) -> T:
    """The result of `action`, which reads or writes `path` and may be repeated.

    Raises:
      UnreachableError: It failed every time in a way that may be temporary; the message names the path.
      OSError: It failed in another way.
    """
    begun, tries = time.monotonic(), 0
    _asked_for.set(os.fspath(path))
    while True:
        tries += 1
        try:
            return action()
        except Exception as error:
            reason = _described(error)
            if is_bucket(path) and _is_denied(error):
                raise DeniedError(
                    f"{path}: access is denied ({reason[:300]}); log in with `gcloud auth application-default login`, "
                    "which is not `gcloud auth login`, or let the account read and write the bucket"
                ) from error
            if not _may_pass(error):
                if isinstance(error, OSError) or not is_bucket(path):
                    raise
                raise OSError(f"{path}: {reason}") from error  # a bucket's client raises many types
            if is_bucket(path) or tries == _TRIES:
                seconds = time.monotonic() - begun
                raise UnreachableError(f"{path}: cannot be reached, tried for {seconds:.0f} s ({reason})") from error
        _log.warning("%s: %s; trying again", path, reason)
        time.sleep(_FIRST_WAIT * 2 ** (tries - 1))


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _is_denied(error: Exception) -> bool:
    """Whether a bucket's client met a 401 or 403."""
    return str(getattr(error, "code", "")) == "401" or (
        isinstance(error, OSError) and str(error).startswith("Forbidden")
    )


def _may_pass(error: Exception) -> bool:
    if isinstance(error, ConnectionError | TimeoutError) or (isinstance(error, OSError) and error.errno in _PASSING):
        return True
    if any(os.strerror(number) in str(error) for number in _PASSING):
        return True  # C++ libraries raise their own types, with the system's message
    client = sys.modules.get("gcsfs.retry")
    return client is not None and client.is_retriable(error)


def _retried(path: PathLike, local: Callable[[], T], remote: Callable[[Any, str], T]) -> T:
    """`retrying` of `local` or, in a bucket, of `remote` with the results of `opened_store`."""
    return retrying(path, (lambda: remote(*opened_store(path))) if is_bucket(path) else local)


def read_bytes(path: PathLike) -> bytes | None:
    """The content of a file; None if there is none."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return _retried(path, lambda: Path(path).read_bytes(), lambda store, key: store.cat_file(key))
    return None


def read_text(path: PathLike) -> str | None:
    """`read_bytes` as text."""
    content = read_bytes(path)
    return None if content is None else content.decode()


def open_binary(path: PathLike) -> io.BufferedReader:
    """Opens a file for reading piece by piece; each piece is retried by itself.

    Raises:
      OSError: It is missing or cannot be read.
    """

    def opened() -> Any:
        refuse_special(path)
        return Path(path).open("rb", buffering=0)

    return io.BufferedReader(_Pieces(path, _retried(path, opened, lambda store, key: store.open(key, "rb"))))


def refuse_special(path: PathLike) -> None:
    """Checks that a path on a disk is a file, a folder or nothing.

    Raises:
      OSError: It is a pipe, a socket or a device: opening it may block forever, and it cannot be read twice.
    """
    if is_special(path):
        raise OSError("it is a pipe, a socket or a device, not a file")


def sha256(path: PathLike) -> str:
    """Checksum of a file's content.

    Raises:
      OSError: It is missing or cannot be read.
    """
    with open_binary(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Pieces(io.RawIOBase):
    """Tracks its own offset, so that a failed read can be repeated from there."""

    def __init__(self, path: PathLike, file: Any):
        self._path, self._file, self._offset = path, file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._file.seek(self._offset)
        self._offset = self._file.seek(offset, whence)
        return self._offset

    def readinto(self, buffer: Any) -> int:
        def read() -> int:
            self._file.seek(self._offset)
            return self._file.readinto(buffer)

        count = retrying(self._path, read)
        self._offset += count
        return count

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


@contextlib.contextmanager
def replacing(path: Path, mode: str = "wb") -> Generator[IO[Any]]:
    """Opens a file that replaces `path` on a disk once all of it is written; an error leaves no trace.

    Raises:
      OSError: It cannot be written.
    """
    if not path.parent.exists():  # if that is a file, opening raises
        path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with partial.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Returns when the names in a folder would survive a loss of power, if its disk supports that."""
    with contextlib.suppress(OSError):  # some network disks cannot open or sync a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_bytes(path: PathLike, content: bytes) -> None:
    """Writes a file whole, so that readers see the old content or the new; makes missing folders.

    Raises:
      OSError: It cannot be written.
    """

    def write() -> None:
        with replacing(Path(path)) as file:
            file.write(content)

    _retried(path, write, lambda store, key: store.pipe_file(key, content))  # an object appears as a whole


def write_text(path: PathLike, text: str) -> None:
    """`write_bytes` of a text."""
    write_bytes(path, text.encode())


def copy(source: Path, target: PathLike) -> None:
    """Copies a file of any size from a disk to a disk or a bucket, whole as `write_bytes` does.

    gs:// compares MD5 sums of what was sent and what arrived.

    Raises:
      OSError: It cannot be read or written.
    """

    def write() -> None:
        with source.open("rb") as content, replacing(Path(target)) as file:
            shutil.copyfileobj(content, file, 1 << 22)

    checked = {"consistency": "md5"} if is_gcs(target) else {}
    _retried(target, write, lambda store, key: store.put_file(str(source), key, **checked))


def remove(path: PathLike) -> None:
    """Removes a file, which need not exist."""
    with contextlib.suppress(FileNotFoundError):
        _retried(path, lambda: os.unlink(path), lambda store, key: store.rm_file(key))


def move(source: PathLike, target: PathLike) -> None:
    """Moves a folder to a path where there is none, on the same disk or bucket.

    On a disk this is atomic; in a bucket every object is copied before the first is removed.

    Raises:
      OSError: It is missing or cannot be moved.
    """

    def rename() -> None:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        os.rename(source, target)

    _retried(source, rename, lambda store, key: store.mv(key, opened_store(target)[1], recursive=True))


def forget_listings(path: PathLike) -> None:
    """Makes clients of other libraries in this process, such as Orbax's, list a bucket again."""
    if is_bucket(path):
        for client in type(opened_store(path)[0])._cache.values():
            client.invalidate_cache()


def names(folder: PathLike) -> list[str]:
    """Sorted names of a folder's entries; none if there is no folder."""

    def remote(store: Any, key: str) -> list[str]:
        found = {os.path.basename(entry.rstrip("/")) for entry in store.ls(key, detail=False)}
        return sorted(found - {"", os.path.basename(key.rstrip("/"))})

    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return _retried(folder, lambda: sorted(os.listdir(folder)), remote)
    return []


def is_folder(path: PathLike) -> bool:
    """Whether there is a folder; in a bucket, anything below `path`."""
    about = _about(path)
    return about is not None and about.folder


def is_special(path: PathLike) -> bool:
    """Whether there is a pipe, a socket or a device; a bucket has none, and is not called."""
    about = None if is_bucket(path) else _about(path)
    return about is not None and about.special


def exists(path: PathLike) -> bool:
    """Whether there is a file or a folder."""
    return _about(path) is not None


def version(path: PathLike) -> tuple[Any, ...]:
    """A value that differs between paths, and changes with a file.

    Raises:
      FileNotFoundError: There is none.
    """
    about = _about(path)
    if about is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path))
    resolved = os.fspath(path) if is_bucket(path) else str(Path(path).resolve())
    return resolved, about.size, about.changed


class _About(NamedTuple):
    folder: bool
    special: bool  # a pipe, a socket or a device
    size: int  # bytes
    changed: int | str  # time of change; in a bucket the generation of the object, if it has one


def _about(path: PathLike) -> _About | None:
    def local() -> _About:
        about = os.stat(path)
        folder = stat.S_ISDIR(about.st_mode)
        special = not folder and not stat.S_ISREG(about.st_mode)
        return _About(folder, special, about.st_size, about.st_mtime_ns)

    def remote(store: Any, key: str) -> _About:
        info = store.info(key)
        changed = next((info[key] for key in _VERSIONS if info.get(key)), None)
        return _About(info["type"] == "directory", False, info["size"], str(changed))

    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return _retried(path, local, remote)
    return None


def is_gcs(path: PathLike) -> bool:
    """Whether `path` is in a bucket of Google Cloud Storage."""
    return os.fspath(path).startswith(("gs://", "gcs://"))


def opened_store(path: PathLike) -> tuple[Any, str]:
    """The client of a bucket, and its name for `path`; for calls inside `retrying`."""
    import fsspec

    options = _gcs_options() if is_gcs(path) else {}
    # Others write to the folder too, which a cached listing would hide.
    return fsspec.core.url_to_fs(os.fspath(path), use_listings_cache=False, **options)


@functools.cache
def _gcs_options() -> dict[str, Any]:
    """Options with which the client logs its own retries and does not wait forever."""
    import aiohttp

    async def failed(session: Any, context: Any, request: aiohttp.TraceRequestExceptionParams) -> None:
        if not isinstance(request.exception, asyncio.CancelledError):
            _log.warning("%s: %s", _asked_for.get(), _described(request.exception))

    async def answered(session: Any, context: Any, request: aiohttp.TraceRequestEndParams) -> None:
        if request.response.status in (408, 429) or request.response.status >= 500:
            _log.warning("%s: the store responds with %d", _asked_for.get(), request.response.status)

    trace = aiohttp.TraceConfig()
    trace.on_request_exception.append(failed)
    trace.on_request_end.append(answered)
    # It prints tracebacks of errors that are raised here and logged in one line.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_SILENT_SECONDS)
    return {"requests_timeout": timeout, "session_kwargs": {"trace_configs": [trace]}}
