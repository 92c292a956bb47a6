"""Makes a store from a corpus, and makes it grow.

First the documents are dealt into shards, then each shard is embedded by itself. So what a vector is rounded to depends
neither on where the work was interrupted nor on how many processes share it, only on what a process has for devices.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from grit_jax.data import derived
from grit_jax.errors import InputError
from grit_jax.inference.embedder import Encoded, refuse_not_finite
from grit_jax.inference.model import GritModel
from grit_jax.parallel.distributed import in_first_process, require_same, wait_for_all
from grit_jax.parallel.sole_writer import SoleWriter, sole_writer
from grit_jax.retrieval import caches, layout
from grit_jax.retrieval.corpus import read_corpus, text_key
from grit_jax.retrieval.layout import CorpusFile, Document, Manifest, Part, Settings, Shard
from grit_jax.retrieval.vectors import Dtype, pack
from grit_jax.text.prompts import CacheForm, stripped

_ALONE = SoleWriter()  # of a folder that nobody else knows


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Settings that are asked for; None takes the store's, or for a new one float32, no instruction, the model's limit.

    Of a store that keeps keys and values the vectors are from the same pass.

    Attributes:
      dtype: Type of the vectors.
      instruction: What the model is told about the documents.
      max_length: Tokens read of a document.
      caches: Type that keys and values are kept in; a new store keeps none.
      cache_form: How documents begin there; a new store's are `first`.
    """

    dtype: Dtype | None = None
    instruction: str | None = None
    max_length: int | None = None
    caches: Dtype | None = None
    cache_form: CacheForm | None = None


@contextmanager
def sole_indexer(folder: str | Path) -> Generator[SoleWriter]:
    """Holds a store, or a new folder for one, against other writers.

    Raises:
      InputError: Another writer lives, or the folder holds other things, is in a bucket or cannot be written.
    """
    layout.refuse_bucket(folder)
    in_first_process(lambda: layout.refuse_other_folder(Path(folder)))
    try:
        with sole_writer(folder) as writer:
            yield writer
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error}); what is finished is kept, run it again") from error


def add_documents(
    folder: Path,
    corpus: Sequence[epath.Path],
    model: GritModel,
    wanted: Wanted,
    *,
    name: str,
    shard_rows: int,
    writer: SoleWriter = _ALONE,
    progress: Callable[[int], None] = lambda _: None,
) -> Manifest:
    """Deals the documents that a store does not have into new shards, whose vectors are not made yet.

    Process 0 does that, and finds the vectors that an interrupted call has made; the others wait for it.

    Args:
      folder: The store, which is held.
      corpus: Files from `find_corpus`; those whose content has been read are not read again.
      model: What will embed them.
      wanted: Settings.
      name: What the model is called.
      shard_rows: Documents of a new shard.
      writer: Who holds it.
      progress: Called with numbers of documents.

    Raises:
      InputError: The store is another model's or has other settings, a row is malformed, an id has two texts, or the
        processes have different models.
    """

    def add() -> None:
        manifest = layout.read_manifest(folder)
        old = manifest.settings if manifest and manifest.parts else None
        settings = _settings(model, name, wanted, old)
        if old is not None:
            _refuse_other_settings(folder, old, settings)
            settings = old
        manifest = Manifest(settings, manifest.parts if manifest else [])
        writer.confirm()
        layout.write_manifest(folder, manifest)  # from now on, what lies there is the store's
        layout.remove_unnamed(folder, manifest)
        manifest = layout.with_finished(folder, manifest)
        if part := _new_part(folder, manifest, corpus, shard_rows, progress):
            manifest = dataclasses.replace(manifest, parts=[*manifest.parts, part])
        writer.confirm()
        layout.write_manifest(folder, manifest)

    require_same({"the model": model.fingerprint(rounded=True)})
    in_first_process(add)
    return _read_by_all(folder)


