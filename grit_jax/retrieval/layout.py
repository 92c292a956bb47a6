"""The files of a store.

    manifest.json             settings, what has been read, shards; a shard whose vectors are not made has no checksum
    documents-00000.jsonl     the documents of a shard, {"_id", "title", "text"} a line
    vectors-00000.safetensors  their vectors, the scales of int8, and the ends of the lines: row n is line n
    caches-00000.safetensors  the keys and values of the pass that made them, where the settings ask for it
    duplicates-00000.jsonl    ids of documents of a part that repeat the text of a row, {"_id", "row"} a line

Each appears when all of it is written. Rows are counted through all shards, and shards and parts only become more.
A store is on a disk, as it is read in place.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from grit_jax import files
from grit_jax.errors import InputError
from grit_jax.model.transformer import KVCache
from grit_jax.retrieval import caches
from grit_jax.retrieval.vectors import Dtype
from grit_jax.runs import lock
from grit_jax.text.prompts import CacheForm

FORMAT = 1
MANIFEST = "manifest.json"

_SUFFIXES = {"documents": "jsonl", "vectors": "safetensors", "caches": "safetensors", "duplicates": "jsonl"}
_DATA_FILE = re.compile(rf"({'|'.join(_SUFFIXES)})-\d{{5,}}\.({'|'.join(_SUFFIXES.values())})")
_PARTIAL = re.compile(r"\..+\.[0-9a-f]{8}\.partial")  # of `files.replacing`, left by a process that was killed
_ENDS = "document_ends"


class DamagedError(InputError):
    """A file of a store is missing, or does not hold what was written."""


class Document(NamedTuple):
    """A document; `title` may be empty."""

    id: str
    title: str
    text: str

    @property
    def embedded(self) -> str:
        """What the model reads: title and text."""
        return f"{self.title} {self.text}".strip()

    @property
    def fields(self) -> dict[str, str]:
        """The document as a line of a corpus has it."""
        return {"_id": self.id, "title": self.title, "text": self.text}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How all vectors of a store are made.

    Attributes:
      model: The model as it was named.
      fingerprint: What its weights, shape and tokenizer are told by, see `GritModel.fingerprint`.
      embed_dim: Numbers of a vector.
      dtype: Type that they are kept in.
      instruction: What the model is told about the documents.
      max_length: Tokens read of a document.
      caches: Type that keys and values of the pass are kept in; None where they are not kept.
      cache_form: How a document begins there, see `prompts.opening`.
    """

    model: str
    fingerprint: str
    embed_dim: int
    dtype: Dtype
    instruction: str
    max_length: int
    caches: Dtype | None = None
    cache_form: CacheForm = "first"


@dataclasses.dataclass(frozen=True)
class Shard:
    """Some rows.

    Attributes:
      rows: How many.
      documents: sha256 of their file of documents.
      vectors: The same of their file of vectors; None while they are not made.
      caches: The same of their file of keys and values, where there is one.
      tokens: Tokens that were read.
      truncated: Documents that were cut.
    """

    rows: int
    documents: str
    vectors: str | None = None
    caches: str | None = None
    tokens: int = 0
    truncated: int = 0


@dataclasses.dataclass(frozen=True)
class CorpusFile:
    """A file that documents came from; its content tells it, wherever it lies."""

    path: str
    sha256: str


