"""One JSONL line as a validated record."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import json
from collections.abc import Generator, Iterable, Sequence
from typing import Any, ClassVar, NamedTuple, Self

from grit_jax.errors import InputError
from grit_jax.text.prompts import stripped

_EXAMPLES = 3  # messages kept for each fault


class RecordError(InputError):
    """A malformed record.

    Attributes:
      fault: A few words, the same for all records with this fault.
      where: File and line; empty until `located` fills it in.
    """

    def __init__(self, fault: str, message: str, where: str = ""):
        super().__init__(fault, message, where)
        self.fault, self.message, self.where = fault, message, where

    def __str__(self) -> str:
        """File, line and fault."""
        return f"{self.where}: {self.message}" if self.where else self.message


@contextlib.contextmanager
def located(where: str) -> Generator[None]:
    """Adds file and line to the record errors of its block that have none."""
    try:
        yield
    except RecordError as error:
        error.where = error.where or where
        raise


class BadRecords(NamedTuple):
    """Malformed records with the same fault.

    Attributes:
      fault: A few words.
      count: Number of records.
      examples: Messages of the first few, with file and line.
    """

    fault: str
    count: int
    examples: tuple[str, ...]

    @classmethod
    def of(cls, error: RecordError) -> Self:
        """One record."""
        return cls(error.fault, 1, (str(error),))

    @classmethod
    def from_json(cls, values: Iterable[Any]) -> tuple[Self, ...]:
        """From lists of the attributes' values."""
        return tuple(cls(fault, count, tuple(examples)) for fault, count, examples in values)


def add_bad(found: dict[str, BadRecords], *more: BadRecords) -> None:
    """Adds records, by fault, to those found before."""
    for fault, count, examples in more:
        before = found.get(fault, BadRecords(fault, 0, ()))
        found[fault] = BadRecords(fault, before.count + count, (*before.examples, *examples)[:_EXAMPLES])


class EmbeddingText(NamedTuple):
    """A text and the instruction to embed it with, which may be empty."""

    instruction: str
    text: str


class Record(abc.ABC):
    """The content of one line; each subclass is a type of record.

    Attributes:
      name: The name of the stream that trains on it.
      keys: The JSON keys that identify it, for messages.
      numbered_with: Files are numbered in this order first, so a new type of record changes no other file's number.
    """

    name: ClassVar[str]
    keys: ClassVar[str]
    numbered_with: ClassVar[int] = 1

    @classmethod
    @abc.abstractmethod
    def reads(cls, row: dict[str, Any]) -> bool:
        """Whether a JSON object is a record of this type, well formed or not."""

    @classmethod
    @abc.abstractmethod
    def parse(cls, row: dict[str, Any]) -> Self:
        """The record of a JSON object that `reads` accepts.

        Raises:
          RecordError: It is malformed.
        """

    @abc.abstractmethod
    def texts(self) -> list[str]:
        """All its texts, without instructions."""

    def vocabulary(self) -> list[str]:
        """Texts to train a tokenizer on: with instructions, without what other records repeat."""
        return self.texts()

    def comparable(self) -> dict[str, str]:
        """Parts, by name, that near-duplicates have in common."""
        return {}


@dataclasses.dataclass(frozen=True)
class EmbeddingRecord(Record):
    """A query with passages that answer it and passages that do not."""

    name = "embedding"
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
    def parse(cls, row: dict[str, Any]) -> Self:
        """`{"query": T, "pos": [T, ...], "neg": [T, ...]}` where T is a string or `[instruction, text]`.

        A string has an empty instruction, and `neg` may be missing.

        Raises:
          RecordError: It is malformed.
        """
        for key in ("pos", "neg"):
            if not isinstance(row.setdefault(key, []), list):
                message = f'"{key}" is {_shown(row[key])}; it must be a list of texts'
                raise RecordError(f'"{key}" is not a list', message)
        if not row["pos"]:
            raise RecordError('no "pos"', '"pos" is missing or empty; every query needs a passage that answers it')
        return cls(
            _embedding_text(row["query"], "query"),
            tuple(_embedding_text(text, "pos") for text in row["pos"]),
            tuple(_embedding_text(text, "neg") for text in row["neg"]),
        )

    def texts(self) -> list[str]:
        """Query, positives and negatives."""
        return [text.text for text in (self.query, *self.positives, *self.negatives)]

    def vocabulary(self) -> list[str]:
        """Query and positives with their instructions; most negatives are another record's positive."""
        return [text for pair in (self.query, *self.positives) for text in pair]

    def comparable(self) -> dict[str, str]:
        """Its query."""
        return {"queries": repr(self.query)}


