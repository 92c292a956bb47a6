"""Token counts of every text of a file, made once per file and tokenizer."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from etils import epath

from grit_jax import files
from grit_jax.config import InputError
from grit_jax.data import cache
from grit_jax.data.counting import SHARD, BadRecords, Shard, ShardCounts, add_bad, count_shards, read_shard
from grit_jax.data.records import Stream
from grit_jax.data.sources import Source
from grit_jax.tokenizer import Tokenizer

_TRIES = 3
_log = logging.getLogger(__name__)
_FORMAT = 4  # raised when what is stored, or how prompts are formatted, changes


class Fingerprint(NamedTuple):
    """What a file holds, in short.

    Attributes:
      texts: Equal for files with the same formatted texts in the same order, tokenized in the same way.
      structure: Equal where the texts also have the same roles (query, positive, negative), make the same records, and
        are pooled or scored at the same tokens.
    """

    texts: str
    structure: str


@dataclasses.dataclass(frozen=True)
class FileIndex:
    """What the schedule needs to know of a file.

    The arrays are memory-mapped where they come from `build_indexes`.

    Attributes:
      path: The file.
      stream: Its stream.
      text_starts: int64 [records + 1]; texts of record r are `text_starts[r]:text_starts[r + 1]`: query, positives,
        negatives; or one conversation.
      num_positives: int32 [records]; 0 for a conversation.
      lengths: int32 [texts]; tokens of the formatted text, untruncated.
      hashes: int64 [texts]; of the formatted text.
      span_starts: int64 [texts + 1]; spans of text t are `span_starts[t]:span_starts[t + 1]`.
      spans: int32 [spans, 2]; token ranges that are pooled or scored.
      numbers: int64 [records]; the records' numbers in the file, where malformed ones lie between them; else None.
      bad: The malformed records, which are no records here.
      folder: Where the arrays are mapped from; None for arrays in memory.
    """

    path: os.PathLike[str]
    stream: Stream
    text_starts: np.ndarray
    num_positives: np.ndarray
    lengths: np.ndarray
    hashes: np.ndarray
    span_starts: np.ndarray
    spans: np.ndarray
    numbers: np.ndarray | None = None
    bad: tuple[BadRecords, ...] = ()
    folder: Path | None = None

    def __reduce__(self):
        if self.folder:  # a mapped array would be sent as a copy
            return _mapped, (self.path, self.folder, _read_meta(self.folder))
        return FileIndex, tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    @property
    def name(self) -> str:
        """The file's name, by which settings name it."""
        return Path(self.path).name

    @property
    def num_records(self) -> int:
        """Well-formed records in the file."""
        return len(self.num_positives)

    def number(self, record: int) -> int:
        """Number in the file of a record."""
        return record if self.numbers is None else int(self.numbers[record])

    @functools.cached_property
    def fingerprint(self) -> Fingerprint:
        """What the file holds, in short."""
        if self.folder:
            return Fingerprint(*_read_meta(self.folder)["fingerprint"])
        digests = _Digests()
        # Those that start each record's and each text's part have a 0 before all others.
        digests.update(
            {
                name: getattr(self, name)[1:] if name in _STARTS else getattr(self, name)
                for name in (*_TEXT_ARRAYS, *_STRUCTURE_ARRAYS)
            }
        )
        return digests.fingerprint()


# Arrays that are stored, with type and shape of a row.
_ARRAYS: dict[str, tuple[type, tuple[int, ...]]] = {
    "text_starts": (np.int64, ()),
    "num_positives": (np.int32, ()),
    "lengths": (np.int32, ()),
    "hashes": (np.int64, ()),
    "span_starts": (np.int64, ()),
    "spans": (np.int32, (2,)),
    "numbers": (np.int64, ()),  # only where there are malformed records
}
_META = "meta.json"
_STARTS = ("text_starts", "span_starts")  # arrays with one more row than there are records or texts
# What `Fingerprint` is made of.
_TEXT_ARRAYS = ("hashes", "lengths")
_STRUCTURE_ARRAYS = ("text_starts", "num_positives", "span_starts", "spans")


