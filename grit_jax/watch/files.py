"""Small files of a run folder, on a disk or in a bucket, as they are now: nothing is read from a cache."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any

PathLike = str | os.PathLike[str]


def is_bucket(path: PathLike) -> bool:
    """Whether `path` is in an object store, such as `gs://bucket/run`: objects there are written whole."""
    return "://" in os.fspath(path)


def join(folder: PathLike, *names: str) -> str:
    """The path of something in a folder."""
    return "/".join([os.fspath(folder).rstrip("/"), *names])


def read_text(path: PathLike) -> str | None:
    """What a file holds, None where there is no such file."""
    try:
        if is_bucket(path):
            store, key = _store(path)
            return store.cat_file(key).decode()
        return Path(path).read_text()
    except (FileNotFoundError, NotADirectoryError):
        return None


def write_bytes(path: PathLike, content: bytes) -> None:
    """Writes a file whole: a reader sees the old content or the new, never a part; missing folders are made."""
    if is_bucket(path):
        store, key = _store(path)
        store.pipe_file(key, content)
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as partial:
        partial.write(content)
    try:
        os.chmod(partial.name, 0o666 & ~_umask())  # temporary files are their owner's alone
        os.replace(partial.name, path)
    except OSError:
        os.unlink(partial.name)
        raise


def write_text(path: PathLike, text: str) -> None:
    """`write_bytes` of a text."""
    write_bytes(path, text.encode())


def remove(path: PathLike) -> None:
    """Removes a file, which need not be there."""
    with contextlib.suppress(FileNotFoundError):
        if is_bucket(path):
            store, key = _store(path)
            store.rm_file(key)
        else:
            os.unlink(path)


def names(folder: PathLike) -> list[str]:
    """Names of what a folder holds, sorted; none where there is no folder."""
    try:
        if is_bucket(folder):
            store, key = _store(folder)
            found = [os.path.basename(entry.rstrip("/")) for entry in store.ls(key, detail=False)]
            return sorted({name for name in found if name and name != os.path.basename(key.rstrip("/"))})
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _store(path: PathLike) -> tuple[Any, str]:
    import fsspec

    # Others write into the folder too: a listing that is remembered would hide that.
    return fsspec.core.url_to_fs(os.fspath(path), use_listings_cache=False)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
