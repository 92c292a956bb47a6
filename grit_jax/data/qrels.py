"""Relevance judgements: which documents answer which queries."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from grit_jax.data.records import RecordError
from grit_jax.data.text_files import Entry, Row, converted, read_objects, read_text_lines, unpacked_name
from grit_jax.errors import InputError

_KEYS = ("query-id", "corpus-id", "score")
_ENDINGS = (".tsv", ".jsonl", ".txt", ".trec", ".qrels")


class Judgement(NamedTuple):
    """How well a document answers a query; a positive score, always finite, says that it does."""

    query: str
    document: str
    score: float


def find_qrels(folder: Path, split: str) -> Path | None:
    """The judgements of a split in BEIR layout: in `qrels`, .tsv, .jsonl, .txt, .trec or .qrels, or these with .gz."""
    names = [f"{split}{ending}{packed}" for ending in _ENDINGS for packed in ("", ".gz")]
    return next((path for path in (folder / "qrels" / name for name in names) if path.is_file()), None)


def read_qrels(path: Path) -> Iterator[Entry[Judgement]]:
    """The judgements of a file.

    Each line of a .jsonl file is `{"query-id", "corpus-id", "score"}`. Other files have these columns, in the order of
    their header if they have one, or TREC's: query, an unused number, document and score. Tabs separate columns, or
    spaces where a line has no tab.

    Raises:
      InputError: The file cannot be read, or its header lacks a column.
    """
    if unpacked_name(path).endswith(".jsonl"):
        return converted(read_objects(path), _of_object)
    return _read_columns(path)


def _read_columns(path: Path) -> Iterator[Entry[Judgement]]:
    columns: list[int] | None = None

    def judgement(cells: list[str]) -> Judgement:
        if columns is not None:
            return _judgement([cells[column] if column < len(cells) else None for column in columns])
        return _judgement([cells[0], *cells[-2:]] if len(cells) in (3, 4) else cells)

    is_first = True
    for entry in converted(read_text_lines(path), _cells):
        if is_first and not isinstance(entry, RecordError):
            is_first, (where, cells) = False, entry
            names = list(map(_normalised, cells))
            if _KEYS[0] in names:
                if missing := [key for key in _KEYS if key not in names]:
                    raise InputError(f"{where}: the header has no {missing[0]!r}; it must name {', '.join(_KEYS)}")
                columns = [names.index(key) for key in _KEYS]
                continue
        yield from converted([entry], judgement)


def _cells(text: str) -> list[str]:
    return [cell.strip() for cell in text.split("\t")] if "\t" in text else text.split()


def _normalised(key: str) -> str:
    return key.lower().replace("_", "-")


def _of_object(row: Row) -> Judgement:
    named = {_normalised(key): value for key, value in row.items()}
    return _judgement([named.get(key) for key in _KEYS])


def _judgement(values: list[Any]) -> Judgement:
    try:
        query, document, score = values
        number = float(score)
        is_score = math.isfinite(number) and not isinstance(score, bool)
    except (TypeError, ValueError, OverflowError):
        is_score = False
    if is_score and all(_is_name(value) for value in values[:2]):
        return Judgement(str(query), str(document), number)
    shown = ", ".join(f"{value!r:.40}" for value in values[:6])
    message = f"holds {shown}; a judgement is query-id, corpus-id and a finite score"
    raise RecordError("no judgement", message)


def _is_name(value: Any) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool) and value != ""
