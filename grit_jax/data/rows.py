"""Rows of JSONL, JSON, TSV and CSV files, plain or gzipped, one at a time, each with its file and line."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from grit_jax.config import InputError
from grit_jax.data.records import RecordError, parse_json

Row = dict[str, Any]


class Failed(NamedTuple):
    """A row that could not be read."""

    error: RecordError


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
