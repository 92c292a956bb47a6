"""One JSONL line as a validated record."""

from __future__ import annotations

import abc
import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Self

from grit_jax.errors import InputError
from grit_jax.text.prompts import stripped


class RecordError(InputError):
    """A malformed record.

    Attributes:
      kind: What is wrong in a few words, equal for all records with the same fault.
    """

    def __init__(self, where: str, kind: str, message: str):
        super().__init__(where, kind, message)
        self.kind = kind

    def __str__(self) -> str:
        """File, line and what is wrong there."""
        where, _, message = self.args
        return f"{where}: {message}"


class EmbeddingText(NamedTuple):
    """A text and the instruction it is embedded with; the instruction may be empty."""

    instruction: str
    text: str


class Record(abc.ABC):
    """What one line says; each kind of record is a class.

    Attributes:
      kind: Its name: that of the stream which is trained on it.
      keys: What tells it from other kinds, for messages.
      numbered_with: Files are numbered kind by kind in this order, so that a new kind renumbers none of the others'.
    """

    kind: ClassVar[str]
    keys: ClassVar[str]
    numbered_with: ClassVar[int] = 1

    @classmethod
    @abc.abstractmethod
    def reads(cls, row: dict[str, Any]) -> bool:
        """Whether a line holds a record of this kind, well formed or not."""

    @classmethod
    @abc.abstractmethod
    def parse(cls, row: dict[str, Any], where: str) -> Self:
        """The record of a line that `reads` accepts.

        Raises:
          RecordError: It is malformed.
        """

    @abc.abstractmethod
    def texts(self) -> list[str]:
        """All its texts, without instructions."""

    def vocabulary(self) -> list[str]:
        """What a tokenizer is trained on: instructions included, and what other records say as well left out."""
        return self.texts()

    def comparable(self) -> dict[str, str]:
        """Parts that are equal in records that nearly repeat each other, by what they are called."""
        return {}


@dataclasses.dataclass(frozen=True)
class EmbeddingRecord(Record):
    """A query with passages that answer it and passages that do not."""

    kind = "embedding"
    keys = '"query", "pos", "neg"'
    numbered_with = 0

    query: EmbeddingText
    positives: tuple[EmbeddingText, ...]
    negatives: tuple[EmbeddingText, ...]

    @classmethod
    def reads(cls, row: dict[str, Any]) -> bool:
        """Whether it has a query."""
        return "query" in row

    @classmethod
    def parse(cls, row: dict[str, Any], where: str) -> Self:
        """`{"query": T, "pos": [T, ...], "neg": [T, ...]}` where T is a string or `[instruction, text]`.

        A string has an empty instruction, and `neg` may be missing.

        Raises:
          RecordError: It is not that.
        """
        for key in ("pos", "neg"):
            if not isinstance(row.setdefault(key, []), list):
                raise RecordError(
                    where, f'"{key}" is no list', f'"{key}" is {_describe(row[key])}; it must be a list of texts'
                )
        if not row["pos"]:
            message = '"pos" is missing or empty; every query needs a passage that answers it'
            raise RecordError(where, 'no "pos"', message)
        return cls(
            _embedding_text(row["query"], where, "query"),
            tuple(_embedding_text(text, where, "pos") for text in row["pos"]),
            tuple(_embedding_text(text, where, "neg") for text in row["neg"]),
        )

    def texts(self) -> list[str]:
        """Query, positives and negatives."""
        return [text.text for text in (self.query, *self.positives, *self.negatives)]

    def vocabulary(self) -> list[str]:
        """Query and positives with their instructions; most negatives are the positive of another record."""
        return [text for pair in (self.query, *self.positives) for text in pair]

    def comparable(self) -> dict[str, str]:
        """Its query."""
        return {"queries": repr(self.query)}


