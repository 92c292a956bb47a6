"""Foreign rows made into GRIT rows one by one: what cannot be is named, what is left out is counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from grit_jax.data.rows import Failed, LeftOut, Row, failed

Rows = Iterator[tuple[str, Row] | Failed | LeftOut]


class FaultError(Exception):
    """What is wrong with a row.

    Args:
      kind: As of `RecordError`.
      message: As of `RecordError`.
      where: File and line of the fault; None for those of the row.
    """

    def __init__(self, kind: str, message: str, where: str | None = None):
        super().__init__(kind, message, where)
        self.kind, self.message, self.where = kind, message, where


def converted(entries: Iterable[tuple[str, Any] | Failed], convert: Callable[[Any], Row | str]) -> Rows:
    """The rows that `convert` makes; a string that it returns says why a row is left out.

    Args:
      entries: Rows with their places, or why they could not be read.
      convert: Makes a GRIT row, or raises `FaultError`.
    """
    for entry in entries:
        if isinstance(entry, Failed):
            yield entry
            continue
        where, row = entry
        try:
            made = convert(row)
        except FaultError as error:
            yield failed(error.where or where, error.kind, error.message)
        else:
            yield LeftOut(where, made) if isinstance(made, str) else (where, made)


def embedding_row(query: Any, positives: list[Any], negatives: list[Any], instruction: str) -> Row:
    """A query, which gets the instruction, with its passages, which get none.

    A passage is a text, or an object with `text` and perhaps `title`. Negatives that are null or blank are none.

    Raises:
      FaultError: The query or a positive is blank, or a negative is a positive too.
    """
    found = [_passage(value) for value in positives]
    for what, text in (("query", query), *(("positive", text) for _, text in found)):
        if _is_blank(text):
            raise FaultError("no text", f"the {what} has no text")
    against = [pair for value in negatives if not _is_blank((pair := _passage(value))[1])]
    known = {text.strip() for _, text in found if isinstance(text, str)}
    for _, text in against:
        if isinstance(text, str) and text.strip() in known:
            raise FaultError("a negative is a positive", f"{text!r:.60} is a negative and a positive of the query")
    return {"query": [instruction, query], "pos": found, "neg": against}


def titled(row: Row) -> Any:
    """Title and text of a passage; the text as it is where it is no string.

    Raises:
      FaultError: There is a title, and it is no string.
    """
    title, text = row.get("title"), row.get("text")
    if title is not None and not isinstance(title, str):
        raise FaultError("no title", f'"title" is {title!r:.60}; it must be a text')
    return f"{title or ''} {text}".strip() if isinstance(text, str) else text


def _is_blank(text: Any) -> bool:
    return text is None or (isinstance(text, str) and not text.strip())


def _passage(value: Any) -> list[Any]:
    return ["", titled(value) if isinstance(value, dict) and "text" in value else value]
