"""Files derived from data files: their names and folders, and plain local copies of compressed or remote data."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from etils import epath

from grit_jax import files
from grit_jax.data.text_files import read_blocks
from grit_jax.errors import InputError

FOLDER = ".grit_index"
MAKE_ROOM = "make room there, or set XDG_CACHE_HOME to a folder with room"
CHANGED = "has changed since the file was indexed; start again to index it anew"
_FORMAT = 5  # raised when the stored layout or the format of prompts changes

Version = tuple[Any, ...]


def version(path: epath.Path) -> Version:
    """Identifies a file's content by its path, size and time of change, or its generation in a bucket.

    Raises:
      InputError: The file cannot be examined.
    """
    try:
        return files.version(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def refuse_changed(path: epath.Path, before: Version) -> None:
    """Checks that a file still has this version.

    Raises:
      InputError: It has another.
    """
    if version(path) != before:
        raise InputError(f"{path}: {CHANGED}")


def entry(path: epath.Path, version: Version, *more: Any) -> str:
    """The name of a file derived from a version of a file and from `more`."""
    return f"{_of_version(path, version)}{_digits(more, 8)}"


def lines_name(path: epath.Path, version: Version) -> str:
    """The name of the table of line offsets of a version of a file."""
    return f"{entry(path, version)}.lines.npy"


def _copy_name(path: epath.Path, version: Version) -> str:
    return f"{entry(path, version)}.copy"


def _of_file(path: epath.Path) -> str:
    """The prefix of all names derived from a file, whatever its version."""
    location = os.fspath(path) if files.is_bucket(path) else str(Path(path).resolve())
    return f"{path.name}-{_digits(location, 12)}"


def _of_version(path: epath.Path, version: Version) -> str:
    """The prefix of all names derived from a version of a file in the present format."""
    return f"{_of_file(path)}{_digits((_FORMAT, version), 12)}"


def _digits(value: Any, number: int) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:number]


def remove_stale(path: epath.Path, version: Version) -> None:
    """Removes files derived from other versions of a file, or in other formats; open memory maps stay valid."""
    for folder in (path.parent / FOLDER, *local_folders(path)):
        for name in files.names(folder):
            entry = name.removeprefix(".")  # of a partial file
            if entry.startswith(_of_file(path)) and not entry.startswith(_of_version(path, version)):
                remove(folder / name)


def remove_plain(path: epath.Path, version: Version) -> None:
    """Removes the files that only served to read a data file: its plain copy and its line offsets."""
    for folder in local_folders(path):
        for name in (_copy_name(path, version), lines_name(path, version)):
            remove(folder / name)


def remove(entry: epath.Path | Path) -> None:
    """Removes a file or a folder if possible; it need not exist."""
    with contextlib.suppress(OSError, files.UnreachableError):
        if not files.is_folder(entry):
            files.remove(entry)
        elif files.is_bucket(entry):
            for name in files.names(entry):
                files.remove(entry / name)
        else:
            shutil.rmtree(entry, ignore_errors=True)


def local_folders(path: epath.Path) -> list[Path]:
    """Local folders for files derived from a data file: beside it, then in the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grit_jax" / "index"
    return [cache] if files.is_bucket(path) else [Path(path).parent / FOLDER, cache]


def local_file(path: epath.Path, version: Version) -> Path:
    """A plain local file with the content of a version of `path`: itself, or a copy decompressed or fetched once.

    Raises:
      InputError: The file is missing, damaged or has another version, or there is no room for the copy.
    """
    if not files.is_bucket(path) and path.suffix not in (".gz", ".zst"):
        return Path(path)
    copies = [folder / _copy_name(path, version) for folder in local_folders(path)]
    if there := next((copy for copy in copies if copy.exists()), None):
        return there
    remove_stale(path, version)
    problem: OSError | None = None
    for copy in copies:
        try:
            with files.replacing(copy) as file:
                file.writelines(read_blocks(path))
                refuse_changed(path, version)  # or the copy would be of another version
            return copy
        except OSError as error:
            problem = error
    raise InputError(
        f"{path}: no room for a plain copy of it ({problem}); set XDG_CACHE_HOME to a folder with room"
    ) from problem


def can_write(folder: epath.Path) -> bool:
    """Whether files can be written to a folder, which is created if missing.

    Raises:
      UnreachableError: The folder cannot be reached.
    """
    probe = folder / f".{uuid.uuid4().hex[:8]}.partial"
    try:
        files.write_bytes(probe, b"")
        files.remove(probe)
    except OSError:
        return False
    return True
