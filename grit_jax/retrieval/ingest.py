"""Makes a store from a corpus, and adds to it.

Documents are first distributed over shards; each shard is then embedded by itself. So the bits of a vector depend on
the devices of one process, but neither on interruptions nor on the number of processes.
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
from grit_jax.retrieval import kv_file, store_files
from grit_jax.retrieval.documents import Document, read_corpus, text_key
from grit_jax.retrieval.manifest import (
    MANIFEST,
    CorpusFile,
    Manifest,
    Part,
    Settings,
    Shard,
    read_manifest,
    refuse_bucket,
    refuse_other_folder,
    refuse_other_model,
    write_manifest,
)
from grit_jax.retrieval.quantization import Dtype, pack
from grit_jax.text.prompts import CacheForm, stripped


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Settings that a user chooses; None takes the store's setting, or the default for a new store.

    Attributes:
      dtype: Dtype of the vectors; float32 by default.
      instruction: The documents' instruction; empty by default.
      max_length: Most tokens of a document; the model's limit by default.
      caches: Dtype of the keys and values to keep, from the same pass as the vectors; none by default.
      cache_form: How documents begin there; `first` by default.
    """

    dtype: Dtype | None = None
    instruction: str | None = None
    max_length: int | None = None
    caches: Dtype | None = None
    cache_form: CacheForm | None = None


@contextmanager
def sole_indexer(folder: str | Path) -> Generator[SoleWriter]:
    """Locks a store, or a new folder for one.

    Raises:
      InputError: Another writer is alive, or the folder holds other files, is in a bucket or cannot be written.
    """
    refuse_bucket(folder)
    in_first_process(lambda: refuse_other_folder(Path(folder)))
    try:
        with sole_writer(folder) as writer:
            yield writer
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error}); finished parts are kept; run it again") from error


def add_documents(
    folder: Path,
    corpus: Sequence[epath.Path],
    model: GritModel,
    wanted: Wanted,
    *,
    name: str,
    shard_rows: int,
    writer: SoleWriter,
    progress: Callable[[int], None] = lambda _: None,
) -> Manifest:
    """Writes the documents that a store lacks into new shards, without vectors yet.

    Process 0 does this, and finds the vectors that an interrupted call made; the others wait.

    Args:
      folder: The locked store.
      corpus: Files from `find_corpus`; files with known content are not read again.
      model: The model that will embed them.
      wanted: Settings.
      name: The model's name.
      shard_rows: Documents of a new shard.
      writer: From `sole_indexer`.
      progress: Called with numbers of documents.

    Raises:
      InputError: The store has another model or other settings, a line is malformed, an id has two texts, or the
        processes have different models.
    """

    def add() -> None:
        manifest = read_manifest(folder)
        old = manifest.settings if manifest and manifest.parts else None
        settings = _settings(model, name, wanted, old)
        if old is not None:
            _refuse_other_settings(folder, old, settings)
            settings = old
        manifest = Manifest(settings, manifest.parts if manifest else [])
        writer.confirm()
        write_manifest(folder, manifest)  # from now on, all files there belong to the store
        store_files.remove_unnamed(folder, manifest)
        manifest = store_files.with_finished(folder, manifest)
        if part := _new_part(folder, manifest, corpus, shard_rows, progress):
            manifest = dataclasses.replace(manifest, parts=[*manifest.parts, part])
        writer.confirm()
        write_manifest(folder, manifest)

    require_same({"the model": model.fingerprint(rounded=True)})
    in_first_process(add)
    return _read_by_all(folder)


def add_vectors(
    folder: Path, model: GritModel, *, writer: SoleWriter, progress: Callable[[int], None] = lambda _: None
) -> Manifest:
    """Computes the vectors that a store lacks: each process a share of them; process 0 updates the manifest.

    Args:
      folder: The locked store, after `add_documents`.
      model: Its model, on this process's own devices.
      writer: From `sole_indexer`.
      progress: Called with the number of documents that this process has embedded since the last call.

    Raises:
      InputError: The model's vectors are not finite, or the processes do not share the folder.
    """
    manifest = _read_by_all(folder)
    settings = manifest.settings
    for index in _own_shards(manifest):
        writer.check()
        shard = manifest.shards[index]
        texts = [document.embedded for document in store_files.read_documents(folder, index, shard)]
        if settings.caches:
            path = store_files.data_file(folder, "caches", index)
            encoded = _encode_with_caches(path, settings.caches, model, texts, settings, progress)
        else:
            encoded = model.encode_with_counts(
                texts, instruction=settings.instruction, max_length=settings.max_length, progress=progress
            )
        shard = dataclasses.replace(shard, tokens=encoded.num_tokens, truncated=encoded.num_truncated)
        writer.confirm()
        store_files.write_vectors(folder, index, shard, pack(encoded.vectors, settings.dtype))
    wait_for_all()

    def finish() -> None:
        finished = store_files.with_finished(folder, manifest)
        if finished.unfinished:
            path = store_files.data_file(folder, "vectors", finished.unfinished[0])
            raise InputError(
                f"{path}: another process made it and the first cannot see it; put the store on a shared disk"
            )
        writer.confirm()
        write_manifest(folder, finished)

    in_first_process(finish)
    return _read_by_all(folder)