@dataclasses.dataclass(frozen=True)
class GenerativeRecord(Record):
    """User and assistant turns, or one plain text."""

    name = "generative"
    keys = '"text" (generative)'
    numbered_with = 0

    turns: tuple[str, ...] | str

    @classmethod
    def reads(cls, row: dict[str, Any]) -> bool:
        """Whether it has a text."""
        return "text" in row

    @classmethod
    def parse(cls, row: dict[str, Any]) -> Self:
        """`{"text": [user, assistant, ...]}` or `{"text": str}`.

        Raises:
          RecordError: It is neither.
        """
        turns = row["text"]
        if isinstance(turns, str):
            return cls(turns)
        if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
            message = f'"text" is {_shown(turns)}; it must be a string or a list of strings'
            raise RecordError('"text" is not a text', message)
        if not turns or len(turns) % 2:
            message = f'"text" has {len(turns)} turns; user and assistant turns come in pairs'
            raise RecordError("turns not in pairs", message)
        return cls(tuple(turns))

    def texts(self) -> list[str]:
        """Its turns, or the plain text."""
        return [self.turns] if isinstance(self.turns, str) else list(self.turns)

    def comparable(self) -> dict[str, str]:
        """The first user turn of a conversation."""
        return {} if isinstance(self.turns, str) else {"first user turns": self.turns[0]}


RECORD_TYPES: tuple[type[Record], ...] = (EmbeddingRecord, GenerativeRecord)


def parse_record(line: str | bytes, where: str, record_types: Sequence[type[Record]] = RECORD_TYPES) -> Record:
    """Parses and checks one line; keys that its type of record does not use are ignored.

    Raises:
      RecordError: It is malformed; the message starts with `where`.
    """
    with located(where):
        row = require_object(_json(line))
        for record_type in record_types:
            if record_type.reads(row):
                return record_type.parse(row)
        keys = " or ".join(record_type.keys for record_type in record_types)
        message = f"keys {_shown(sorted(row))} belong to neither stream; use {keys}"
        raise RecordError("keys of neither stream", message)


def parse_object(line: str | bytes, where: str = "") -> dict[str, Any]:
    """The JSON object of one line; see `parse_json`."""
    with located(where):
        return require_object(_json(line))


def parse_json(line: str | bytes, where: str = "") -> Any:
    """The JSON value of one line: UTF-8, no key twice, and only text that UTF-8 can hold.

    Raises:
      RecordError: It is something else; the message starts with `where`.
    """
    with located(where):
        return _json(line)


def require_object(value: Any) -> dict[str, Any]:
    """A JSON value that must be an object.

    Raises:
      RecordError: It is another.
    """
    if isinstance(value, dict):
        return value
    raise RecordError("not an object", f"found a JSON {type(value).__name__}; it must be an object")


def text_of(line: bytes, where: str = "") -> str:
    """The text of a line, without a byte order mark.

    Raises:
      RecordError: It is not UTF-8.
    """
    with located(where):
        return _text(line)


def _text(line: bytes) -> str:
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"byte {error.start + 1} is not UTF-8 ({error.reason}); save the file as UTF-8"
        raise RecordError("not UTF-8", message) from error


def _json(line: str | bytes) -> Any:
    text = _text(line) if isinstance(line, bytes) else line
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys)
        if "\\u" in text:  # a JSON escape may be half a surrogate pair, which no tokenizer accepts
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        message = "lists or objects are nested too deeply; each line must be one flat object"
        raise RecordError("nested too deeply", message) from error
    except UnicodeEncodeError as error:
        message = f"\\u{ord(error.object[error.start]):04x} is half of a surrogate pair, not a character; remove it"
        raise RecordError("half a surrogate pair", message) from error
    except RecordError:
        raise
    except ValueError as error:
        raise RecordError("not valid JSON", f"not valid JSON ({error}); each line must be one object") from error
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RecordError("a key twice", f"key {_shown(twice)} appears twice; keep one of them")
    return row


def _embedding_text(value: Any, key: str) -> EmbeddingText:
    if isinstance(value, str):
        return EmbeddingText("", value)
    if isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value):
        return EmbeddingText(stripped(value[0]), value[1])
    message = f'"{key}" holds {_shown(value)}; a text is a string or [instruction, text]'
    raise RecordError(f'"{key}" holds no text', message)


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except RecursionError:
        text = "a deeply nested list or object"
    return text if len(text) <= 60 else text[:57] + "..."
