"""A store's manifest: its settings, the corpus files read, and its shards with their checksums."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from grit_jax import files
from grit_jax.errors import InputError
from grit_jax.retrieval.quantization import Dtype
from grit_jax.runs import lock
from grit_jax.text.prompts import CacheForm

FORMAT = 1
MANIFEST = "manifest.json"
PARTIAL = re.compile(r"\..+\.[0-9a-f]{8}\.partial")  # files of `files.replacing` that a killed process left


class DamagedError(InputError):
    """A file of a store is missing or damaged."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to make the vectors of a store.

    Attributes:
      model: The model's name on the command line.
      fingerprint: Identifies its weights, shape and tokenizer; see `GritModel.fingerprint`.
      embed_dim: Width of a vector.
      dtype: Dtype of the stored vectors.
      instruction: The documents' instruction.
      max_length: Most tokens of a document.
      caches: Dtype of the stored keys and values; None for none.
      cache_form: How a document begins there; see `prompts.opening`.
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
    """Consecutive rows, stored in files of their own.

    Attributes:
      rows: Their number.
      documents: sha256 of the file of documents.
      vectors: sha256 of the file of vectors; None until it is made.
      caches: sha256 of the file of keys and values, if there is one.
      tokens: Tokens read.
      truncated: Documents cut.
    """

    rows: int
    documents: str
    vectors: str | None = None
    caches: str | None = None
    tokens: int = 0
    truncated: int = 0


@dataclasses.dataclass(frozen=True)
class CorpusFile:
    """A file of documents, identified by its content."""

    path: str
    sha256: str


@dataclasses.dataclass(frozen=True)
class Part:
    """The documents that one run of `grit-jax index` added.

    Attributes:
      files: Corpus files that it read.
      documents: Documents in them.
      empty: Documents without text, which are left out.
      repeated: Documents whose text a row already has.
      duplicates: sha256 of the file with the ids of repeated documents; None if none has an id of its own.
      shards: The new rows.
    """

    files: list[CorpusFile]
    documents: int
    empty: int
    repeated: int
    duplicates: str | None
    shards: list[Shard]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of a store, in the order of its rows."""

    settings: Settings
    parts: list[Part]

    @property
    def shards(self) -> list[Shard]:
        """The shards of all parts."""
        return [shard for part in self.parts for shard in part.shards]

    @property
    def unfinished(self) -> list[int]:
        """Indices of the shards without vectors."""
        return [index for index, shard in enumerate(self.shards) if shard.vectors is None]

    @property
    def num_rows(self) -> int:
        """Number of documents."""
        return sum(shard.rows for shard in self.shards)

    @property
    def num_embedded(self) -> int:
        """Number of documents with vectors."""
        return sum(shard.rows for shard in self.shards if shard.vectors)

    @property
    def num_tokens(self) -> int:
        """Number of tokens read for these vectors."""
        return sum(shard.tokens for shard in self.shards)


def refuse_bucket(folder: str | Path) -> None:
    """Checks that a store can be there.

    Raises:
      InputError: `folder` is in a bucket.
    """
    if files.is_bucket(folder):
        raise InputError(
            f"{folder}: a store is read in place, so it must be on a disk; name a folder there, and copy it later"
        )


def refuse_other_folder(folder: Path) -> None:
    """Checks that a store is or can begin in a folder.

    Raises:
      InputError: `folder` holds other files.
    """
    found = set(files.names(folder))
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; a store is a folder")
    other = sorted(name for name in found - {lock.NAME, lock.CLAIM} if not PARTIAL.fullmatch(name))
    if MANIFEST not in found and other:
        raise InputError(f"{folder}: holds {other[0]} and no {MANIFEST}, so it is not a store; name another folder")


def refuse_other_model(folder: Path, settings: Settings, fingerprint: str, name: str) -> None:
    """Checks that a model has the fingerprint of the one that made a store; `name` is for messages.

    Raises:
      InputError: It has another fingerprint.
    """
    if fingerprint != settings.fingerprint:
        raise InputError(
            f"{folder}: made by {settings.model} (fingerprint {settings.fingerprint}), and {name} has other weights; "
            "their vectors cannot be compared: name that model, or index the corpus again"
        )


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest; None if there is none.

    Raises:
      InputError: It is damaged or from a later version.
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
        if checksum is not None and checksum != _checksum(content):
            raise ValueError("differs from its checksum")
        return Manifest(Settings(**content["settings"]), [_part(**part) for part in content["parts"]])
    except InputError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged ({error!r}); put it back from a copy, or make the store again") from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replaces the manifest atomically."""
    content = {"format": FORMAT, **dataclasses.asdict(manifest)}
    content["sha256"] = _checksum(content)
    files.write_text(folder / MANIFEST, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _part(files: list[dict[str, Any]], shards: list[dict[str, Any]], **rest: Any) -> Part:
    return Part(files=[CorpusFile(**file) for file in files], shards=[Shard(**shard) for shard in shards], **rest)


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
