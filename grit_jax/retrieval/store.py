"""A finished store, for reading: its vectors, documents, and keys and values."""

from __future__ import annotations

import functools
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import safetensors

from grit_jax import files
from grit_jax.errors import InputError
from grit_jax.model.transformer import KVCache
from grit_jax.retrieval import kv_file, store_files
from grit_jax.retrieval.documents import Document
from grit_jax.retrieval.manifest import MANIFEST, DamagedError, read_manifest, refuse_bucket
from grit_jax.retrieval.store_files import data_file


class ShardedRows:
    """A tensor of all shards as one array [rows, ...]; slicing reads from disk."""

    def __init__(self, paths: Sequence[Path], ends: np.ndarray, name: str):
        self._paths, self._ends, self._name = paths, ends, name
        with safetensors.safe_open(paths[0], "np") as file:
            one = file.get_slice(name)[:1]
        self.shape, self.dtype = (int(ends[-1]), *one.shape[1:]), one.dtype

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        pieces = [np.zeros((0, *self.shape[1:]), self.dtype)]
        for index in range(int(np.searchsorted(self._ends, start, side="right")), len(self._paths)):
            first, end = int(self._ends[index - 1]) if index else 0, int(self._ends[index])
            if first >= stop:
                break
            with safetensors.safe_open(self._paths[index], "np") as file:
                pieces.append(file.get_slice(self._name)[max(0, start - first) : min(stop, end) - first])
        return np.concatenate(pieces)


class Store:
    """A finished store, for reading.

    Attributes:
      folder: The store's folder.
      settings: How its vectors were made.
      vectors: [rows, embed] in the dtype of the settings.
      scales: float32 [rows] for int8, else None.

    Raises:
      InputError: There is no store, it is unfinished, or a file is missing or damaged.
    """

    def __init__(self, folder: str | Path):
        refuse_bucket(folder)
        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        if manifest is None:
            raise InputError(f"{folder}: no {MANIFEST}, so it is not a store; make one with grit-jax index")
        if not manifest.shards:
            raise InputError(f"{folder}: holds no documents; name a corpus to grit-jax index")
        if manifest.unfinished:
            raise InputError(
                f"{folder}: {len(manifest.unfinished)} of {len(manifest.shards)} shards have no vectors yet; run the "
                "same grit-jax index again to resume"
            )
        self.settings, self._manifest = manifest.settings, manifest
        self._verify(caches=False)
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
        shard, index = self._locate(row)
        path = data_file(self.folder, "documents", shard)
        with _reading(path, row):
            with safetensors.safe_open(data_file(self.folder, "vectors", shard), "np") as file:
                ends = file.get_slice(store_files.DOCUMENT_ENDS)[max(0, index - 1) : index + 1].tolist()
            begin = ends[0] if index else 0
            with files.open_binary(path) as file:
                file.seek(begin)
                return store_files.document_of_line(file.read(ends[-1] - begin))

    def documents(self) -> Iterator[Document]:
        """All documents, row by row."""
        for index, shard in enumerate(self._manifest.shards):
            yield from store_files.read_documents(self.folder, index, shard)

    @functools.cached_property
    def duplicates(self) -> dict[int, list[str]]:
        """Ids of documents that repeat the text of a row, by row."""
        found: dict[int, list[str]] = {}
        for name, row in store_files.read_duplicates(self.folder, self._manifest):
            found.setdefault(row, []).append(name)
        return found

    def check_caches(self) -> None:
        """Compares the files of keys and values with their checksums, which opening a store does not do.

        Raises:
          InputError: The store has none, or a file is missing or damaged.
        """
        if not self.settings.caches:
            raise InputError(
                f"{self.folder}: made without keys and values; index the corpus into another folder with --caches, or "
                "choose a method that needs none"
            )
        self._verify(caches=True)

    def cache(self, row: int) -> KVCache:
        """Keys and values of a row's document, float32 [layers, tokens, kv_heads, head_dim]; see `check_caches`.

        Raises:
          DamagedError: They cannot be read.
        """
        path, index = self._locate_cache(row)
        with _reading(path, row):
            return kv_file.read(path, index)

    def cache_length(self, row: int) -> int:
        """Number of tokens in `cache`; errors as there."""
        path, index = self._locate_cache(row)
        with _reading(path, row):
            return kv_file.length(path, index)

    def _locate(self, row: int) -> tuple[int, int]:
        """The index of a row's shard, and the row's index in it."""
        shard = int(np.searchsorted(self._ends, row, side="right"))
        return shard, row - (int(self._ends[shard - 1]) if shard else 0)

    def _locate_cache(self, row: int) -> tuple[Path, int]:
        shard, index = self._locate(row)
        return data_file(self.folder, "caches", shard), index

    def _rows(self, tensor: str) -> ShardedRows:
        paths = [data_file(self.folder, "vectors", index) for index in range(len(self._manifest.shards))]
        return ShardedRows(paths, self._ends, tensor)

    def _verify(self, *, caches: bool) -> None:
        """Compares either the files of keys and values or all others with their checksums."""
        named = store_files.data_files(self.folder, self._manifest)
        store_files.verify({path: sha for path, sha in named.items() if path.name.startswith("caches") == caches})


@contextmanager
def _reading(path: Path, row: int) -> Generator[None]:
    """Turns any error that a reader raises on damaged bytes into a `DamagedError`."""
    try:
        yield
    except Exception as error:
        raise DamagedError(
            f"{path}: row {row} cannot be read: {error!r}; put the file back from a copy, or make the store again"
        ) from error