def num_targets(index: FileIndex, limits: int | np.ndarray, texts: slice | np.ndarray = slice(None)) -> np.ndarray:
    """int32 [texts]: span tokens left when texts are cut.

    A generative token is scored from the one before it, so the first token of a conversation never counts.

    Args:
      index: Of the file.
      limits: Tokens that are kept, of all texts or of each.
      texts: Which texts; all of them without.
    """
    if isinstance(texts, slice):
        first, last, _ = texts.indices(len(index.lengths))
        bounds = np.asarray(index.span_starts[first : last + 1])
        counts, spans = np.diff(bounds), np.asarray(index.spans[bounds[0] : bounds[-1]])
    else:
        starts = np.asarray(index.span_starts[texts])
        counts = np.asarray(index.span_starts[texts + 1]) - starts
        spans = np.asarray(index.spans[ranges(starts, counts)])
    begin = 1 if index.stream == "generative" else 0
    most = np.repeat(np.broadcast_to(limits, counts.shape), counts)
    kept = np.maximum(np.minimum(spans[:, 1], most), begin) - np.maximum(np.minimum(spans[:, 0], most), begin)
    sums = np.concatenate([[0], np.cumsum(kept)])
    ends = np.cumsum(counts)
    return (sums[ends] - sums[ends - counts]).astype(np.int32)


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """int64 [sum of counts]: `starts[i]`, `starts[i] + 1`, ... `counts[i]` times, for one i after the other."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - counts), counts)


def build_index(source: Source, tokenizer: Tokenizer, *, skip_bad: bool = False) -> FileIndex:
    """The index of one file; see `build_indexes`."""
    return build_indexes([source], tokenizer, skip_bad=skip_bad)[0]


def build_indexes(sources: Sequence[Source], tokenizer: Tokenizer, *, skip_bad: bool = False) -> list[FileIndex]:
    """Counts the files' tokens, or reads the counts of an earlier call with the same files and tokenizer.

    Counts are written in shards as they are made, so an interrupted call goes on where it was, and to `.grit_index/`
    beside the file, so hosts that see the same folder or bucket share them. Where that is read-only they go under the
    user's cache folder; so do, always, the arrays that are mapped for a file in a bucket.

    Args:
      sources: The files.
      tokenizer: The model's.
      skip_bad: Whether malformed records are left out and counted.

    Raises:
      InputError: A record is malformed and `skip_bad` is false, or the counts can be written nowhere.
    """
    stores = [_Store(source, tokenizer) for source in sources]
    for _ in range(_TRIES):
        missing = [store for store in stores if store.index is None]
        if not missing:
            break
        shards = [shard for number, store in enumerate(stores) if store.index is None for shard in store.shards(number)]
        count_shards(shards, sources, tokenizer, skip_bad=skip_bad)
        for store in missing:
            store.merge()  # stays None where a shard is damaged or another host has just removed it
    indexes = []
    for source, store in zip(sources, stores, strict=True):
        if store.index is None:
            raise InputError(
                f"{source.path}: its token counts were written but cannot be read; look at {cache.FOLDER} beside it"
            )
        indexes.append(store.index)
    for index in indexes:
        if index.bad and not skip_bad:
            raise InputError(f"{index.bad[0].examples[0]} (data.skip_bad=true leaves such records out and counts them)")
    return indexes


class _Store:
    """Where the index of one file is kept.

    Attributes:
      index: The index, once it is there.
    """

    def __init__(self, source: Source, tokenizer: Tokenizer):
        self._source, path = source, source.path
        self._name = cache.entry(path, source.version, tokenizer.fingerprint, _FORMAT)
        self._folders = cache.local_folders(path)
        self._shard_folder: epath.Path | None = None
        self.index = self._load()

    def _load(self) -> FileIndex | None:
        for folder in self._folders:
            try:
                return _open(self._source.path, folder / self._name)
            except FileNotFoundError:
                continue
            except (OSError, ValueError, KeyError, TypeError) as error:
                _log.warning("%s: damaged (%s); its texts are counted again", folder / self._name, error)
        return None

    def shards(self, number: int) -> list[Shard]:
        """The parts in which the file is counted; `number` is the source's."""
        if self._shard_folder is None:
            beside = self._source.path.parent / cache.FOLDER
            folder = next((f for f in (beside, *map(epath.Path, self._folders)) if cache.can_write(f)), None)
            if folder is None:
                raise InputError(
                    f"{self._source.path}: neither {beside} nor {self._folders[-1]} can be written to; "
                    "set XDG_CACHE_HOME to a folder that can"
                )
            self._shard_folder = folder / f"{self._name}.shards"
        size = len(self._source)
        return [
            Shard(number, start, min(start + SHARD, size), self._shard_folder / f"{start:012d}.npz")
            for start in range(0, size, SHARD)
        ]

    def merge(self) -> None:
        """Joins the shards into arrays that can be mapped."""
        self.index = self._load()  # another host's
        paths = [shard.path for shard in self.shards(0)]
        for folder in self._folders:
            if self.index:
                break
            try:
                if not _merge(paths, self._source, folder / self._name):
                    return
            except OSError:
                if folder == self._folders[-1]:
                    raise
            self.index = self._load()
        if self.index and not files.is_bucket(paths[0]):  # a bucket's shards are for hosts that are still to come
            shutil.rmtree(paths[0].parent, ignore_errors=True)


