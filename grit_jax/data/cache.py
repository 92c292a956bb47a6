"""What is made from data files and kept: where it lies, how it is written, and plain local copies of packed files."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import shutil
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from etils import epath

from grit_jax import files
from grit_jax.errors import InputError

FOLDER = ".grit_index"
MAKE_ROOM = "make room there, or set XDG_CACHE_HOME to a folder that has"
CHANGED = "has changed since the file was indexed; start again, so that it is indexed anew"
_FORMAT = 5  # raised when what is stored, or how prompts are formatted, changes
_BLOCK = 1 << 22  # bytes unpacked at a time

Version = tuple[Any, ...]


def version(path: epath.Path) -> Version:
    """Names what a file holds now: it differs with its path, size and time of change, in a bucket its generation.

    Raises:
      InputError: The file cannot be looked at.
    """
    try:
        return files.version(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def refuse_changed(path: epath.Path, before: Version) -> None:
    """Returns where a file is still of this version.

    Raises:
      InputError: It is not.
    """
    if version(path) != before:
        raise InputError(f"{path}: {CHANGED}")


def entry(path: epath.Path, version: Version, *more: Any) -> str:
    """A name for what is made from a version of a file.

    Args:
      path: The file.
      version: Its version.
      more: What else it depends on.
    """
    return f"{_of_version(path, version)}{_digits(more, 8)}"


def lines_name(path: epath.Path, version: Version) -> str:
    """The name of what says where the lines of a version of a file are."""
    return f"{entry(path, version)}.lines.npy"


def _copy_name(path: epath.Path, version: Version) -> str:
    return f"{entry(path, version)}.copy"


def _of_file(path: epath.Path) -> str:
    """How the names of all entries of a file begin, whatever its version."""
    place = os.fspath(path) if files.is_bucket(path) else str(Path(path).resolve())
    return f"{path.name}-{_digits(place, 12)}"


def _of_version(path: epath.Path, version: Version) -> str:
    """How the names of all entries of a version of a file begin that have the present format."""
    return f"{_of_file(path)}{_digits((_FORMAT, version), 12)}"


def _digits(value: Any, number: int) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:number]


def remove_stale(path: epath.Path, version: Version) -> None:
    """Removes what was made from other versions of a file, or in other formats; who has mapped that keeps it."""
    for folder in (path.parent / FOLDER, *local_folders(path)):
        for name in files.names(folder):
            entry = name.removeprefix(".")  # of one that was being written
            if entry.startswith(_of_file(path)) and not entry.startswith(_of_version(path, version)):
                remove(folder / name)


def remove_plain(path: epath.Path, version: Version) -> None:
    """Removes what only served to read a file: its plain copy, and the places of its lines."""
    for folder in local_folders(path):
        for name in (_copy_name(path, version), lines_name(path, version)):
            remove(folder / name)


def remove(entry: epath.Path | Path) -> None:
    """Removes an entry, a file or a folder, which need not be there; one that cannot be removed stays."""
    with contextlib.suppress(OSError, files.UnreachableError):
        if not files.is_folder(entry):
            files.remove(entry)
        elif files.is_bucket(entry):
            for name in files.names(entry):
                files.remove(entry / name)
        else:
            shutil.rmtree(entry, ignore_errors=True)


def local_folders(path: epath.Path) -> list[Path]:
    """Where things made from a file may be kept on a disk: beside it, then in the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grit_jax" / "index"
    return [cache] if files.is_bucket(path) else [Path(path).parent / FOLDER, cache]


def local_file(path: epath.Path, version: Version) -> Path:
    """A plain file on a disk with the content of a version of `path`: itself, or a copy unpacked or fetched once.

    Raises:
      InputError: The file is missing, damaged or of another version, or there is no room for the copy.
    """
    if not files.is_bucket(path) and path.suffix not in (".gz", ".zst"):
        return Path(path)
    name = _copy_name(path, version)
    folders = local_folders(path)
    for folder in folders:
        if (folder / name).exists():
            return folder / name
    remove_stale(path, version)
    problem: OSError | None = None
    for folder in folders:
        try:
            with files.replacing(folder / name) as file:
                file.writelines(unpacked(path))
                refuse_changed(path, version)  # else the copy would be of another
            return folder / name
        except OSError as error:
            problem = error
    raise InputError(
        f"{path}: no room for a plain copy of it ({problem}); set XDG_CACHE_HOME to a folder that has"
    ) from problem


def unpacked(path: epath.Path) -> Iterator[bytes]:
    """The content of a file, block by block, on a disk or in a bucket.

    Raises:
      InputError: It cannot be read, or is damaged.
    """
    try:
        with files.open_binary(path) as packed:
            if path.suffix == ".gz":
                with gzip.open(packed) as file:
                    yield from iter(lambda: file.read(_BLOCK), b"")
            elif path.suffix == ".zst":
                yield from _zstd_blocks(packed)
            else:
                yield from iter(lambda: packed.read(_BLOCK), b"")
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def _zstd_blocks(packed: IO[bytes]) -> Iterator[bytes]:
    import zstandard

    unpacker = zstandard.ZstdDecompressor().decompressobj()
    inside = False  # whether a frame has begun that has not ended
    try:
        for block in iter(lambda: packed.read(_BLOCK), b""):
            while block:
                yield unpacker.decompress(block)
                inside, block = not unpacker.eof, unpacker.unused_data
                if not inside:
                    unpacker = zstandard.ZstdDecompressor().decompressobj()
    except zstandard.ZstdError as error:
        raise OSError(error) from error
    if inside:
        raise EOFError("compressed file ended before its end was reached")


def can_write(folder: epath.Path) -> bool:
    """Whether files can be written to a folder, which is made.

    Raises:
      UnreachableError: That cannot be found out.
    """
    probe = folder / f".{uuid.uuid4().hex[:8]}.partial"
    try:
        files.write_bytes(probe, b"")
        files.remove(probe)
    except OSError:
        return False
    return True