def add_vectors(
    folder: Path,
    model: GritModel,
    *,
    writer: SoleWriter = _ALONE,
    progress: Callable[[int], None] = lambda _: None,
) -> Manifest:
    """Makes the vectors that a store lacks; every process a share of them, process 0 writes down that they are there.

    Args:
      folder: The store, which is held, with `add_documents` done.
      model: Its model, on this process's own devices.
      writer: Who holds it.
      progress: Called with numbers of documents that this process has embedded.

    Raises:
      InputError: The model's vectors are not finite, or the processes do not share the folder.
    """
    manifest = _read_by_all(folder)
    for number in _own_shards(manifest):
        writer.check()
        shard = manifest.shards[number]
        texts = [document.embedded for document in layout.read_documents(folder, number, shard)]
        settings = manifest.settings
        if settings.caches:
            path = layout.data_file(folder, "caches", number)
            encoded = _encode_with_caches(path, settings.caches, model, texts, settings, progress)
        else:
            encoded = model.encode_with_counts(
                texts, instruction=settings.instruction, max_length=settings.max_length, progress=progress
            )
        shard = dataclasses.replace(shard, tokens=encoded.num_tokens, truncated=encoded.num_truncated)
        writer.confirm()
        layout.write_vectors(folder, number, shard, pack(encoded.vectors, settings.dtype))
    wait_for_all()

    def finish() -> None:
        finished = layout.with_finished(folder, manifest)
        if finished.unfinished:
            path = layout.data_file(folder, "vectors", finished.unfinished[0])
            raise InputError(
                f"{path}: made by another process and not seen by the first; put the store on a shared disk"
            )
        writer.confirm()
        layout.write_manifest(folder, finished)

    in_first_process(finish)
    return _read_by_all(folder)


def _encode_with_caches(
    path: Path, dtype: Dtype, model: GritModel, texts: list[str], settings: Settings, progress: Callable[[int], None]
) -> Encoded:
    """Embeds the documents of a shard and writes the file of their keys and values."""
    limit = settings.max_length
    read = model.embedding_prompts(texts, instruction=settings.instruction, max_length=limit, form=settings.cache_form)
    kept = [prompt.cut(limit) for prompt in read]
    vectors, lengths = np.zeros((len(texts), settings.embed_dim), np.float32), [len(text.tokens) for text in kept]
    with caches.writing(path, lengths, model.architecture, dtype) as write:
        for place, cached in model.embed_with_caches(kept):
            vectors[place] = cached.vector
            write(place, cached.cache)
            progress(1)
    refuse_not_finite(vectors)
    return Encoded(vectors, sum(lengths), sum(len(prompt.tokens) > limit for prompt in read))


def own_rows(manifest: Manifest) -> int:
    """How many vectors this process makes."""
    return sum(manifest.shards[number].rows for number in _own_shards(manifest))


def _own_shards(manifest: Manifest) -> list[int]:
    return manifest.unfinished[jax.process_index() :: jax.process_count()]


def _read_by_all(folder: Path) -> Manifest:
    manifest = layout.read_manifest(folder)
    if manifest is None:
        raise InputError(f"{folder / layout.MANIFEST}: written by the first process, not seen by process "
                         f"{jax.process_index()}; put the store on a shared disk")  # fmt: skip
    return manifest


def _settings(model: GritModel, name: str, wanted: Wanted, old: Settings | None) -> Settings:
    """What a store is made with now: what is wanted, what it was made with, or what a new one has."""
    defaults: dict[str, Any] = dataclasses.asdict(old or Wanted("float32", "", None, None, "first"))
    asked = dataclasses.asdict(wanted)
    chosen = {key: defaults[key] if value is None else value for key, value in asked.items()}
    if wanted.cache_form and not chosen["caches"]:
        raise InputError(f"--cache-form={wanted.cache_form} is about keys and values, which are not kept; add --caches")
    limit = model.architecture.max_length
    chosen["instruction"] = stripped(chosen["instruction"])
    chosen["max_length"] = min(chosen["max_length"] or limit, limit)
    # One text says whether the instruction leaves room, before anything is written.
    one = model.encode(["text"], instruction=chosen["instruction"], max_length=chosen["max_length"])
    return Settings(name, model.fingerprint(rounded=True), one.shape[1], **chosen)


