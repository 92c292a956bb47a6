"""Documents of corpus files: BEIR's layout, one JSON object a line."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from grit_jax import files
from grit_jax.data.sources import ARRAY_RECORD, find_files
from grit_jax.data.text_files import read_objects, sound
from grit_jax.errors import InputError
from grit_jax.retrieval.layout import Document

_NAME = "corpus.jsonl"
_FORM = '{"_id": ..., "title": ..., "text": ...}, of which "_id" and "title" may be left out'


def find_corpus(paths: Sequence[str]) -> list[epath.Path]:
    """The files that `paths` name. Of a folder with a `corpus.jsonl`, packed or not, only such files are taken.

    Raises:
      InputError: A path does not exist or is no JSONL.
    """
    found: list[epath.Path] = []
    for path in paths:
        below = find_files(path)
        corpora = [file for file in below if file.name.startswith(_NAME)]
        found += corpora or below if files.is_folder(path) else below
    for file in found:
        if file.name.endswith(ARRAY_RECORD):
            raise InputError(f"{file}: a corpus is .jsonl, .jsonl.gz or .jsonl.zst, with {_FORM}")
    return list(dict.fromkeys(found))


def read_corpus(path: epath.Path) -> Iterator[tuple[str, Document]]:
    """The documents of a file, each with its file and line; one without an id gets one from its text.

    Raises:
      InputError: The file cannot be read, or a row is malformed.
    """
    for where, row in sound(read_objects(path)):
        document = Document(
            _string(row, "_id", where, needed=False), _string(row, "title", where, needed=False),
            _string(row, "text", where, needed=True),
        )  # fmt: skip
        yield where, document if document.id else document._replace(id=text_key(document).hex())


def text_key(document: Document) -> bytes:
    """16 bytes that are equal for documents of which the model reads the same."""
    return hashlib.blake2b(document.embedded.encode(), digest_size=16).digest()


def _string(row: dict[str, Any], key: str, where: str, *, needed: bool) -> str:
    value = row.get(key)
    if isinstance(value, str):
        return value
    if value is None and not needed:
        return ""
    found = f"is {value!r:.60}" if key in row else f"is missing; there are {', '.join(row)}"
    raise InputError(f"{where}: {key!r} {found}; it must be a string: each line is {_FORM}")
