"""Random access to the records of data files: JSONL, compressed or not, and ArrayRecord, on a disk or in a bucket."""

from __future__ import annotations

import abc
import mmap
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from etils import epath

from grit_jax import files
from grit_jax.data import derived
from grit_jax.data.records import RECORD_TYPES, Record, RecordError, parse_record
from grit_jax.data.text_files import BLANK, BOM, is_blank
from grit_jax.errors import InputError

_JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst")
ARRAY_RECORD = (".array_record", ".arrayrecord")
SUFFIXES = _JSONL + ARRAY_RECORD
_FORMATS = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"

RECORDS_AT_ONCE = 1024  # read, and tokenized, together
_SCANNED = 1 << 26  # bytes whose lines are found at a time
_KEPT_FROM = 1 << 26  # bytes of the smallest file whose line offsets are kept on disk

_IS_BLANK = np.zeros(256, bool)
_IS_BLANK[list(BLANK)] = True


def find_files(paths: str | list[str]) -> list[epath.Path]:
    """The data files that `paths` name: files, or folders searched recursively, in sorted order, each file once.

    Hidden files and folders (whose names begin with a dot), pipes, sockets and devices are not data.

    Raises:
      InputError: A path does not exist or is not a data file, a folder holds none, or two files are the same data.
    """
    found: dict[str, epath.Path] = {}
    for path in map(epath.Path, [paths] if isinstance(paths, str) else paths):
        if files.is_folder(path):
            below = sorted(files_below(path, SUFFIXES))
            if not below:
                raise InputError(f"{path}: no {_FORMATS} file in this folder")
        elif not files.exists(path):
            raise InputError(f"{path}: no such file or folder")
        elif not path.name.endswith(SUFFIXES):
            raise InputError(f"{path}: not a {_FORMATS} file")
        elif files.is_special(path):
            raise InputError(f"{path}: a pipe, a socket or a device; put the data in a file")
        else:
            below = [path]
        for file in below:
            found.setdefault(_resolved(file), file)
    refuse_twins(list(found.values()), SUFFIXES)
    return list(found.values())


def packed_or_not(path: Path) -> Path:
    """The file, or the one with .gz where there is only that."""
    packed = path.with_name(f"{path.name}.gz")
    return packed if packed.is_file() and not path.exists() else path


def files_below(folder: epath.Path, suffixes: tuple[str, ...]) -> Iterator[epath.Path]:
    """The files with these suffixes in a folder and its folders, without hidden and special ones."""
    return _files_below(folder, suffixes, {_resolved(folder)})


def _files_below(folder: epath.Path, suffixes: tuple[str, ...], entered: set[str]) -> Iterator[epath.Path]:
    for path in (folder / name for name in files.names(folder) if not name.startswith(".")):
        # A bucket gets as few requests as possible, and its folders are not named like files.
        if path.name.endswith(suffixes) and (files.is_bucket(path) or not files.is_folder(path)):
            if not files.is_special(path):
                yield path
        elif files.is_folder(path) and _resolved(path) not in entered:  # a link may lead back
            entered.add(_resolved(path))
            yield from _files_below(path, suffixes, entered)


def _resolved(path: epath.Path) -> str:
    """The path of a file or folder without links."""
    return os.fspath(path) if files.is_bucket(path) else os.path.realpath(path)


def refuse_twins(paths: Sequence[epath.Path], suffixes: tuple[str, ...]) -> None:
    """Checks that no two files differ only in their suffixes, as a file and its compressed copy do.

    Raises:
      InputError: Two do.
    """
    seen: dict[str, epath.Path] = {}
    for path in paths:
        twin = seen.setdefault(without_suffix(os.fspath(path), suffixes), path)
        if twin is not path:
            raise InputError(f"{twin} and {path}: the same data twice, by their names; remove or rename one of them")


def without_suffix(path: str, suffixes: tuple[str, ...] = SUFFIXES) -> str:
    """A path without the longest of these suffixes that it ends in."""
    return path.removesuffix(max(filter(path.endswith, suffixes), key=len, default=""))


