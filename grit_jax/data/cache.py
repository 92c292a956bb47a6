"""What is made from data files and kept: where it lies, how it is written, and plain local copies of packed files."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import uuid
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import IO, Any

from etils import epath

from grit_jax.config import InputError
from grit_jax.watch.files import is_bucket

FOLDER = ".grit_index"
_BLOCK = 1 << 22  # bytes unpacked at a time


def stamp(path: epath.Path, *more: Any) -> str:
    """16 hexadecimal digits that name a version of a file: others when its path, size or time of change differ.

    Args:
      path: The file.
      more: What else they depend on.

    Raises:
      InputError: The file cannot be looked at.
    """
    try:
        if is_bucket(path):
            about = path.stat()
            key = str(path), about.length, about.mtime
        else:
            stat = os.stat(path)
            key = str(Path(path).resolve()), stat.st_size, stat.st_mtime_ns
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    return hashlib.sha256(repr((*key, *more)).encode()).hexdigest()[:16]


def local_folders(path: epath.Path) -> list[Path]:
    """Where things made from a file may be kept on a disk: beside it, then in the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grit_jax" / "index"
    return [cache] if is_bucket(path) else [Path(path).parent / FOLDER, cache]


@contextlib.contextmanager
def replacing(path: Path, mode: str = "wb") -> Generator[IO[Any]]:
    """Opens a file that takes the place of `path` when all of it is written; an error leaves no trace.

    Raises:
      OSError: It cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with partial.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def local_file(path: epath.Path) -> Path:
    """A plain file on a disk with the content of `path`: itself, or a copy unpacked or fetched once.

    Raises:
      InputError: The file is missing or damaged, or there is no room for the copy.
    """
    if not is_bucket(path) and path.suffix not in (".gz", ".zst"):
        return Path(path)
    name = f"{path.name}-{stamp(path)}.copy"
    folders = local_folders(path)
    for folder in folders:
        if (folder / name).exists():
            return folder / name
    problem: OSError | None = None
    for folder in folders:
        try:
            with replacing(folder / name) as file:
                file.writelines(_unpacked(path))
            return folder / name
        except OSError as error:
            problem = error
    raise InputError(
        f"{path}: no room for a plain copy of it ({problem}); set XDG_CACHE_HOME to a folder that has"
    ) from problem


def _unpacked(path: epath.Path) -> Iterator[bytes]:
    """The content of a file, block by block; what goes wrong is the file's fault."""
    try:
        with path.open("rb") as packed:
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


def write(path: epath.Path, content: bytes) -> None:
    """Writes a file of which others see nothing or all, on a disk or in a bucket.

    Raises:
      OSError: It cannot be written.
    """
    if is_bucket(path):
        path.write_bytes(content)  # an object appears when all of it is there
    else:
        with replacing(Path(path)) as file:
            file.write(content)


def can_write(folder: epath.Path) -> bool:
    """Whether files can be written to a folder, which is made."""
    probe = folder / f".{uuid.uuid4().hex[:8]}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write(probe, b"")
        probe.unlink()
    except Exception as error:  # those of a bucket's client are its own
        if not is_bucket(folder) and not isinstance(error, OSError):
            raise
        return False
    return True