@dataclasses.dataclass(frozen=True)
class GenerativeRecord(Record):
    """User and assistant turns, or one plain text."""

    kind = "generative"
    keys = '"text" (generative)'
    numbered_with = 0

    turns: tuple[str, ...] | str

    @classmethod
    def reads(cls, row: dict[str, Any]) -> bool:
        """Whether it has a text."""
        return "text" in row

    @classmethod
    def parse(cls, row: dict[str, Any], where: str) -> Self:
        """`{"text": [user, assistant, ...]}` or `{"text": str}`.

        Raises:
          RecordError: It is neither.
        """
        turns = row["text"]
        if isinstance(turns, str):
            return cls(turns)
        if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
            raise RecordError(
                where,
                '"text" is no text',
                f'"text" is {_describe(turns)}; it must be a string or a list of strings',
            )
        if not turns or len(turns) % 2:
            raise RecordError(
                where,
                "turns not in pairs",
                f'"text" has {len(turns)} turns; user and assistant turns come in pairs',
            )
        return cls(tuple(turns))

    def texts(self) -> list[str]:
        """Its turns, or the plain text."""
        return [self.turns] if isinstance(self.turns, str) else list(self.turns)

    def comparable(self) -> dict[str, str]:
        """The first user turn of a conversation."""
        return {} if isinstance(self.turns, str) else {"first user turns": self.turns[0]}


RECORD_KINDS: tuple[type[Record], ...] = (EmbeddingRecord, GenerativeRecord)


def parse_record(
    line: str | bytes,
    *,
    path: str | os.PathLike[str],
    line_number: int,
    kinds: Sequence[type[Record]] = RECORD_KINDS,
) -> Record:
    """Parses and checks one line, which may hold other keys than those of its kind.

    Raises:
      RecordError: With file, line and remedy.
    """
    where = f"{path}:{line_number}"
    row = parse_object(line, where)
    for kind in kinds:
        if kind.reads(row):
            return kind.parse(row, where)
    raise RecordError(
        where,
        "keys of neither stream",
        f"keys {_describe(sorted(row))} are of neither stream; use {' or '.join(kind.keys for kind in kinds)}",
    )


def parse_object(line: str | bytes, where: str) -> dict[str, Any]:
    """The JSON object of one line; see `parse_json`."""
    row = parse_json(line, where)
    if not isinstance(row, dict):
        raise RecordError(where, "not an object", f"found a JSON {type(row).__name__}; each line must be an object")
    return row


def parse_json(line: str | bytes, where: str) -> Any:
    """The JSON value of one line: UTF-8, no key twice, and only text that UTF-8 can hold.

    Raises:
      RecordError: It starts with `where`.
    """
    text = text_of(line, where) if isinstance(line, bytes) else line
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys)
        if "\\u" in text:  # a JSON escape may stand for half a character, which no tokenizer takes
            json.dumps(value, ensure_ascii=False).encode()
    except (_DuplicateKeyError, ValueError, RecursionError) as error:
        raise RecordError(where, *_named(error)) from error
    return value


def parse_entry(text: str, place: int, where: str) -> tuple[Any, int]:
    """`parse_json` of the value that begins at a place of a longer text, and the place after it.

    Raises:
      json.JSONDecodeError: No value begins there, so that nothing after it can be read either.
      RecordError: The value is another that `parse_json` refuses, and may be passed over.
    """
    _, end = json.JSONDecoder().raw_decode(text, place)
    return parse_json(text[place:end], where), end


def text_of(line: bytes, where: str) -> str:
    """The text of a line, without a byte order mark.

    Raises:
      RecordError: It is not UTF-8.
    """
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"byte {error.start + 1} is not UTF-8 ({error.reason}); save the file as UTF-8"
        raise RecordError(where, "not UTF-8", message) from error


def _named(error: Exception) -> tuple[str, str]:
    """Kind and message of what is wrong with a line."""
    match error:
        case _DuplicateKeyError():
            return "a key twice", f"key {_describe(error.args[0])} is there twice; keep one of them"
        case RecursionError():
            return "nested too deeply", "lists or objects are nested too deeply; each line must be one flat object"
        case UnicodeEncodeError():
            code = ord(error.object[error.start])
            return "half a surrogate pair", f"\\u{code:04x} is half of a surrogate pair and no character; remove it"
        case _:
            return "not valid JSON", f"not valid JSON ({error}); each line must be one object"


class _DuplicateKeyError(Exception):
    pass


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise _DuplicateKeyError(next(name for name in names if names.count(name) > 1))
    return row


def _embedding_text(value: Any, where: str, key: str) -> EmbeddingText:
    if isinstance(value, str):
        return EmbeddingText("", value)
    if isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value):
        return EmbeddingText(stripped(value[0]), value[1])
    raise RecordError(
        where,
        f'"{key}" holds no text',
        f'"{key}" holds {_describe(value)}; a text is a string or [instruction, text]',
    )


def _describe(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except RecursionError:
        text = "a deeply nested list or object"
    return text if len(text) <= 60 else text[:57] + "..."
