"""Documents of corpus files in BEIR's layout: one JSON object per line."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from grit_jax import files
from grit_jax.config.jsonfile import named
from grit_jax.data.sources import ARRAY_RECORD, find_files
from grit_jax.data.text_files import read_objects, sound
from grit_jax.errors import InputError

_NAME = "corpus.jsonl"
_FORMAT = '{"_id": ..., "title": ..., "text": ...}'


class Document(NamedTuple):
    """A document; `title` may be empty."""

    id: str
    title: str
    text: str

    @property
    def embedded(self) -> str:
        """What the model reads: title and text."""
        return titled(self.title, self.text)

    @property
    def fields(self) -> dict[str, str]:
        """The document as a line of a corpus."""
        return {"_id": self.id, "title": self.title, "text": self.text}


def titled(title: Any, text: Any) -> str:
    """What a model reads of a document or passage: its title, if it has one, and its text."""
    return f"{title or ''} {text}".strip()


def find_corpus(paths: Sequence[str]) -> list[epath.Path]:
    """The files that `paths` name; in a folder with a `corpus.jsonl`, compressed or not, only files of that name.

    Raises:
      InputError: A path does not exist or is not JSONL.
    """
    found: list[epath.Path] = []
    for path in paths:
        below = find_files(path)
        corpora = [file for file in below if file.name.startswith(_NAME)]
        found += corpora or below if files.is_folder(path) else below
    for file in found:
        if file.name.endswith(ARRAY_RECORD):
            raise InputError(f"{file}: a corpus is .jsonl, .jsonl.gz or .jsonl.zst, with {_FORMAT} on each line")
    return list(dict.fromkeys(found))


def read_corpus(path: epath.Path) -> Iterator[tuple[str, Document]]:
    """The documents of a file, each with its file and line; a document without an id gets one from its text.

    Raises:
      InputError: The file cannot be read, or a line is malformed.
    """
    for where, row in sound(read_objects(path)):
        document = parse_document(row, where, id_required=False)
        yield where, document if document.id else document._replace(id=text_key(document).hex())


def parse_document(row: Mapping[str, Any], where: str, *, id_required: bool) -> Document:
    """The document of a parsed line; a title, and an id that is not required, may be missing or null.

    Args:
      row: Keys and values of the line.
      where: File and line, for messages.
      id_required: Whether the line must have an `_id`.

    Raises:
      InputError: A value is missing or not a string.
    """

    def string(key: str, *, required: bool) -> str:
        value = row.get(key)
        if isinstance(value, str):
            return value
        if value is None and not required:
            return ""
        found = f"is {value!r:.60}" if key in row else f"is missing; there are {', '.join(map(named, row)):.300}"
        raise InputError(f"{where}: {key!r} {found}; it must be a string: each line is {_FORMAT}")

    return Document(string("_id", required=id_required), string("title", required=False), string("text", required=True))


def text_key(document: Document) -> bytes:
    """16 bytes, equal for documents with the same `embedded` text."""
    return hashlib.blake2b(document.embedded.encode(), digest_size=16).digest()
