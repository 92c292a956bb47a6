"""Text files, plain or compressed, on a disk or in a bucket: their lines, and the entries of JSONL, JSON, TSV and CSV.

A line ends at a line feed and nowhere else: U+2028, U+0085, form feeds and lone carriage returns are text. A carriage
return before the line feed belongs to the ending. A byte order mark at the start of any line is dropped, since
concatenated files have several. A line of white space is blank; readers skip it but count it.

Each entry is file and line with the value, or the `RecordError` that says why the line cannot be read.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

from etils import epath

from grit_jax import files
from grit_jax.data.records import RecordError, located, parse_json, require_object, text_of
from grit_jax.errors import InputError

BLANK = b" \t\r\n\v\f"  # what a blank line may hold
BOM = codecs.BOM_UTF8
_BLOCK = 1 << 22  # bytes decompressed at a time
_JSON_SPACE = " \t\r\n"
_CARRIAGE_RETURN = "\udc0d"  # stands for it in csv, which would end a row there; no text has this

T = TypeVar("T")
Row = dict[str, Any]
Cells = dict[str, str] | list[str]
Entry = tuple[str, T] | RecordError


def read_blocks(path: epath.Path) -> Iterator[bytes]:
    """The content of a file block by block, decompressed if it ends in .gz or .zst.

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

    inside = False  # a frame
    try:
        for block in iter(lambda: packed.read(_BLOCK), b""):
            while block:
                if not inside:
                    frame = zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(block)
                inside, block = not frame.eof, frame.unused_data
    except zstandard.ZstdError as error:
        raise OSError(error) from error
    if inside:
        raise EOFError("compressed file ended before its end was reached")


def unpacked_name(path: Path | epath.Path) -> str:
    """The name of a file without .gz or .zst."""
    return path.name.removesuffix(".gz").removesuffix(".zst")


def is_blank(line: bytes) -> bool:
    """Whether a line holds only white space."""
    return not line.removeprefix(BOM).strip(BLANK)


def read_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, bytes]]:
    """Every line of a file with its number, from 1: without ending and byte order mark, blank lines included.

    Raises:
      InputError: The file cannot be read.
    """
    number, begun = 0, []
    for block in read_blocks(epath.Path(path)):
        *ended, last = block.split(b"\n")
        for end in ended:
            number += 1
            yield number, _content(b"".join([*begun, end]))
            begun = []
        begun.append(last)
    if rest := b"".join(begun):
        yield number + 1, _content(rest)


def _filled_lines(path: str | os.PathLike[str]) -> Iterator[tuple[str, bytes]]:
    return ((f"{path}:{number}", line) for number, line in read_lines(path) if not is_blank(line))


def _content(line: bytes) -> bytes:
    return line.removeprefix(BOM).removesuffix(b"\r")


def read_text_lines(path: str | os.PathLike[str]) -> Iterator[Entry[str]]:
    """The texts of a file's lines, without the blank ones.

    Raises:
      InputError: The file cannot be read.
    """
    return converted(_filled_lines(path), text_of)


def read_text(path: str | os.PathLike[str]) -> str:
    """The whole text of a file, its lines ended only by line feeds.

    Raises:
      InputError: It cannot be read.
      RecordError: A line is not UTF-8; the message names it.
    """
    return "\n".join(text_of(line, f"{path}:{number}") for number, line in read_lines(path))


def sound(entries: Iterable[Entry[T]]) -> Iterator[tuple[str, T]]:
    """The entries, for a reader that accepts no errors.

    Raises:
      RecordError: One has an error.
    """
    for entry in entries:
        if isinstance(entry, RecordError):
            raise entry
        yield entry


def converted(entries: Iterable[Entry[Any]], convert: Callable[[Any], T]) -> Iterator[Entry[T]]:
    """The entries with their values converted; a `RecordError` that `convert` raises replaces its entry."""
    for entry in entries:
        yield entry if isinstance(entry, RecordError) else _attempt(*entry, convert)


def _attempt(where: str, value: Any, convert: Callable[[Any], T]) -> Entry[T]:
    try:
        with located(where):
            return where, convert(value)
    except RecordError as error:
        return error


