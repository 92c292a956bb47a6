"""Relevance judgements: which documents answer which queries."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from grit_jax.data.lines import is_blank, read_lines
from grit_jax.data.records import RecordError, text_of
from grit_jax.data.rows import Failed, failed, read_objects, unpacked_name
from grit_jax.errors import InputError

_KEYS = ("query-id", "corpus-id", "score")
_ENDINGS = (".tsv", ".jsonl", ".txt", ".trec", ".qrels")


class Judgement(NamedTuple):
    """How well a document answers a query: over 0 it does.

    Attributes:
      where: File and line.
      query: Id of the query.
      document: Id of the document.
      score: A finite number.
    """

    where: str
    query: str
    document: str
    score: float


def find_qrels(folder: Path, split: str) -> Path | None:
    """The judgements of a split in BEIR layout: in `qrels`, .tsv, .jsonl, .txt, .trec or .qrels, or these with .gz."""
    names = [f"{split}{ending}{packed}" for ending in _ENDINGS for packed in ("", ".gz")]
    return next((path for path in (folder / "qrels" / name for name in names) if path.is_file()), None)


def read_qrels(path: Path) -> Iterator[Judgement | Failed]:
    """The judgements of a file.

    Of a .jsonl file each line is `{"query-id", "corpus-id", "score"}`. Other files have the same in three columns, in
    the order of a header where there is one, or are TREC's: query, a number that is not used, document and score. Tabs
    part the columns, or spaces in a file of lines without tabs.

    Raises:
      InputError: The file cannot be read, or its header lacks a column.
    """
    if unpacked_name(path).endswith(".jsonl"):
        for entry in read_objects(path):
            if isinstance(entry, Failed):
                yield entry
            else:
                where, row = entry
                named = {str(key).lower().replace("_", "-"): value for key, value in row.items()}
                yield _judgement(where, [named.get(key) for key in _KEYS])
        return
    order: list[int] | None = None
    is_first = True
    for number, line in read_lines(path):
        if is_blank(line):
            continue
        where = f"{path}:{number}"
        try:
            text = text_of(line, where)
        except RecordError as error:
            yield Failed(error)
            continue
        cells = [cell.strip() for cell in text.split("\t")] if "\t" in text else text.split()
        names = [cell.lower().replace("_", "-") for cell in cells]
        if is_first and "query-id" in names:
            if missing := [key for key in _KEYS if key not in names]:
                raise InputError(f"{where}: the header has no {missing[0]!r}; it must name {', '.join(_KEYS)}")
            order = [names.index(key) for key in _KEYS]
        elif order is not None:
            yield _judgement(where, [cells[place] if place < len(cells) else None for place in order])
        elif len(cells) in (3, 4):
            yield _judgement(where, [cells[0], *cells[-2:]])
        else:
            yield _judgement(where, cells)
        is_first = False


def _judgement(where: str, values: list[Any]) -> Judgement | Failed:
    try:
        query, document, score = values
        found = float(score)
        is_score = math.isfinite(found) and not isinstance(score, bool)
    except (TypeError, ValueError, OverflowError):
        is_score = False
    if is_score and all(
        isinstance(name, str | int) and not isinstance(name, bool) and name != "" for name in values[:2]
    ):
        return Judgement(where, str(query), str(document), found)
    shown = ", ".join(f"{value!r:.40}" for value in values[:6])
    return failed(where, "no judgement", f"holds {shown}; a judgement is query-id, corpus-id and a finite score")
