"""Compare and swap of a small file, on a disk or in gs://.

In gs:// the store itself compares, by the object's generation. On a disk, a process first creates a claim beside the
file with O_EXCL, at which only one can succeed on any disk and on NFS, then compares, and renames the claim to the
file. So the file is always whole, and a claim that was removed meanwhile changes nothing.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from grit_jax import files

_LOOK_SECONDS = 0.02  # between looks at another process's claim


class Seen(NamedTuple):
    """A file as it was at one moment.

    Attributes:
      content: Its bytes.
      generation: The object's version; None on a disk.
    """

    content: bytes
    generation: str | None = None


def look(path: files.PathLike) -> Seen | None:
    """The file as it is now; None if there is none."""
    if not files.is_gcs(path):
        content = files.read_bytes(path)
        return None if content is None else Seen(content)
    store, key = files.opened_store(path)

    def read() -> Seen:
        headers, content = store.call("GET", store.url(key))
        return Seen(content, headers["x-goog-generation"])

    try:
        return files.retrying(path, read)
    except FileNotFoundError:
        return None


def swap(
    path: files.PathLike, seen: Seen | None, content: bytes | None, claim: bytes, *,
    is_gone: Callable[[bytes], bool], limit: float,
) -> bool:  # fmt: skip
    """Replaces the file by `content` if it is still as seen.

    Args:
      path: The file.
      seen: What `look` returned.
      content: The new content; None removes the file.
      claim: Names this process to others that change the file at the same moment.
      is_gone: Whether the process of a claim is known to be gone.
      limit: Seconds after which another process's claim is too old to wait for.

    Returns:
      False, with nothing changed, if the file is no longer as seen.

    Raises:
      OSError: It cannot be written.
    """
    if files.is_gcs(path):
        return files.retrying(path, lambda: _swap_object(path, seen, content))
    if files.is_bucket(path):
        raise OSError(f"{path}: only disks and gs:// can compare and swap")
    return files.retrying(path, lambda: _swap_file(Path(path), seen, content, claim, is_gone, limit))


def _swap_object(path: files.PathLike, seen: Seen | None, content: bytes | None) -> bool:
    store, key = files.opened_store(path)
    bucket, name, _ = store.split_path(key)
    condition = {"ifGenerationMatch": "0" if seen is None else seen.generation}
    try:
        if content is None:
            store.call("DELETE", "b/{}/o/{}", bucket, name, **condition)
        else:
            address = f"{store.base.removesuffix('storage/v1/')}upload/storage/v1/b/{bucket}/o"
            store.call("POST", address, uploadType="media", name=name, data=content, **condition)
    except FileExistsError:  # the client's error for status 412
        now = look(path)  # this process may have written it and lost only the response
        return content is not None and now is not None and now.content == content
    except FileNotFoundError:
        return content is None and look(path) is None
    return True


def _swap_file(
    path: Path, seen: Seen | None, content: bytes | None, claim: bytes, is_gone: Callable[[bytes], bool], limit: float
) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    claimed = path.with_name(f".{path.name}.claim")
    _claim(claimed, claim if content is None else content, is_gone, limit)
    try:
        if look(path) != seen:
            return False
        if content is None:
            path.unlink(missing_ok=True)
            return True
        # Without the claim this process was too slow; the file tells who came first.
        with contextlib.suppress(FileNotFoundError):
            os.rename(claimed, path)
        files.sync_folder(path.parent)
        now = look(path)
        return now is not None and now.content == content
    finally:
        found = look(claimed)
        if found is not None and found.content in (claim, content):
            claimed.unlink(missing_ok=True)


def _claim(path: Path, content: bytes, is_gone: Callable[[bytes], bool], limit: float) -> None:
    """Creates a claim once no living process has one."""
    other, since = None, time.monotonic()
    while True:
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            found = look(path)
            if found != other:
                other, since = found, time.monotonic()
            if found and (is_gone(found.content) or time.monotonic() - since > limit):
                path.unlink(missing_ok=True)
            else:
                time.sleep(_LOOK_SECONDS)
            continue
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        return
