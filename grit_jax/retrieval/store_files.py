"""The files of a store.

    manifest.json              see `manifest`; has no checksum of vectors not made yet
    documents-00000.jsonl      the documents of a shard, {"_id", "title", "text"} per line
    vectors-00000.safetensors  their vectors, the scales of int8, and the ends of the lines: row n is line n
    caches-00000.safetensors   keys and values of the pass that made the vectors, if the settings ask for them
    duplicates-00000.jsonl     ids of a part's documents that repeat the text of a row, {"_id", "row"} per line

Each file is written atomically. Rows are numbered through all shards; shards and parts are only ever added. A store
must be on a disk, because it is read in place.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.numpy

from grit_jax import files
from grit_jax.errors import InputError
from grit_jax.retrieval.documents import Document
from grit_jax.retrieval.manifest import MANIFEST, PARTIAL, DamagedError, Manifest, Shard

DOCUMENT_ENDS = "document_ends"  # in the file of vectors

_SUFFIXES = {"documents": "jsonl", "vectors": "safetensors", "caches": "safetensors", "duplicates": "jsonl"}
_DATA_FILE = re.compile(rf"({'|'.join(_SUFFIXES)})-\d{{5,}}\.({'|'.join(_SUFFIXES.values())})")


def data_file(folder: Path, content: Literal["documents", "vectors", "caches", "duplicates"], index: int) -> Path:
    """A file of a shard, or of a part for `duplicates`."""
    return folder / f"{content}-{index:05}.{_SUFFIXES[content]}"


def data_files(folder: Path, manifest: Manifest) -> dict[Path, str | None]:
    """The files that a manifest names, with their checksums; None for vectors not made yet."""
    named: dict[Path, str | None] = {}
    for index, shard in enumerate(manifest.shards):
        named[data_file(folder, "documents", index)] = shard.documents
        named[data_file(folder, "vectors", index)] = shard.vectors
        if manifest.settings.caches:
            named[data_file(folder, "caches", index)] = shard.caches
    for index, part in enumerate(manifest.parts):
        if part.duplicates:
            named[data_file(folder, "duplicates", index)] = part.duplicates
    return named


def remove_unnamed(folder: Path, manifest: Manifest) -> None:
    """Removes files that a killed process left and the manifest does not name."""
    named = {path.name for path in data_files(folder, manifest)}
    for name in files.names(folder):
        if PARTIAL.fullmatch(name) or (_DATA_FILE.fullmatch(name) and name not in named):
            files.remove(folder / name)


def write_documents(folder: Path, index: int, documents: Sequence[Document]) -> str:
    """Writes the documents of a shard and returns the sha256 of their file."""
    return _write_lines(data_file(folder, "documents", index), [document.fields for document in documents])


def read_documents(folder: Path, index: int, shard: Shard) -> list[Document]:
    """The documents of a shard.

    Raises:
      DamagedError: Their file is missing or damaged.
    """
    return list(map(document_of_line, _read_lines(data_file(folder, "documents", index), shard.documents)))


def document_of_line(line: bytes) -> Document:
    """The document of a line that `write_documents` wrote; a damaged line raises an arbitrary exception."""
    row = json.loads(line)
    document = Document(row["_id"], row["title"], row["text"])
    if not all(isinstance(field, str) for field in document):
        raise ValueError("a field is not a string")
    return document


def write_duplicates(folder: Path, index: int, duplicates: Sequence[tuple[str, int]]) -> str:
    """Writes a part's repeated ids with the rows of their texts; returns the sha256 of the file."""
    rows = [{"_id": name, "row": row} for name, row in duplicates]
    return _write_lines(data_file(folder, "duplicates", index), rows)


def read_duplicates(folder: Path, manifest: Manifest) -> list[tuple[str, int]]:
    """All repeated ids with the rows of their texts."""
    found = []
    for index, part in enumerate(manifest.parts):
        if part.duplicates:
            rows = map(json.loads, _read_lines(data_file(folder, "duplicates", index), part.duplicates))
            found += [(row["_id"], row["row"]) for row in rows]
    return found


def write_vectors(folder: Path, index: int, shard: Shard, tensors: dict[str, np.ndarray]) -> None:
    """Writes the vectors of a shard, after its documents and its keys and values.

    Args:
      folder: The store.
      index: Index of the shard.
      shard: The shard, with its numbers of tokens and truncated documents.
      tensors: From `quantization.pack`.
    """
    lines = _read_lines(data_file(folder, "documents", index), shard.documents)
    tensors = tensors | {DOCUMENT_ENDS: np.cumsum([len(line) + 1 for line in lines], dtype=np.int64)}
    # One entry, as several would be written in arbitrary order.
    metadata = {"encoded": json.dumps({"tokens": shard.tokens, "truncated": shard.truncated})}
    files.write_bytes(data_file(folder, "vectors", index), safetensors.numpy.save(tensors, metadata))


def with_finished(folder: Path, manifest: Manifest) -> Manifest:
    """The manifest with the checksums of all vectors made since it was written."""
    shards, remaining = manifest.shards, manifest.unfinished

    def finished(index: int) -> Shard:
        contents = ("vectors", "caches") if manifest.settings.caches else ("vectors",)
        paths, metadata = {content: data_file(folder, content, index) for content in contents}, {}
        try:
            for content, path in paths.items():
                with safetensors.safe_open(path, "np") as file:
                    metadata[content] = file.metadata()
        except (OSError, safetensors.SafetensorError):
            return shards[index]  # missing, or cut short by a failed disk: made again
        checksums = {content: checksum(path) for content, path in paths.items()}
        return dataclasses.replace(shards[index], **json.loads(metadata["vectors"]["encoded"]), **checksums)

    with ThreadPoolExecutor() as pool:
        for index, shard in zip(remaining, pool.map(finished, remaining)):
            shards[index] = shard
    in_order = iter(shards)
    parts = [
        dataclasses.replace(part, shards=list(itertools.islice(in_order, len(part.shards)))) for part in manifest.parts
    ]
    return dataclasses.replace(manifest, parts=parts)


def checksum(path: files.PathLike) -> str:
    """SHA-256 of a file on a disk or in a bucket.

    Raises:
      InputError: It cannot be read.
    """
    try:
        return files.sha256(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def verify(checksums: Mapping[Path, str | None]) -> None:
    """Compares files with their checksums.

    Raises:
      InputError: A file cannot be read, or differs.
    """
    with ThreadPoolExecutor() as pool:
        for path, found in zip(checksums, pool.map(checksum, checksums)):
            _compare(path, found, checksums[path])


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    content = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
    files.write_bytes(path, content)
    return hashlib.sha256(content).hexdigest()


def _read_lines(path: Path, expected: str) -> list[bytes]:
    """The lines that `_write_lines` wrote, without their endings."""
    content = files.read_bytes(path)
    if content is None:
        raise DamagedError(f"{path}: is missing; put it back from a copy, or make the store again")
    _compare(path, hashlib.sha256(content).hexdigest(), expected)
    return content.split(b"\n")[:-1]


def _compare(path: Path, found: str, expected: str | None) -> None:
    if found != expected:
        raise DamagedError(
            f"{path}: differs from its checksum in {MANIFEST}; put it back from a copy, or make the store again"
        )