def open_source(
    path: str | os.PathLike[str],
    *,
    skip_bad: bool = False,
    record_types: Sequence[type[Record]] = RECORD_TYPES,
    record_type: type[Record] | None = None,
    version: derived.Version | None = None,
) -> Source:
    """Opens a file that `find_files` found.

    Args:
      path: The file.
      skip_bad: Whether the first record may be malformed; the first well-formed one then tells the type.
      record_types: The types of records that the file may hold, one of them in each file.
      record_type: The type, if known.
      version: The version that the file must have; None for its present one.

    Raises:
      InputError: The file has no record, has another version, or cannot be read.
    """
    path = epath.Path(path)
    source_type = ArrayRecordSource if path.name.endswith(ARRAY_RECORD) else JsonlSource
    source = source_type(path, version or derived.version(path), record_types)
    source.record_type = record_type or source.first_type(skip_bad)
    return source


def vocabulary_texts(paths: str | list[str]) -> Iterator[str]:
    """The texts of data files to train a tokenizer on."""
    for source in map(open_source, find_files(paths)):
        for record in source:
            yield from record.vocabulary()


class Source(abc.ABC):
    """The records of one file by index.

    Attributes:
      path: The file.
      version: Its version when it was opened.
      record_types: The types of records that it may hold.
      record_type: The type of all its records.
    """

    record_type: type[Record]

    def __init__(self, path: epath.Path, version: derived.Version, record_types: Sequence[type[Record]]):
        self.path, self.version, self.record_types = path, version, record_types
        self._open(derived.local_file(path, version))
        self.refuse_changed()
        if not len(self):
            raise InputError(f"{path}: the file is empty; remove it or put records in it")

    def refuse_changed(self) -> None:
        """Checks that the file has not changed since it was opened.

        Raises:
          InputError: It has changed.
        """
        derived.refuse_changed(self.path, self.version)

    @abc.abstractmethod
    def _open(self, path: Path) -> None:
        """Opens the plain local file."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of records, malformed ones included."""

    @abc.abstractmethod
    def lines(self, start: int, stop: int) -> list[bytes]:
        """The JSON of records `start` to `stop`, exclusive."""

    @abc.abstractmethod
    def line_number(self, index: int) -> int:
        """The line, or the entry, of a record in the file, from 1."""

    def where(self, index: int) -> str:
        """The file and line of a record."""
        return f"{self.path}:{self.line_number(index)}"

    def __getitem__(self, index: int) -> Record:
        (record,) = self.records(index, index + 1)
        if isinstance(record, RecordError):
            raise record
        return record

    def __iter__(self) -> Iterator[Record]:
        for record in self.checked():
            if isinstance(record, RecordError):
                raise record
            yield record

    def checked(self) -> Iterator[Record | RecordError]:
        """All records; an error in place of each malformed one."""
        for start in range(0, len(self), RECORDS_AT_ONCE):
            yield from self.records(start, min(start + RECORDS_AT_ONCE, len(self)))

    def records(self, start: int, stop: int) -> Iterator[Record | RecordError]:
        """Records `start` to `stop`, exclusive; an error in place of each malformed one or one of another type."""
        for index, line in enumerate(self.lines(start, stop), start):
            record = self._parsed(index, line)
            if isinstance(record, Record) and not isinstance(record, self.record_type):
                own = self.record_type.name
                message = f"{record.name} record in a file of {own} records; keep the streams in separate files"
                record = RecordError("of the other stream", message, self.where(index))
            yield record

    def _parsed(self, index: int, line: bytes) -> Record | RecordError:
        try:
            return parse_record(line, self.where(index), self.record_types)
        except RecordError as error:
            return error

    def first_type(self, skip_bad: bool) -> type[Record]:
        """The type of the first record, or of the first well-formed one; raises as `open_source`."""
        for index in range(len(self)):
            record = self._parsed(index, *self.lines(index, index + 1))
            if isinstance(record, Record):
                return type(record)
            if not skip_bad:
                raise record
        raise InputError(f"{self.path}: none of its {len(self):,} records is well formed; correct or remove the file")


