"""Rows of JSONL, JSON, TSV and CSV files, plain or packed, one at a time, each with its file and line."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from grit_jax.data.lines import is_blank, read_lines, read_text
from grit_jax.data.records import RecordError, parse_entry, parse_json, text_of
from grit_jax.errors import InputError

T = TypeVar("T")

Row = dict[str, Any]
Cells = dict[str, str] | list[str]

_JSON_SPACE = " \t\r\n"
_CARRIAGE_RETURN = "\udc0d"  # in its place while csv reads, which takes one for the end of a row; no text has this


class Failed(NamedTuple):
    """A row that could not be read."""

    error: RecordError


class LeftOut(NamedTuple):
    """A sound row that says nothing to train on, such as a pair that is labelled as none.

    Attributes:
      where: File and line.
      kind: Why, in a few words that are equal for all rows of the same kind.
    """

    where: str
    kind: str


def failed(where: str, kind: str, message: str) -> Failed:
    """A row with a fault; arguments as of `RecordError`."""
    return Failed(RecordError(where, kind, message))


def sound(entries: Iterable[T | Failed]) -> Iterator[T]:
    """The rows, for a reader that leaves none out.

    Raises:
      RecordError: One has a fault.
    """
    for entry in entries:
        if isinstance(entry, Failed):
            raise entry.error
        yield entry


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
            yield failed(where, "not an object", f"found a JSON {type(value).__name__}; it must be an object")


def read_values(path: Path) -> Iterator[tuple[str, Any] | Failed]:
    """The same of any JSON values.

    Raises:
      InputError: The file cannot be read, or is no list.
    """
    if unpacked_name(path).endswith(".json"):
        yield from _read_list(path)
        return
    for number, line in read_lines(path):
        if not is_blank(line):
            where = f"{path}:{number}"
            try:
                yield where, parse_json(line, where)
            except RecordError as error:
                yield Failed(error)


def read_cells(path: Path, known: frozenset[str]) -> Iterator[tuple[str, Cells] | Failed]:
    """The rows of a .tsv or .csv file: by column name where the first row is a header, else as they are.

    Args:
      path: The file; only .csv has quoted cells.
      known: Column names, in lower case; a first row that holds two of them is a header.

    Raises:
      InputError: The file cannot be read, its header names a column twice, or a quote is not closed.
    """
    rows = _csv_rows(path) if unpacked_name(path).endswith(".csv") else _tsv_rows(path)
    header: list[str] | None = None
    is_first = True
    for entry in rows:
        if isinstance(entry, Failed):
            is_first = False
            yield entry
            continue
        where, cells = entry
        names = [cell.strip().lower() for cell in cells]
        if is_first and len(known.intersection(names)) > 1:
            if twice := sorted({name for name in names if name and names.count(name) > 1}):
                raise InputError(f"{where}: the header names {twice[0]!r} twice; give each column a name of its own")
            header = names
        elif header is None:
            yield where, cells
        elif len(cells) != len(header):
            message = f"has {len(cells)} cells; the header has {len(header)}"
            yield failed(where, "cells are not the header's", message)
        else:
            yield where, dict(zip(header, cells, strict=True))
        is_first = False


def _read_list(path: Path) -> Iterator[tuple[str, Any] | Failed]:
    """The entries of a .json file that holds one list."""
    text = read_text(path)
    place = _after_space(text, 0)
    if text[place : place + 1] != "[":
        kind = type(parse_json(text, str(path))).__name__
        raise InputError(f"{path}: holds one {kind}; a .json file must hold a list")
    number, place = 0, _after_space(text, place + 1)
    try:
        while number or text[place : place + 1] != "]":
            number += 1
            where = f"{path}:{number}"
            try:
                value, end = parse_entry(text, place, where)
            except RecordError as error:
                _, end = json.JSONDecoder().raw_decode(text, place)
                yield Failed(error)
            else:
                yield where, value
            place = _after_space(text, end)
            if text[place : place + 1] == "]":
                break
            if text[place : place + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, place)
            place = _after_space(text, place + 1)
        if _after_space(text, place + 1) != len(text):
            raise json.JSONDecodeError("Extra data", text, place + 1)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def _after_space(text: str, place: int) -> int:
    while text[place : place + 1] and text[place] in _JSON_SPACE:
        place += 1
    return place


def _tsv_rows(path: Path) -> Iterator[tuple[str, list[str]] | Failed]:
    for number, line in read_lines(path):
        if line.strip(b" "):  # cells that are all empty are a row
            where = f"{path}:{number}"
            try:
                yield where, text_of(line, where).split("\t")
            except RecordError as error:
                yield Failed(error)


def _csv_rows(path: Path) -> Iterator[tuple[str, list[str]] | Failed]:
    csv.field_size_limit(1 << 30)
    reader = csv.reader(_csv_lines(path), strict=True)
    while True:
        first = reader.line_num + 1
        where = f"{path}:{first}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end of data" in str(error):
                raise InputError(f"{where}: a quote that begins in this row is not closed; close it") from error
            yield failed(where, "not valid CSV", f"not valid CSV ({error}); correct the quotes of the row")
            continue
        cells = [cell.replace(_CARRIAGE_RETURN, "\r") for cell in cells]
        if len(cells) > 1 or any(cell.strip() for cell in cells):  # else the line is blank
            if all(map(_is_text, cells)):
                yield where, cells
            else:
                yield failed(where, "not UTF-8", "holds bytes that are not UTF-8")


def _csv_lines(path: Path) -> Iterator[str]:
    """Lines with their endings, of which a quoted cell may hold several."""
    for _, line in read_lines(path):
        yield f"{line.decode('utf-8', 'surrogateescape')}\n".replace("\r", _CARRIAGE_RETURN)


def _is_text(cell: str) -> bool:
    try:
        cell.encode()
    except UnicodeEncodeError:
        return False
    return True


def unpacked_name(path: Path) -> str:
    """The name of a file without the ending of its packing, which may be .gz or .zst."""
    return path.name.removesuffix(".gz").removesuffix(".zst")