@dataclasses.dataclass(frozen=True)
class Part:
    """What one call of the command added.

    Attributes:
      files: Corpus files that it read.
      documents: Documents in them.
      empty: Those without a text, which were left out.
      repeated: Those whose text the store, or an earlier one, had.
      duplicates: sha256 of the file that names these; None where none has an id of its own.
      shards: Its rows.
    """

    files: list[CorpusFile]
    documents: int
    empty: int
    repeated: int
    duplicates: str | None
    shards: list[Shard]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a store holds, in the order of its rows."""

    settings: Settings
    parts: list[Part]

    @property
    def shards(self) -> list[Shard]:
        """The shards of all parts."""
        return [shard for part in self.parts for shard in part.shards]

    @property
    def unfinished(self) -> list[int]:
        """Numbers of the shards whose vectors are not made."""
        return [number for number, shard in enumerate(self.shards) if shard.vectors is None]

    @property
    def num_rows(self) -> int:
        """Documents that are kept."""
        return sum(shard.rows for shard in self.shards)

    @property
    def num_embedded(self) -> int:
        """Those whose vectors are made."""
        return sum(shard.rows for shard in self.shards if shard.vectors)

    @property
    def num_tokens(self) -> int:
        """Tokens that were read for these."""
        return sum(shard.tokens for shard in self.shards)

    def with_shards(self, shards: Sequence[Shard]) -> Manifest:
        """The same with other facts of the same shards."""
        remaining = iter(shards)
        parts = [dataclasses.replace(part, shards=[next(remaining) for _ in part.shards]) for part in self.parts]
        return dataclasses.replace(self, parts=parts)


def refuse_bucket(folder: str | Path) -> None:
    """Returns where a store can be.

    Raises:
      InputError: `folder` is in a bucket.
    """
    if files.is_bucket(folder):
        raise InputError(
            f"{folder}: a store is read in place and must be on a disk; name a folder there, copy it later"
        )


def refuse_other_folder(folder: Path) -> None:
    """Returns where a store is or can begin.

    Raises:
      InputError: `folder` holds other things.
    """
    found = set(files.names(folder))
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; a store is a folder")
    other = sorted(name for name in found - {lock.NAME, lock.CLAIM} if not _PARTIAL.fullmatch(name))
    if MANIFEST not in found and other:
        raise InputError(f"{folder}: holds {other[0]} and no {MANIFEST}, so it is no store; name another folder")


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest, None where there is none.

    Raises:
      InputError: It is damaged or of a later version.
    """
    path = folder / MANIFEST
    text = files.read_text(path)
    if text is None:
        return None
    try:
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise InputError(f"{path}: has format {content['format']}, this version reads {FORMAT}; update grit_jax")
        checksum = content.pop("sha256", None)  # earlier versions wrote none
        if checksum is not None and checksum != _content_checksum(content):
            raise ValueError("differs from its checksum")
        parts = [
            Part(
                **part
                | {
                    "files": [CorpusFile(**file) for file in part["files"]],
                    "shards": [Shard(**shard) for shard in part["shards"]],
                }
            )
            for part in content["parts"]
        ]
        return Manifest(Settings(**content["settings"]), parts)
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: damaged ({error!r}); put it back from a copy, or make the store anew") from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest whole."""
    content = {"format": FORMAT, **dataclasses.asdict(manifest)}
    content["sha256"] = _content_checksum(content)
    files.write_text(folder / MANIFEST, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _content_checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def other_model(folder: str | Path, settings: Settings, model: str) -> str:
    """What is said where the model is not the one that made a store."""
    return (
        f"{folder}: made by {settings.model} (fingerprint {settings.fingerprint}), and {model} has other weights; "
        "their vectors cannot be compared: name that model, or index the corpus anew"
    )


def data_file(folder: Path, kind: str, number: int) -> Path:
    """A file of a shard (`documents`, `vectors`, `caches`) or of a part (`duplicates`)."""
    return folder / f"{kind}-{number:05}.{_SUFFIXES[kind]}"


def remove_unnamed(folder: Path, manifest: Manifest) -> None:
    """Removes what a killed process had begun and the manifest does not name."""
    named = {path.name for path in _data_files(folder, manifest)}
    for name in files.names(folder):
        if _PARTIAL.fullmatch(name) or (_DATA_FILE.fullmatch(name) and name not in named):
            files.remove(folder / name)


def _data_files(folder: Path, manifest: Manifest) -> dict[Path, str | None]:
    """The files that a manifest names, with their checksums; None while vectors are not made."""
    named: dict[Path, str | None] = {}
    for number, shard in enumerate(manifest.shards):
        named[data_file(folder, "documents", number)] = shard.documents
        named[data_file(folder, "vectors", number)] = shard.vectors
        if manifest.settings.caches:
            named[data_file(folder, "caches", number)] = shard.caches
    for number, part in enumerate(manifest.parts):
        if part.duplicates:
            named[data_file(folder, "duplicates", number)] = part.duplicates
    return named


def write_documents(folder: Path, number: int, documents: Sequence[Document]) -> str:
    """Writes the documents of a shard and returns the sha256 of their file."""
    return _write_lines(data_file(folder, "documents", number), [document.fields for document in documents])


def read_documents(folder: Path, number: int, shard: Shard) -> list[Document]:
    """The documents of a shard.

    Raises:
      InputError: Their file is missing or damaged.
    """
    return list(map(_document, _read_lines(data_file(folder, "documents", number), shard.documents)))


def write_duplicates(folder: Path, number: int, duplicates: Sequence[tuple[str, int]]) -> str:
    """Writes ids that a part does not keep, and the rows that have their texts; returns the sha256 of the file."""
    rows = [{"_id": name, "row": row} for name, row in duplicates]
    return _write_lines(data_file(folder, "duplicates", number), rows)


def read_duplicates(folder: Path, manifest: Manifest) -> list[tuple[str, int]]:
    """Ids of documents that are not kept, and the rows that have their texts."""
    found = []
    for number, part in enumerate(manifest.parts):
        if part.duplicates:
            rows = map(json.loads, _read_lines(data_file(folder, "duplicates", number), part.duplicates))
            found += [(row["_id"], row["row"]) for row in rows]
    return found


def write_vectors(folder: Path, number: int, shard: Shard, tensors: dict[str, np.ndarray]) -> None:
    """Writes the vectors of a shard whose documents are there, and so are its keys and values if they are kept.

    Args:
      folder: The store.
      number: Of the shard.
      shard: Its facts, tokens and truncated documents among them.
      tensors: What `vectors.pack` gave.
    """
    lines = _read_lines(data_file(folder, "documents", number), shard.documents)
    tensors = tensors | {_ENDS: np.cumsum([len(line) + 1 for line in lines], dtype=np.int64)}
    # One entry: several would be written in any order.
    metadata = {"encoded": json.dumps({"tokens": shard.tokens, "truncated": shard.truncated})}
    files.write_bytes(data_file(folder, "vectors", number), safetensors.numpy.save(tensors, metadata))


def with_finished(folder: Path, manifest: Manifest) -> Manifest:
    """The manifest with the checksums of all vectors that have been made since it was written."""
    shards = manifest.shards

    def finished(number: int) -> Shard:
        kinds = ("vectors", "caches") if manifest.settings.caches else ("vectors",)
        paths, metadata = {kind: data_file(folder, kind, number) for kind in kinds}, {}
        try:
            for kind, path in paths.items():
                with safetensors.safe_open(path, "np") as file:
                    metadata[kind] = file.metadata()
        except (OSError, safetensors.SafetensorError):
            return shards[number]  # missing, or cut by a disk that failed: made anew
        encoded = json.loads(metadata["vectors"]["encoded"])
        return dataclasses.replace(shards[number], **encoded, **{kind: checksum(path) for kind, path in paths.items()})

    for number, shard in zip(manifest.unfinished, _in_threads(finished, manifest.unfinished)):
        shards[number] = shard
    return manifest.with_shards(shards)


def checksum(path: files.PathLike) -> str:
    """SHA-256 of a file on a disk or in a bucket.

    Raises:
      InputError: It cannot be read.
    """
    try:
        return files.sha256(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


class ShardedRows:
    """A tensor of all shards as one array [rows, ...]; what is sliced is read then."""

    def __init__(self, paths: Sequence[Path], ends: np.ndarray, name: str):
        self._paths, self._ends, self._name = paths, ends, name
        with safetensors.safe_open(paths[0], "np") as file:
            one = file.get_slice(name)[:1]
        self.shape, self.dtype = (int(ends[-1]), *one.shape[1:]), one.dtype

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        pieces = [np.zeros((0, *self.shape[1:]), self.dtype)]
        for number in range(int(np.searchsorted(self._ends, start, side="right")), len(self._paths)):
            first, end = int(self._ends[number - 1]) if number else 0, int(self._ends[number])
            if first >= stop:
                break
            with safetensors.safe_open(self._paths[number], "np") as file:
                pieces.append(file.get_slice(self._name)[max(0, start - first) : min(stop, end) - first])
        return np.concatenate(pieces)


class Store:
    """A finished store, for reading.

    Args:
      folder: Where it is.

    Attributes:
      folder: Where it is.
      settings: How its vectors were made.
      vectors: [rows, embed] in the type of the settings.
      scales: float32 [rows] beside int8, else None.

    Raises:
      InputError: There is none, it is unfinished, or a file is missing or damaged.
    """

    def __init__(self, folder: str | Path):
        refuse_bucket(folder)
        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        if manifest is None:
            raise InputError(f"{folder}: no {MANIFEST}, so it is no store; make one with grit-jax index")
        if not manifest.shards:
            raise InputError(f"{folder}: holds no documents; name a corpus to grit-jax index")
        if manifest.unfinished:
            raise InputError(
                f"{folder}: {len(manifest.unfinished)} of {len(manifest.shards)} shards have no vectors yet; run the "
                "same grit-jax index again, which goes on where it was"
            )
        self.settings, self._manifest = manifest.settings, manifest
        self._check(caches=False)
        self._ends = np.cumsum([shard.rows for shard in manifest.shards])
        self.vectors = self._rows("vectors")
        self.scales = self._rows("scales") if self.settings.dtype == "int8" else None

    def __len__(self) -> int:
        return int(self._ends[-1])

    def document(self, row: int) -> Document:
        """The document of a row.

        Raises:
          DamagedError: It cannot be read.
        """
        number, place = self._place(row)
        path = data_file(self.folder, "documents", number)
        with _reading(path, row):
            with safetensors.safe_open(data_file(self.folder, "vectors", number), "np") as file:
                ends = file.get_slice(_ENDS)[max(0, place - 1) : place + 1].tolist()
            begin = ends[0] if place else 0
            with files.open_binary(path) as file:
                file.seek(begin)
                return _document(file.read(ends[-1] - begin))

    def check_caches(self) -> None:
        """Compares the files of keys and values with their checksums, which opening a store does not.

        Raises:
          InputError: The store has none, or a file is missing or damaged.
        """
        if not self.settings.caches:
            raise InputError(
                f"{self.folder}: made without keys and values; index the corpus into another folder with --caches, or "
                "choose a method that needs none"
            )
        self._check(caches=True)

    def cache(self, row: int) -> KVCache:
        """Keys and values of a row's document, float32 [layers, tokens, kv_heads, head_dim]; see `check_caches`.

        Raises:
          DamagedError: They cannot be read.
        """
        path, place = self._cache_place(row)
        with _reading(path, row):
            return caches.read(path, place)

    def cache_length(self, row: int) -> int:
        """Tokens of `cache`; errors as there."""
        path, place = self._cache_place(row)
        with _reading(path, row):
            return caches.length(path, place)

    def documents(self) -> Iterator[Document]:
        """All documents, row by row."""
        for number, shard in enumerate(self._manifest.shards):
            yield from read_documents(self.folder, number, shard)

    @functools.cached_property
    def duplicates(self) -> dict[int, list[str]]:
        """Ids of documents that had the text of a row and were not kept, by row."""
        found: dict[int, list[str]] = {}
        for name, row in read_duplicates(self.folder, self._manifest):
            found.setdefault(row, []).append(name)
        return found

    def _cache_place(self, row: int) -> tuple[Path, int]:
        number, place = self._place(row)
        return data_file(self.folder, "caches", number), place

    def _place(self, row: int) -> tuple[int, int]:
        """The shard of a row, and its place there."""
        number = int(np.searchsorted(self._ends, row, side="right"))
        return number, row - (int(self._ends[number - 1]) if number else 0)

    def _rows(self, name: str) -> ShardedRows:
        paths = [data_file(self.folder, "vectors", number) for number in range(len(self._manifest.shards))]
        return ShardedRows(paths, self._ends, name)

    def _check(self, *, caches: bool) -> None:
        """Compares the files of keys and values, or all others, with their checksums."""
        named = _data_files(self.folder, self._manifest)
        expected = {path: sha for path, sha in named.items() if path.name.startswith("caches") == caches}
        for path, found in zip(expected, _in_threads(checksum, list(expected))):
            _compare(path, found, expected[path])


@contextmanager
def _reading(path: Path, row: int) -> Generator[None]:
    """Says of whatever bytes that were changed make a reader raise what they are."""
    try:
        yield
    except Exception as error:
        raise DamagedError(
            f"{path}: row {row} cannot be read: {error!r}; put the file back from a copy, or make the store anew"
        ) from error


def _in_threads(action: Callable[[Any], Any], values: Sequence[Any]) -> list[Any]:
    with ThreadPoolExecutor() as pool:
        return list(pool.map(action, values))


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    content = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
    files.write_bytes(path, content)
    return hashlib.sha256(content).hexdigest()


def _read_lines(path: Path, expected: str) -> list[bytes]:
    """The lines that `_write_lines` wrote, without their endings."""
    return _read(path, expected).split(b"\n")[:-1]


def _read(path: Path, expected: str) -> bytes:
    content = files.read_bytes(path)
    if content is None:
        raise DamagedError(f"{path}: is missing; put it back from a copy, or make the store anew")
    _compare(path, hashlib.sha256(content).hexdigest(), expected)
    return content


def _compare(path: Path, found: str, expected: str | None) -> None:
    if found != expected:
        raise DamagedError(
            f"{path}: differs from its checksum in {MANIFEST}; put it back from a copy, or make the store anew"
        )


def _document(line: bytes) -> Document:
    row = json.loads(line)
    document = Document(row["_id"], row["title"], row["text"])
    if not all(isinstance(field, str) for field in document):
        raise ValueError("a field is no text")
    return document