def _refuse_other_settings(folder: Path, old: Settings, new: Settings) -> None:
    if old.fingerprint != new.fingerprint:
        raise InputError(layout.other_model(folder, old, new.model))
    for key in ("dtype", "instruction", "max_length", "caches", "cache_form"):
        if getattr(old, key) != getattr(new, key):
            option, made = f"--{key.replace('_', '-')}", getattr(old, key)
            with_it = f"without {option}" if made is None else f"with {option} {made!r}"
            raise InputError(
                f"{folder}: made {with_it}, not {getattr(new, key)!r}; leave {option} out, or name another folder for "
                "another store"
            )


def _new_part(
    folder: Path, manifest: Manifest, corpus: Sequence[epath.Path], shard_rows: int, progress: Callable[[int], None]
) -> Part | None:
    """Reads the files that have not been read and writes their documents; None where there is no such file."""
    read = {file.sha256 for part in manifest.parts for file in part.files}
    new: dict[str, epath.Path] = {}
    versions: dict[epath.Path, derived.Version] = {}
    for path in corpus:
        version = derived.version(path)
        checksum = layout.checksum(path)
        if checksum not in read and checksum not in new:
            new[checksum], versions[path] = path, version
    if not new:
        return None
    reader = _Reader(folder, manifest, progress)
    documents, first, shards = reader.new_documents(new.values()), len(manifest.shards), []
    while some := list(itertools.islice(documents, shard_rows)):
        shards.append(Shard(len(some), layout.write_documents(folder, first + len(shards), some)))
    for path, version in versions.items():  # else the checksum would be of another text
        derived.refuse_changed(path, version)
    if not manifest.shards and not shards:
        raise InputError(f"{', '.join(map(str, new.values()))}: no document with a text; name a corpus that has some")
    return Part(
        [CorpusFile(str(path), checksum) for checksum, path in new.items()],
        reader.num_documents,
        reader.num_empty,
        reader.num_repeated,
        layout.write_duplicates(folder, len(manifest.parts), reader.duplicates) if reader.duplicates else None,
        shards,
    )


class _Reader:
    """Tells the documents that a store does not have from those that it has.

    Attributes:
      num_documents: Documents read.
      num_empty: Those without a text.
      num_repeated: Those whose text is a row already.
      duplicates: Ids of these and the rows, where the id is new.
    """

    def __init__(self, folder: Path, manifest: Manifest, progress: Callable[[int], None]):
        self._progress = progress
        self._rows_by_id: dict[str, int] = {}
        self._rows_by_text: dict[bytes, int] = {}
        for number, shard in enumerate(manifest.shards):
            for document in layout.read_documents(folder, number, shard):
                self._add(document, text_key(document))
        self._rows_by_id |= dict(layout.read_duplicates(folder, manifest))
        self.num_documents = self.num_empty = self.num_repeated = 0
        self.duplicates: list[tuple[str, int]] = []

    def new_documents(self, paths: Iterable[epath.Path]) -> Iterator[Document]:
        """The documents of files that become rows."""
        for path in paths:
            for where, document in read_corpus(path):
                self.num_documents += 1
                self._progress(1)
                if document.embedded:
                    if self._is_new(document, where):
                        yield document
                else:
                    self.num_empty += 1

    def _is_new(self, document: Document, where: str) -> bool:
        key = text_key(document)
        row, row_of_id = self._rows_by_text.get(key), self._rows_by_id.get(document.id)
        if row_of_id is not None and row_of_id != row:
            raise InputError(f"{where}: '_id' {document.id!r} is another text's already; give each text its own id")
        if row is None:
            self._add(document, key)
            return True
        self.num_repeated += 1
        if row_of_id is None and document.id != key.hex():
            self._rows_by_id[document.id] = row
            self.duplicates.append((document.id, row))
        return False

    def _add(self, document: Document, key: bytes) -> None:
        self._rows_by_id[document.id] = self._rows_by_text[key] = len(self._rows_by_text)
