"""Reading rows of foreign files and writing GRIT rows, one at a time."""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
import os
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from grit_jax.config import InputError
from grit_jax.data.records import RecordError, parse_json, parse_record
from grit_jax.data.sources import ARRAY_RECORD
from grit_jax.files import replacing

Row = dict[str, Any]


class Written(NamedTuple):
    """What `write_rows` did.

    Attributes:
      rows: Rows written.
      bad: Rows left out, by fault.
      examples: The first row of each fault, with file and line.
    """

    rows: int
    bad: Counter[str]
    examples: dict[str, str]


class Failed(NamedTuple):
    """A row that could not be read."""

    error: RecordError


def write_rows(path: Path, rows: Iterable[tuple[str, Row] | Failed], *, skip_bad: bool = False) -> Written:
    """Writes GRIT rows to a .jsonl, .jsonl.gz or ArrayRecord file, which appears when all of them are there.

    Args:
      path: The file.
      rows: Where each row is from, and the row; or why it could not be read.
      skip_bad: Whether rows that are no GRIT records are left out and counted.

    Raises:
      InputError: The ending is another, there is no row, or one is bad and `skip_bad` is false.
    """
    count, bad, examples = 0, Counter[str](), {}
    with _writer(path) as write:
        for entry in rows:
            try:
                if isinstance(entry, Failed):
                    raise entry.error
                where, row = entry
                line = json.dumps(row, ensure_ascii=False)
                _check(line, where)
                write(line.encode())
                count += 1
            except RecordError as error:
                if not skip_bad:
                    raise InputError(f"{error} (--skip-bad leaves such rows out and counts them)") from error
                bad[error.kind] += 1
                examples.setdefault(error.kind, str(error))
        if not count:
            raise InputError(f"{path}: there is no row to write")
    return Written(count, bad, examples)


def _check(line: str, where: str) -> None:
    path, _, number = where.rpartition(":")
    try:
        line.encode()
    except UnicodeEncodeError as error:
        raise RecordError(where, "half a surrogate pair", "half of a surrogate pair is no character") from error
    parse_record(line, path=path, line_number=int(number))


@contextlib.contextmanager
def _writer(path: Path) -> Generator[Callable[[bytes], Any]]:
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        with replacing(path) as raw:
            packed: Any = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if path.suffix == ".gz" else raw
            yield lambda line: packed.write(line + b"\n")
            if packed is not raw:
                packed.close()
    elif path.name.endswith(ARRAY_RECORD):
        from array_record.python.array_record_module import ArrayRecordWriter  # ty: ignore[import-not-found]

        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        try:
            writer = ArrayRecordWriter(str(partial), "group_size:1")  # records are read one by one
            yield writer.write
            writer.close()
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    else:
        raise InputError(f"{path}: must end in .jsonl, .jsonl.gz, .array_record or .arrayrecord")


def open_text(path: Path, newline: str = "\n") -> IO[str]:
    """A text file, unpacked where it ends in .gz.

    Args:
      path: The file.
      newline: What ends a line; empty for any ending.

    Raises:
      InputError: It cannot be opened.
    """
    opener: Any = gzip.open if path.suffix == ".gz" else open
    try:
        return opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline=newline)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def read_objects(path: Path) -> Iterator[tuple[str, Row] | Failed]:
    """The objects of a JSONL file, line by line, or of a .json file that holds one list of them.

    Each comes with `path:line`, or `path:entry` in a list.

    Raises:
      InputError: The file cannot be read, or is no list.
    """
    for entry in read_values(path):
        if isinstance(entry, Failed) or isinstance(entry[1], dict):
            yield entry
        else:
            where, value = entry
            found = f"found a JSON {type(value).__name__}; it must be an object"
            yield Failed(RecordError(where, "not an object", found))


def read_values(path: Path) -> Iterator[tuple[str, Any] | Failed]:
    """The same of any JSON values.

    Raises:
      InputError: The file cannot be read, or is no list.
    """
    try:
        with open_text(path) as file:
            if path.name.removesuffix(".gz").endswith(".json"):
                entries = json.load(file)
                if not isinstance(entries, list):
                    raise InputError(f"{path}: holds one {type(entries).__name__}; a .json file must hold a list")
                for number, entry in enumerate(entries, start=1):
                    yield f"{path}:{number}", entry
                return
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{path}:{number}"
                    try:
                        yield where, parse_json(line.encode("utf-8", "surrogateescape"), where)
                    except RecordError as error:
                        yield Failed(error)
    except InputError:
        raise
    except (OSError, EOFError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def read_cells(path: Path, known: frozenset[str]) -> Iterator[tuple[str, dict[str, str] | list[str]] | Failed]:
    """The rows of a .tsv or .csv file: by column name where the first row is a header, else as they are.

    Args:
      path: The file; only .csv has quoted cells.
      known: Column names, in lower case; a first row that holds two of them is a header.

    Raises:
      InputError: The file cannot be read.
    """
    csv.field_size_limit(1 << 30)
    comma = path.name.removesuffix(".gz").endswith(".csv")
    options: dict[str, Any] = {} if comma else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    header: list[str] | None = None
    try:
        with open_text(path, newline="") as file:
            reader = csv.reader(file, strict=comma, **options)
            first = 1
            for cells in reader:
                where, first = f"{path}:{first}", reader.line_num + 1
                if not cells:
                    continue
                names = [cell.strip().lower() for cell in cells]
                if header is None and where.endswith(":1") and len(known.intersection(names)) > 1:
                    header = names
                elif not all(map(_is_text, cells)):
                    yield Failed(RecordError(where, "not UTF-8", "holds bytes that are not UTF-8"))
                elif header is None:
                    yield where, cells
                elif len(cells) != len(header):
                    message = f"has {len(cells)} cells; the header has {len(header)}"
                    yield Failed(RecordError(where, "cells are not the header's", message))
                else:
                    yield where, dict(zip(header, cells, strict=True))
    except (OSError, EOFError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def _is_text(cell: str) -> bool:
    try:
        cell.encode()
    except UnicodeEncodeError:
        return False
    return True