class JsonlSource(Source):
    """The lines of a JSONL file that are not blank; memory-mapped."""

    def _open(self, path: Path) -> None:
        try:
            self._data = files.retrying(path, lambda: _mapped(path))
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read: {error}") from error
        few = len(self._data) < _KEPT_FROM
        self._offsets = _line_offsets(self._data) if few else self._kept_line_offsets()

    def __len__(self) -> int:
        return self._offsets.shape[1]

    def lines(self, start: int, stop: int) -> list[bytes]:
        """The lines of records `start` to `stop`, exclusive."""
        lines = []
        for begin in self._offsets[0, start:stop].tolist():
            end = self._data.find(b"\n", begin)
            lines.append(self._data[begin : end if end >= 0 else len(self._data)])
        return lines

    def line_number(self, index: int) -> int:
        """The line of a record, from 1."""
        return int(self._offsets[1, index]) if len(self._offsets) > 1 else index + 1

    def _kept_line_offsets(self) -> np.ndarray:
        """`_line_offsets`, memory-mapped from an earlier call's file."""
        name = derived.lines_name(self.path, self.version)
        paths = [folder / name for folder in derived.local_folders(self.path)]
        for path in paths:
            try:
                return np.load(path, mmap_mode="r")
            except (OSError, ValueError):
                continue  # missing or damaged: found again
        offsets = _line_offsets(self._data)
        self.refuse_changed()
        for path in paths:
            try:
                with files.replacing(path) as file:
                    np.save(file, offsets)
                return np.load(path, mmap_mode="r")
            except OSError:
                continue
        return offsets


class ArrayRecordSource(Source):
    """The entries of an ArrayRecord file, one JSON object each."""

    def _open(self, path: Path) -> None:
        from array_record.python.array_record_module import ArrayRecordReader  # ty: ignore[import-not-found]

        self._local = path
        # Without readahead: records are read in any order.
        self._reader = ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0")
        if not self._reader.ok():
            raise InputError(f"{self.path}: not a whole ArrayRecord file; write it again")

    def __len__(self) -> int:
        return self._reader.num_records()

    def lines(self, start: int, stop: int) -> list[bytes]:
        """Entries `start` to `stop`, exclusive."""
        try:
            return files.retrying(self._local, lambda: self._reader.read(start, stop))
        except RuntimeError as error:
            raise InputError(f"{self.path}: entries {start + 1} to {stop} cannot be read: {error}") from error

    def line_number(self, index: int) -> int:
        """The entry of a record, from 1."""
        return index + 1


def _mapped(path: Path) -> bytes | mmap.mmap:
    files.refuse_special(path)
    with path.open("rb") as file:
        # An empty file cannot be mapped.
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.fstat(file.fileno()).st_size else b""


def _line_offsets(data: bytes | mmap.mmap) -> np.ndarray:
    """Offset of every line that is not blank, int64 [1, lines]; [2, lines] with line numbers if some are blank."""
    starts, numbers, num_lines, any_blank = [], [], 0, False
    begin = 0
    while begin < len(data):
        last = data.rfind(b"\n", begin, begin + _SCANNED)
        end = last + 1 if last >= 0 else data.find(b"\n", begin) + 1 or len(data)
        if begin + _SCANNED >= len(data):
            end = len(data)
        block = np.frombuffer(data, np.uint8, end - begin, begin)
        found = np.concatenate([[0], np.flatnonzero(block == ord("\n")) + 1])
        found = found[found < len(block)]
        keep = np.ones(len(found), bool)
        first = block[found]
        if _IS_BLANK[first].any():  # otherwise only a line with a byte order mark can be blank
            keep = np.add.reduceat(~_IS_BLANK[block], found, dtype=np.int64) > 0
        for line in np.flatnonzero(first == BOM[0]).tolist():
            stop = found[line + 1] if line + 1 < len(found) else len(block)
            keep[line] = not is_blank(block[found[line] : stop].tobytes())
        any_blank |= not keep.all()
        starts.append(found[keep] + begin)
        numbers.append(np.flatnonzero(keep) + num_lines + 1)
        num_lines += len(found)
        begin = end
    columns = [starts, numbers] if any_blank else [starts]
    return np.stack([np.concatenate([np.zeros(0, np.int64), *column]) for column in columns])