def _open(path: os.PathLike[str], folder: Path) -> FileIndex:
    """The index that is kept in a folder.

    Raises:
      OSError: It is missing or cannot be read.
      ValueError: It is damaged.
      KeyError: The same.
    """
    meta = _read_meta(folder)
    for name, expected in meta["sha256"].items():
        if files.sha256(folder / name) != expected:
            raise ValueError(f"{name} differs from its checksum")
    return _mapped(path, folder, meta)


def _read_meta(folder: Path) -> dict[str, Any]:
    meta, checksum = json.loads((folder / _META).read_text())
    if _checksum(meta) != checksum:
        raise ValueError(f"{_META} differs from its checksum")
    return meta


def _checksum(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta).encode()).hexdigest()


def _mapped(path: os.PathLike[str], folder: Path, meta: dict[str, Any]) -> FileIndex:
    stored = [name for name in _ARRAYS if meta["bad"] or name != "numbers"]
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in stored}
    bad = tuple(BadRecords(kind, count, tuple(examples)) for kind, count, examples in meta["bad"])
    return FileIndex(path, meta["stream"], **arrays, bad=bad, folder=folder)


def _merge(paths: Sequence[epath.Path], source: Source, folder: Path) -> bool:
    """Writes the arrays of all shards to a folder, which appears as a whole; False where a shard is missing."""
    sizes = dict.fromkeys(_ARRAYS, 0)
    bad: dict[str, BadRecords] = {}
    for counts in map(read_shard, paths):
        if counts is None:
            return False
        add_bad(bad, counts.bad_records())
        for name, array in _columns(counts, sizes).items():
            sizes[name] += len(array)
    stored = [name for name in _ARRAYS if bad or name != "numbers"]
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir(parents=True)
    try:
        digests = _Digests()
        with contextlib.ExitStack() as stack:
            written: dict[str, IO[bytes]] = {}
            for name in stored:
                dtype, row = _ARRAYS[name]
                written[name] = stack.enter_context((partial / f"{name}.npy").open("wb"))
                first = name in _STARTS
                header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False}
                np.lib.format.write_array_header_1_0(written[name], header | {"shape": (sizes[name] + first, *row)})
                if first:
                    written[name].write(np.zeros(1, dtype).tobytes())
            ends = dict.fromkeys(_STARTS, 0)
            for counts in map(read_shard, paths):
                if counts is None:
                    return False
                columns = _columns(counts, ends)
                digests.update(columns)
                for name in stored:
                    array = columns[name]
                    written[name].write(array.tobytes())
                    if name in ends and len(array):
                        ends[name] = int(array[-1])
        checksums = {f"{name}.npy": files.sha256(partial / f"{name}.npy") for name in stored}
        meta = {
            "stream": source.stream, "bad": list(bad.values()), "fingerprint": digests.fingerprint(),
            "sha256": checksums,
        }  # fmt: skip
        (partial / _META).write_text(json.dumps([meta, _checksum(meta)]))
        try:
            os.rename(partial, folder)
        except OSError:
            if not folder.is_dir():
                raise
            # Another host was faster, or what is there is damaged.
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                _open(source.path, folder)
                return True
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(partial, folder)
        return True
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _columns(counts: ShardCounts, ends: dict[str, int]) -> dict[str, np.ndarray]:
    """A shard's part of each stored array; `ends` are the last text and span before it."""
    return {
        "text_starts": ends["text_starts"] + np.cumsum(counts.text_counts, dtype=np.int64),
        "num_positives": counts.num_positives,
        "lengths": counts.lengths,
        "hashes": counts.hashes,
        "span_starts": ends["span_starts"] + np.cumsum(counts.span_counts, dtype=np.int64),
        "spans": counts.spans,
        "numbers": counts.numbers,
    }


class _Digests:
    """Makes a `Fingerprint` from the columns of one range of records after the other."""

    def __init__(self):
        self._digests = {name: hashlib.sha256() for name in (*_TEXT_ARRAYS, *_STRUCTURE_ARRAYS)}

    def update(self, columns: Mapping[str, np.ndarray]) -> None:
        """Adds the next records."""
        for name, digest in self._digests.items():
            digest.update(columns[name].tobytes())

    def fingerprint(self) -> Fingerprint:
        """Of all records that were added."""
        return Fingerprint(self._joined(_TEXT_ARRAYS), self._joined(_STRUCTURE_ARRAYS))

    def _joined(self, names: Sequence[str]) -> str:
        return hashlib.sha256(b"".join(self._digests[name].digest() for name in names)).hexdigest()[:16]
