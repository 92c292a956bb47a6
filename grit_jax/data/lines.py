"""The lines of text files: what every reader of JSONL, TSV and plain text takes for one.

A line ends at a line feed and nowhere else: U+2028, U+0085, form feeds and lone carriage returns are text. A carriage
return before the line feed belongs to the ending, as Windows writes it. A byte order mark at the start of a line is no
text: files that were joined have several. A line of white space is blank; it is passed over, and counted.
"""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterator

from etils import epath

from grit_jax.data import cache
from grit_jax.data.records import text_of

BLANK = b" \t\r\n\v\f"  # what a blank line may hold
BOM = codecs.BOM_UTF8


def is_blank(line: bytes) -> bool:
    """Whether a line says nothing."""
    return not line.removeprefix(BOM).strip(BLANK)


def read_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, bytes]]:
    """Every line of a file with its number, from 1: without its ending and byte order mark, blank lines included.

    Args:
      path: On a disk or in a bucket; unpacked where it ends in .gz or .zst.

    Raises:
      InputError: It cannot be read.
    """
    number, begun = 0, []
    for block in cache.unpacked(epath.Path(path)):
        *ended, last = block.split(b"\n")
        for end in ended:
            number += 1
            yield number, _content(b"".join([*begun, end]))
            begun = []
        begun.append(last)
    if rest := b"".join(begun):
        yield number + 1, _content(rest)


def read_text_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, str]]:
    """`read_lines` as texts, without the blank ones.

    Raises:
      InputError: The file cannot be read.
      RecordError: A line is not UTF-8; the message names it.
    """
    for number, line in read_lines(path):
        if not is_blank(line):
            yield number, text_of(line, f"{path}:{number}")


def read_text(path: str | os.PathLike[str]) -> str:
    """The whole text of a file, its lines ended by line feeds alone.

    Raises:
      InputError: It cannot be read.
      RecordError: A line is not UTF-8; the message names it.
    """
    return "\n".join(text_of(line, f"{path}:{number}") for number, line in read_lines(path))


def _content(line: bytes) -> bytes:
    return line.removeprefix(BOM).removesuffix(b"\r")
