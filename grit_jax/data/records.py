"""One JSONL line as a validated record."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

from grit_jax.config import InputError

Stream = Literal["embedding", "generative"]


class EmbeddingText(NamedTuple):
    """A text and the instruction it is embedded with; the instruction may be empty."""

    instruction: str
    text: str


@dataclasses.dataclass(frozen=True)
class EmbeddingRecord:
    """A query with passages that answer it and passages that do not."""

    query: EmbeddingText
    positives: tuple[EmbeddingText, ...]
    negatives: tuple[EmbeddingText, ...]


@dataclasses.dataclass(frozen=True)
class GenerativeRecord:
    """User and assistant turns, or one plain text."""

    turns: tuple[str, ...] | str


Record = EmbeddingRecord | GenerativeRecord


def parse_record(line: str | bytes, *, path: str | Path, line_number: int) -> Record:
    """Parses and checks one line.

    Embedding: `{"query": T, "pos": [T, ...], "neg": [T, ...]}` where T is a string or `[instruction, text]`; a string
    has an empty instruction, and `neg` may be missing. Generative: `{"text": [user, assistant, ...]}` or
    `{"text": str}`. Other keys are allowed.

    Raises:
      InputError: With file, line and remedy.
    """
    where = f"{path}:{line_number}"
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: not valid JSON ({error}); each line must be one object") from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: found a JSON {type(row).__name__}; each line must be an object")
    if "query" in row:
        return _embedding_record(row, where)
    if "text" in row:
        return _generative_record(row, where)
    raise InputError(
        f'{where}: keys {sorted(row)} are of neither stream; use "query", "pos", "neg" or "text" (generative)'
    )


def stream_of(record: Record) -> Stream:
    """The stream that a record belongs to."""
    return "embedding" if isinstance(record, EmbeddingRecord) else "generative"


def _embedding_record(row: dict[str, Any], where: str) -> EmbeddingRecord:
    for key in ("pos", "neg"):
        if not isinstance(row.setdefault(key, []), list):
            raise InputError(f'{where}: "{key}" is {_describe(row[key])}; it must be a list of texts')
    if not row["pos"]:
        raise InputError(f'{where}: "pos" is missing or empty; every query needs a passage that answers it')
    return EmbeddingRecord(
        _embedding_text(row["query"], f'{where}: "query"'),
        tuple(_embedding_text(text, f'{where}: "pos"') for text in row["pos"]),
        tuple(_embedding_text(text, f'{where}: "neg"') for text in row["neg"]),
    )


def _embedding_text(value: Any, where: str) -> EmbeddingText:
    if isinstance(value, str):
        return EmbeddingText("", value)
    if isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value):
        return EmbeddingText(value[0].strip("\t\n :"), value[1])
    raise InputError(f"{where} holds {_describe(value)}; a text is a string or [instruction, text]")


def _generative_record(row: dict[str, Any], where: str) -> GenerativeRecord:
    turns = row["text"]
    if isinstance(turns, str):
        return GenerativeRecord(turns)
    if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
        raise InputError(f'{where}: "text" is {_describe(turns)}; it must be a string or a list of strings')
    if not turns or len(turns) % 2:
        raise InputError(f'{where}: "text" has {len(turns)} turns; user and assistant turns come in pairs')
    return GenerativeRecord(tuple(turns))


def _describe(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
