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
from grit_jax.data import cache
from grit_jax.data.lines import BLANK, BOM, is_blank
from grit_jax.data.records import RECORD_KINDS, Record, RecordError, parse_record
from grit_jax.errors import InputError

_JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst")
ARRAY_RECORD = (".array_record", ".arrayrecord")
SUFFIXES = _JSONL + ARRAY_RECORD
_KINDS = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"

_SCANNED = 1 << 26  # bytes whose lines are found at a time
_KEPT_FROM = 1 << 26  # bytes of a file from which on the places of its lines are kept on disk

_IS_BLANK = np.zeros(256, bool)
_IS_BLANK[list(BLANK)] = True


def find_files(paths: str | list[str]) -> list[epath.Path]:
    """The data files that `paths` name: files, or folders searched recursively, in sorted order, each file once.

    Hidden files and folders (those whose names begin with a dot), pipes, sockets and devices are no data.

    Raises:
      InputError: A path does not exist, is no such file, a folder holds none, or two files are the same data twice.
    """
    found: list[epath.Path] = []
    for path in map(epath.Path, [paths] if isinstance(paths, str) else paths):
        if files.is_folder(path):
            below = sorted(files_below(path, SUFFIXES))
            if not below:
                raise InputError(f"{path}: no {_KINDS} file in this folder")
            found += below
        elif not files.exists(path):
            raise InputError(f"{path}: no such file or folder")
        elif not path.name.endswith(SUFFIXES):
            raise InputError(f"{path}: not a {_KINDS} file")
        elif not files.is_bucket(path) and files.is_special(path):
            raise InputError(f"{path}: a pipe, a socket or a device; put the data in a file")
        else:
            found.append(path)
    once: dict[str, epath.Path] = {}
    for path in found:
        once.setdefault(_place(path), path)
    refuse_twins(list(once.values()), SUFFIXES)
    return list(once.values())


def files_below(folder: epath.Path, suffixes: tuple[str, ...]) -> Iterator[epath.Path]:
    """The files with these endings in a folder and its folders, without what is hidden and what is no file."""
    yield from _files_below(folder, suffixes, {_place(folder)})


def refuse_twins(paths: Sequence[epath.Path], suffixes: tuple[str, ...]) -> None:
    """Returns where no two files of a folder differ in their endings alone, as a file and its packed copy do.

    Raises:
      InputError: Two do.
    """
    seen: dict[str, epath.Path] = {}
    for path in paths:
        suffix = max((suffix for suffix in suffixes if path.name.endswith(suffix)), key=len)
        twin = seen.setdefault(os.fspath(path).removesuffix(suffix), path)
        if twin is not path:
            raise InputError(f"{twin} and {path}: the same data twice, by their names; remove or rename one of them")


def _files_below(folder: epath.Path, suffixes: tuple[str, ...], entered: set[str]) -> Iterator[epath.Path]:
    for path in (folder / name for name in files.names(folder) if not name.startswith(".")):
        # A bucket is asked as little as possible, and its folders do not end like files.
        if path.name.endswith(suffixes) and (files.is_bucket(path) or not files.is_folder(path)):
            if files.is_bucket(path) or not files.is_special(path):
                yield path
        elif files.is_folder(path) and _place(path) not in entered:  # a link may lead back
            entered.add(_place(path))
            yield from _files_below(path, suffixes, entered)


def _place(path: epath.Path) -> str:
    """Where a file or folder is, whatever links lead there."""
    return os.fspath(path) if files.is_bucket(path) else os.path.realpath(path)


def open_source(
    path: str | os.PathLike[str],
    *,
    skip_bad: bool = False,
    kinds: Sequence[type[Record]] = RECORD_KINDS,
    kind: type[Record] | None = None,
    version: cache.Version | None = None,
) -> Source:
    """Opens a file, one that `find_files` gave, by its ending; other arguments and errors as of `Source`."""
    path = epath.Path(path)
    source = ArrayRecordSource if path.name.endswith(ARRAY_RECORD) else JsonlSource
    return source(path, skip_bad=skip_bad, kinds=kinds, kind=kind, version=version)


def read_texts(paths: str | list[str]) -> Iterator[str]:
    """What the records of files say, negatives left out: for training a tokenizer."""
    for source in map(open_source, find_files(paths)):
        for record in source:
            yield from record.vocabulary()