def read_objects(path: Path | epath.Path) -> Iterator[Entry[Row]]:
    """The objects of a JSONL file, line by line, or of a .json file that holds one list of them.

    They are located as `path:line`, or `path:entry` in a list.

    Raises:
      InputError: The file cannot be read, or holds JSON other than a list.
    """
    return converted(read_values(path), require_object)


def read_values(path: Path | epath.Path) -> Iterator[Entry[Any]]:
    """`read_objects` for any JSON values."""
    return _read_list(path) if unpacked_name(path).endswith(".json") else converted(_filled_lines(path), parse_json)


def _read_list(path: Path | epath.Path) -> Iterator[Entry[Any]]:
    text, decoder = read_text(path), json.JSONDecoder()
    index = _after_space(text, 0)
    if text[index : index + 1] != "[":
        kind = type(parse_json(text, str(path))).__name__
        raise InputError(f"{path}: holds one {kind}; a .json file must hold a list")
    number, index = 0, _after_space(text, index + 1)
    try:
        while number or text[index : index + 1] != "]":
            number += 1
            _, end = decoder.raw_decode(text, index)
            yield _attempt(f"{path}:{number}", text[index:end], parse_json)
            index = _after_space(text, end)
            if text[index : index + 1] == "]":
                break
            if text[index : index + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, index)
            index = _after_space(text, index + 1)
        if _after_space(text, index + 1) != len(text):
            raise json.JSONDecodeError("Extra data", text, index + 1)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def _after_space(text: str, index: int) -> int:
    while text[index : index + 1] and text[index] in _JSON_SPACE:
        index += 1
    return index


def read_cells(path: Path, known: frozenset[str]) -> Iterator[Entry[Cells]]:
    """The rows of a .tsv or .csv file: by column name where the first row is a header, else as lists.

    Args:
      path: The file; only .csv has quoted cells.
      known: Column names, in lower case; a first row that holds two of them is a header.

    Raises:
      InputError: The file cannot be read, its header names a column twice, or a quote is never closed.
    """
    rows = iter(_csv_rows(path) if unpacked_name(path).endswith(".csv") else _tsv_rows(path))
    header: list[str] | None = None
    for entry in rows:
        if not isinstance(entry, RecordError):
            where, cells = entry
            names = [cell.strip().lower() for cell in cells]
            if len(known.intersection(names)) > 1:
                if twice := sorted({name for name in names if name and names.count(name) > 1}):
                    raise InputError(
                        f"{where}: the header names {twice[0]!r} twice; give each column a name of its own"
                    )
                header = names
                break
        yield entry
        break
    yield from converted(rows, lambda cells: _by_column(header, cells)) if header else rows


def _by_column(header: list[str], cells: list[str]) -> dict[str, str]:
    if len(cells) != len(header):
        message = f"has {len(cells)} cells; the header has {len(header)}"
        raise RecordError("cells are not the header's", message)
    return dict(zip(header, cells, strict=True))


def _tsv_rows(path: Path) -> Iterator[Entry[list[str]]]:
    # Cells that are all empty are a row.
    lines = ((f"{path}:{number}", line) for number, line in read_lines(path) if line.strip(b" "))
    return converted(lines, lambda line: text_of(line).split("\t"))


def _csv_rows(path: Path) -> Iterator[Entry[list[str]]]:
    csv.field_size_limit(1 << 30)
    reader = csv.reader(_csv_lines(path), strict=True)
    while True:
        where = f"{path}:{reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end of data" in str(error):
                raise InputError(f"{where}: a quote that opens in this row is never closed; close it") from error
            yield RecordError("not valid CSV", f"not valid CSV ({error}); correct the quotes of the row", where)
            continue
        cells = [cell.replace(_CARRIAGE_RETURN, "\r") for cell in cells]
        if len(cells) > 1 or any(cell.strip() for cell in cells):  # else the line is blank
            if all(map(_is_text, cells)):
                yield where, cells
            else:
                yield RecordError("not UTF-8", "holds bytes that are not UTF-8", where)


def _csv_lines(path: Path) -> Iterator[str]:
    """Lines with their endings; a quoted cell may hold several."""
    for _, line in read_lines(path):
        yield f"{line.decode('utf-8', 'surrogateescape')}\n".replace("\r", _CARRIAGE_RETURN)


def _is_text(cell: str) -> bool:
    try:
        cell.encode()
    except UnicodeEncodeError:
        return False
    return True