def _encode_with_caches(
    path: Path, dtype: Dtype, model: GritModel, texts: list[str], settings: Settings, progress: Callable[[int], None]
) -> Encoded:
    """Embeds the documents of a shard and writes the file of their keys and values."""
    limit = settings.max_length
    prompts = model.embedding_prompts(
        texts, instruction=settings.instruction, max_length=limit, form=settings.cache_form
    )
    cut = [prompt.cut(limit) for prompt in prompts]
    vectors, lengths = np.zeros((len(texts), settings.embed_dim), np.float32), [len(prompt.tokens) for prompt in cut]
    with kv_file.writing(path, lengths, model.architecture, dtype) as write:
        for index, cached in model.embed_with_caches(cut):
            vectors[index] = cached.vector
            write(index, cached.cache)
            progress(1)
    refuse_not_finite(vectors)
    return Encoded(vectors, sum(lengths), sum(len(prompt.tokens) > limit for prompt in prompts))


def own_rows(manifest: Manifest) -> int:
    """Number of vectors that this process computes."""
    return sum(manifest.shards[index].rows for index in _own_shards(manifest))


def _own_shards(manifest: Manifest) -> list[int]:
    return manifest.unfinished[jax.process_index() :: jax.process_count()]


def _read_by_all(folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    if manifest is None:
        raise InputError(
            f"{folder / MANIFEST}: the first process wrote it and process {jax.process_index()} cannot see it; put the "
            "store on a shared disk"
        )
    return manifest


def _settings(model: GritModel, name: str, wanted: Wanted, old: Settings | None) -> Settings:
    """The wanted settings, completed by the store's or by the defaults of a new one."""
    defaults: dict[str, Any] = dataclasses.asdict(old or Wanted("float32", "", None, None, "first"))
    asked = dataclasses.asdict(wanted)
    chosen = {key: defaults[key] if value is None else value for key, value in asked.items()}
    if wanted.cache_form and not chosen["caches"]:
        raise InputError(f"--cache-form={wanted.cache_form} needs keys and values, which are not kept; add --caches")
    limit = model.architecture.max_length
    chosen["instruction"] = stripped(chosen["instruction"])
    chosen["max_length"] = min(chosen["max_length"] or limit, limit)
    # Embedding one text checks that the instruction leaves room before anything is written.
    one = model.encode(["text"], instruction=chosen["instruction"], max_length=chosen["max_length"])
    return Settings(name, model.fingerprint(rounded=True), one.shape[1], **chosen)


def _refuse_other_settings(folder: Path, old: Settings, new: Settings) -> None:
    refuse_other_model(folder, old, new.fingerprint, new.model)
    for field in dataclasses.fields(Wanted):
        made, asked = getattr(old, field.name), getattr(new, field.name)
        if made != asked:
            option = f"--{field.name.replace('_', '-')}"
            with_it = f"without {option}" if made is None else f"with {option} {made!r}"
            raise InputError(
                f"{folder}: made {with_it}, not {asked!r}; leave {option} out, or name another folder for another store"
            )


def _new_part(
    folder: Path, manifest: Manifest, corpus: Sequence[epath.Path], shard_rows: int, progress: Callable[[int], None]
) -> Part | None:
    """Reads the files with new content and writes their documents; None if no file has any."""
    known = {file.sha256 for part in manifest.parts for file in part.files}
    new: dict[str, epath.Path] = {}
    versions: dict[epath.Path, derived.Version] = {}
    for path in corpus:
        version = derived.version(path)
        checksum = store_files.checksum(path)
        if checksum not in known and checksum not in new:
            new[checksum], versions[path] = path, version
    if not new:
        return None
    reader = _Reader(folder, manifest, progress)
    documents, first, shards = reader.new_documents(new.values()), len(manifest.shards), []
    while some := list(itertools.islice(documents, shard_rows)):
        shards.append(Shard(len(some), store_files.write_documents(folder, first + len(shards), some)))
    for path, version in versions.items():  # or the checksum could belong to other content
        derived.refuse_changed(path, version)
    if not manifest.shards and not shards:
        raise InputError(f"{', '.join(map(str, new.values()))}: no document with a text; name a corpus that has some")
    duplicates = (
        store_files.write_duplicates(folder, len(manifest.parts), reader.duplicates) if reader.duplicates else None
    )
    corpus_files = [CorpusFile(str(path), checksum) for checksum, path in new.items()]
    return Part(corpus_files, reader.num_documents, reader.num_empty, reader.num_repeated, duplicates, shards)


class _Reader:
    """Reads corpus files and yields the documents that a store lacks.

    Attributes:
      num_documents: Documents read.
      num_empty: Documents without text.
      num_repeated: Documents whose text a row already has.
      duplicates: New ids of repeated documents, each with the row of its text.
    """

    def __init__(self, folder: Path, manifest: Manifest, progress: Callable[[int], None]):
        self._progress = progress
        self._rows_by_id: dict[str, int] = {}
        self._rows_by_text: dict[bytes, int] = {}
        for index, shard in enumerate(manifest.shards):
            for document in store_files.read_documents(folder, index, shard):
                self._add(document, text_key(document))
        self._rows_by_id |= dict(store_files.read_duplicates(folder, manifest))
        self.num_documents = self.num_empty = self.num_repeated = 0
        self.duplicates: list[tuple[str, int]] = []

    def new_documents(self, paths: Iterable[epath.Path]) -> Iterator[Document]:
        """The documents that become rows."""
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