class Source(abc.ABC):
    """The records of one file by number.

    Args:
      path: The file.
      skip_bad: Whether the first record may be malformed; the first good one tells the kind then.
      kinds: Kinds of records of which it may hold one.
      kind: The kind where it is known.
      version: What the file must be; None takes what it is.

    Attributes:
      path: The file.
      kinds: As given.
      kind: Kind of its first record, and so of every record.
      version: Of the file, when it was opened.

    Raises:
      InputError: The file has no record, is of another version, or cannot be read.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        skip_bad: bool = False,
        kinds: Sequence[type[Record]] = RECORD_KINDS,
        kind: type[Record] | None = None,
        version: cache.Version | None = None,
    ):
        self.path = epath.Path(path)
        self.version = version or cache.version(self.path)
        self._open(cache.local_file(self.path, self.version))
        cache.refuse_changed(self.path, self.version)
        if not len(self):
            raise InputError(f"{self.path}: the file is empty; remove it or put records in it")
        self.kinds = kinds
        self.kind: type[Record] = kind or self._first_kind(skip_bad)

    def refuse_changed(self) -> None:
        """Returns where the file is as it was when it was opened.

        Raises:
          InputError: It is not.
        """
        cache.refuse_changed(self.path, self.version)

    @abc.abstractmethod
    def _open(self, path: Path) -> None:
        """Opens the plain local file."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """Records, malformed ones among them."""

    @abc.abstractmethod
    def lines(self, start: int, stop: int) -> list[bytes]:
        """The JSON of records `start` to `stop`, exclusive."""

    @abc.abstractmethod
    def line_number(self, number: int) -> int:
        """Where record `number` is in the file, counted from 1: its line, or its entry."""

    def __iter__(self) -> Iterator[Record]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Record:
        return self.parse(number, self.lines(number, number + 1)[0])

    def where(self, number: int) -> str:
        """File and line of record `number`."""
        return f"{self.path}:{self.line_number(number)}"

    def parse(self, number: int, line: bytes) -> Record:
        """Record `number`, whose JSON is `line`.

        Raises:
          RecordError: It is malformed, or of another kind.
        """
        record = self._parsed(number, line)
        if not isinstance(record, self.kind):
            raise RecordError(
                self.where(number),
                "of the other stream",
                f"{record.kind} record in a file of {self.kind.kind} records; keep the streams in separate files",
            )
        return record

    def _parsed(self, number: int, line: bytes) -> Record:
        return parse_record(line, path=self.path, line_number=self.line_number(number), kinds=self.kinds)

    def _first_kind(self, skip_bad: bool) -> type[Record]:
        for number in range(len(self)):
            try:
                return type(self._parsed(number, self.lines(number, number + 1)[0]))
            except RecordError:
                if not skip_bad:
                    raise
        raise InputError(f"{self.path}: none of its {len(self):,} records is well formed; correct or remove the file")


class JsonlSource(Source):
    """The lines of a JSONL file that are not blank; memory-mapped."""

    def _open(self, path: Path) -> None:
        try:
            self._data = files.retrying(path, lambda: _mapped(path))
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read: {error}") from error
        few = len(self._data) < _KEPT_FROM
        self._places = _line_places(self._data) if few else self._kept_line_places()

    def __len__(self) -> int:
        return self._places.shape[1]

    def lines(self, start: int, stop: int) -> list[bytes]:
        """The lines of records `start` to `stop`, exclusive."""
        lines = []
        for begin in self._places[0, start:stop].tolist():
            end = self._data.find(b"\n", begin)
            lines.append(self._data[begin : end if end >= 0 else len(self._data)])
        return lines

    def _kept_line_places(self) -> np.ndarray:
        """`_line_places`, memory-mapped from what an earlier call found."""
        name = cache.lines_name(self.path, self.version)
        for folder in cache.local_folders(self.path):
            try:
                return np.load(folder / name, mmap_mode="r")
            except (OSError, ValueError):
                continue  # missing or damaged: found again
        places = _line_places(self._data)
        self.refuse_changed()
        for folder in cache.local_folders(self.path):
            try:
                with files.replacing(folder / name) as file:
                    np.save(file, places)
                return np.load(folder / name, mmap_mode="r")
            except OSError:
                continue
        return places

    def line_number(self, number: int) -> int:
        """Line of record `number`, from 1."""
        return int(self._places[1, number]) if len(self._places) > 1 else number + 1


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

    def line_number(self, number: int) -> int:
        """Entry of record `number`, from 1."""
        return number + 1


def _mapped(path: Path) -> bytes | mmap.mmap:
    files.refuse_special(path)
    with path.open("rb") as file:
        # An empty file cannot be mapped.
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.fstat(file.fileno()).st_size else b""


def _line_places(data: bytes | mmap.mmap) -> np.ndarray:
    """Offset of every line that is not blank, int64 [1, lines]; with its number, from 1, where there are blank ones."""
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
        if _IS_BLANK[first].any():  # else no line without a byte order mark can be blank
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
