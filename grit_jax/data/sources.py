"""Random access to the records of JSONL files."""

from __future__ import annotations

import gzip
import mmap
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from grit_jax.config import InputError
from grit_jax.data.records import Record, Stream, parse_record, stream_of

_SUFFIXES = (".jsonl", ".jsonl.gz")


def find_files(paths: str | list[str]) -> list[Path]:
    """The JSONL files that `paths` name: files, or folders searched recursively, in sorted order.

    Raises:
      InputError: A path does not exist, has another ending, or a folder holds no JSONL file.
    """
    found: list[Path] = []
    for path in [Path(paths)] if isinstance(paths, str) else map(Path, paths):
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.name.endswith(_SUFFIXES) and file.is_file())
            if not files:
                raise InputError(f"{path}: no .jsonl or .jsonl.gz file in this folder")
            found += files
        elif not path.exists():
            raise InputError(f"{path}: no such file or folder")
        elif not path.name.endswith(_SUFFIXES):
            raise InputError(f"{path}: not a .jsonl or .jsonl.gz file")
        else:
            found.append(path)
    return list(dict.fromkeys(found))


class JsonlSource:
    """The records of one file by number; blank lines are left out.

    Plain files are memory-mapped, compressed ones held in memory. A source can be sent to another process, which opens
    the file again.

    Attributes:
      path: The file.
      stream: Which stream its first record, and so every record, belongs to.

    Raises:
      InputError: The file has no record, or cannot be read.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._data = _read(self.path)
        self._starts, self._line_numbers = _line_starts(self._data)
        if not len(self):
            raise InputError(f"{self.path}: the file is empty; remove it or put records in it")
        self.stream: Stream = stream_of(self._parse(0))

    def __reduce__(self):
        return JsonlSource, (self.path,)

    def __len__(self) -> int:
        return len(self._line_numbers)

    def __iter__(self) -> Iterator[Record]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Record:
        record = self._parse(number)
        if stream_of(record) != self.stream:
            raise InputError(
                f"{self.path}:{self._line_numbers[number]}: {stream_of(record)} record in a file of {self.stream} "
                "records; keep the streams in separate files"
            )
        return record

    def line_number(self, number: int) -> int:
        """The line, from 1, that a record is on."""
        return int(self._line_numbers[number])

    def _parse(self, number: int) -> Record:
        start = self._starts[number]
        end = self._data.find(b"\n", start)
        line = self._data[start : end if end >= 0 else len(self._data)]
        return parse_record(line, path=self.path, line_number=int(self._line_numbers[number]))


def _read(path: Path) -> bytes | mmap.mmap:
    try:
        if path.name.endswith(".gz"):
            return gzip.decompress(path.read_bytes())
        with path.open("rb") as file:
            # An empty file cannot be mapped.
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
    except (OSError, EOFError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def _line_starts(data: bytes | mmap.mmap) -> tuple[np.ndarray, np.ndarray]:
    """Offset and line number, from 1, of every line that is not blank."""
    if not len(data):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    ends = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n"))
    starts = np.concatenate([[0], ends + 1])
    ends = np.append(ends, len(data))
    filled = [
        bool(data[start:end].strip()) if end - start < 64 else True for start, end in zip(starts, ends, strict=True)
    ]
    return starts[filled], np.flatnonzero(filled) + 1
