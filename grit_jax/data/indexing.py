"""Making the indexes of data files, once per file and tokenizer, by all hosts together."""

from __future__ import annotations

import contextlib
import functools
import glob
import logging
import os
import shutil
import uuid
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from grit_jax import files
from grit_jax.data import cache
from grit_jax.data.index import (
    CHECKED_BYTES,
    STARTS,
    BadRecords,
    Digests,
    FileIndex,
    ReadFile,
    add_bad,
    checksums,
    open_index,
    write_meta,
)
from grit_jax.data.shards import (
    SHARD,
    Columns,
    Reading,
    Shard,
    make_shards,
    read_shard,
    refuse_bad,
    token_type,
    tokenize_range,
)
from grit_jax.data.sources import Source, open_source
from grit_jax.data.streams.base import Stream
from grit_jax.errors import InputError
from grit_jax.text.tokenizer import Tokenizer

_TRIES = 3
_SAMPLE = 64  # records of a file from which its tokens are estimated
_MARGIN = 1.25  # that the estimate may be too low
_GIB = 1 << 30
_log = logging.getLogger(__name__)

# Arrays that are stored, with type and shape of a row; the type of tokens is that of their ids.
_ARRAYS: dict[str, tuple[type | None, tuple[int, ...]]] = {
    "text_starts": (np.int64, ()),
    "num_positives": (np.int32, ()),
    "lengths": (np.int32, ()),
    "hashes": (np.int64, ()),
    "span_starts": (np.int64, ()),
    "spans": (np.int32, (2,)),
    "lines": (np.int64, ()),  # only where they are not 1, 2, 3 ...
}
_TOKEN_ARRAYS: dict[str, tuple[type | None, tuple[int, ...]]] = {
    "tokens": (None, ()),
    "token_starts": (np.int64, ()),
    "endings": (np.uint8, ()),
}


def build_indexes(
    paths: Sequence[str | os.PathLike[str]],
    tokenizer: Tokenizer,
    streams: Sequence[Stream],
    *,
    skip_bad: bool = False,
    tokens: bool = True,
) -> list[ReadFile]:
    """Tokenizes files, or opens what an earlier call with the same files, tokenizer and streams has made.

    It is written in shards as it is made, so an interrupted call goes on where it was, and to `.grit_index/` beside the
    file, so hosts that see the same folder or bucket share them. Where that is read-only or has no room it goes under
    the user's cache folder; so do, always, the arrays that are mapped for a file in a bucket. A file is opened only
    where its index is not there.

    Args:
      paths: The files, as `find_files` gives them.
      tokenizer: The model's.
      streams: Streams that may read them: each file is tokenized for those that are trained on its kind of records.
      skip_bad: Whether malformed records are left out and counted.
      tokens: Whether tokens are kept, or lengths alone.

    Returns:
      The files in their order, those of kinds that came later behind the others.

    Raises:
      InputError: A file cannot be read, a record is malformed and `skip_bad` is false, or there is no room.
    """
    stores = [store for path in paths for store in _stores(epath.Path(path), tokenizer, streams, skip_bad, tokens)]
    for _ in range(_TRIES):
        missing = [store for store in stores if store.index is None]
        if not missing:
            break
        room = _Room()
        for store in missing:
            store.prepare(room)
        readings = [store.reading for store in missing]
        shards = [shard for number, store in enumerate(missing) for shard in store.shards(number)]
        make_shards(shards, readings, tokenizer, skip_bad=skip_bad)
        for store in missing:
            store.merge()  # stays None where a shard is damaged or another host has just removed it
    stores.sort(key=lambda store: store.stream.record.numbered_with)
    numbers: dict[epath.Path, int] = {}
    found = []
    for store in stores:
        if store.index is None:
            raise InputError(
                f"{store.path}: its index was written but cannot be read; look at {cache.FOLDER} beside it"
            )
        refuse_bad(store.index.bad, skip_bad)
        found.append(ReadFile(numbers.setdefault(store.path, len(numbers)), store.index, store.stream))
    return found


def _stores(
    path: epath.Path, tokenizer: Tokenizer, streams: Sequence[Stream], skip_bad: bool, tokens: bool
) -> list[_Store]:
    """A file's index for every stream that reads it; the file is opened once, and only where one is missing."""
    version, kinds = cache.version(path), list(dict.fromkeys(stream.record for stream in streams))

    @functools.cache
    def opened() -> Source:
        cache.remove_stale(path, version)
        return open_source(path, skip_bad=skip_bad, kinds=kinds, version=version)

    stores = [_Store(path, version, opened, tokenizer, stream, tokens=tokens) for stream in streams]
    kind = next((store.index.kind for store in stores if store.index), None) or opened().kind.kind
    return [store for store in stores if store.stream.record.kind == kind]


class _Room:
    """The room on this machine's disks that nothing is meant for yet."""

    def __init__(self):
        self._taken: defaultdict[int, int] = defaultdict(int)

    def left(self, folder: Path) -> int:
        """Bytes left on the disk of a folder."""
        return shutil.disk_usage(folder).free - self._taken[os.stat(folder).st_dev]

    def take(self, folder: Path, size: int) -> None:
        """Means so many bytes for something in a folder."""
        self._taken[os.stat(folder).st_dev] += size


class _Store:
    """Where the index of one file for one stream is kept.

    Attributes:
      path: The file.
      stream: The stream.
      index: The index, once it is there.
      reading: File and stream, after `prepare`.
    """

    reading: Reading

    def __init__(
        self,
        path: epath.Path,
        version: cache.Version,
        opened: Callable[[], Source],
        tokenizer: Tokenizer,
        stream: Stream,
        *,
        tokens: bool,
    ):
        self.path, self._version, self._opened, self.stream = path, version, opened, stream
        self._tokenizer, self._tokens = tokenizer, tokens
        self._lengths, self._whole = (
            cache.entry(path, self._version, tokenizer.fingerprint, tokenizer.vocab_size, stream.name, *kind)
            for kind in (["lengths"], [])
        )
        self._name = self._whole if tokens else self._lengths
        self.index = self._load()

    def _load(self) -> FileIndex | None:
        for folder in cache.local_folders(self.path):
            for name in dict.fromkeys((self._whole, self._name)):  # one with tokens has the lengths too
                try:
                    return open_index(self.path, folder / name)
                except FileNotFoundError:
                    continue
                except (OSError, ValueError, KeyError, TypeError) as error:
                    _log.warning("%s: damaged (%s); its texts are tokenized again", folder / name, error)
        return None

    def prepare(self, room: _Room) -> None:
        """Opens the file, and finds a folder with room for what is made of it.

        Raises:
          InputError: The file cannot be read, or there is no such folder.
        """
        self.reading = Reading(self._opened(), self.stream)
        writable = [folder for folder in cache.local_folders(self.path) if cache.can_write(epath.Path(folder))]
        beside = self.path.parent / cache.FOLDER
        if not writable:
            raise InputError(
                f"{self.path}: neither {beside} nor {cache.local_folders(self.path)[-1]} can be written to; "
                "set XDG_CACHE_HOME to a folder that can"
            )
        shared = files.is_bucket(self.path) and cache.can_write(beside)
        shards = f"{self._name}.shards"
        self._folder = self._with_room(writable, shards, room, copies=1 if shared else 2)
        self._shards = (beside if shared else epath.Path(self._folder)) / shards

    def _with_room(self, folders: Sequence[Path], shards: str, room: _Room, *, copies: int) -> Path:
        """The first of some folders that has room for so many copies of the tokens: shards are joined to arrays."""
        if not self._tokens:
            return folders[0]
        size = copies * token_type(self._tokenizer).itemsize
        for tokens in (_most_tokens, _estimated_tokens):
            needed = size * tokens(self.reading, self._tokenizer)
            for folder in folders:
                written = sum(path.stat().st_size for path in (folder / shards).glob("*"))  # by an earlier call
                if room.left(folder) >= needed - written:
                    room.take(folder, needed - written)
                    return folder
        free = " and ".join(f"{folder} has {room.left(folder) / _GIB:,.2f} GiB" for folder in folders)
        raise InputError(
            f"{self.path}: its tokens need about {needed / _GIB:,.2f} GiB on a disk while they are made, and {free} "
            f"left; {cache.MAKE_ROOM}"
        )

    def shards(self, number: int) -> list[Shard]:
        """The parts in which the file is tokenized; `number` is the reading's."""
        size = len(self.reading.source)
        return [
            Shard(number, start, min(start + SHARD, size), self._shards / f"{start:012d}.npz", self._tokens)
            for start in range(0, size, SHARD)
        ]

    def merge(self) -> None:
        """Joins the shards into arrays that can be mapped, and removes what only served to make them."""
        self.index = self._load()  # another host's
        if not self.index:
            problem: OSError | None = None
            paths, folder = [shard.path for shard in self.shards(0)], self._folder / self._name
            try:
                if not _merge(paths, self.reading.source, folder, self._tokenizer, tokens=self._tokens):
                    return
            except OSError as error:
                problem = error
            self.index = self._load()
            if not self.index and problem:
                raise InputError(f"{self._folder}: cannot be written to ({problem}); {cache.MAKE_ROOM}") from problem
        if self.index:
            self._clean_up()

    def _clean_up(self) -> None:
        """Removes what an index that is there leaves without a use, also of others that have begun to make it."""
        if not files.is_bucket(self._shards):  # a bucket's shards are for hosts that are still to come
            cache.remove(self._shards)
        for folder in cache.local_folders(self.path):
            if self._tokens:
                cache.remove(folder / self._lengths)
            for partial in folder.glob(f".{glob.escape(self._name)}.*.partial"):
                cache.remove(partial)
        cache.remove_plain(self.path, self._version)


def _sample(source: Source) -> list[int]:
    return np.unique(np.linspace(0, len(source) - 1, _SAMPLE).astype(int)).tolist()


def _most_tokens(reading: Reading, tokenizer: Tokenizer) -> int:
    """How many tokens a file has where each stands for one byte, by a sample of its lines."""
    source = reading.source
    sample = _sample(source)
    return len(source) * sum(len(source.lines(number, number + 1)[0]) for number in sample) // len(sample)


def _estimated_tokens(reading: Reading, tokenizer: Tokenizer) -> int:
    """How many tokens a file has, by a sample of its records, and a few more."""
    sample = _sample(reading.source)
    found = [tokenize_range(reading, number, number + 1, tokenizer, tokens=False) for number in sample]
    return int(_MARGIN * len(reading.source) * sum(int(columns.lengths.sum()) for columns in found) / len(sample))


class _ArrayFile:
    """A .npy file to which rows are added."""

    def __init__(self, path: Path, dtype: np.dtype | type, row: tuple[int, ...]):
        self._file, self._dtype, self._row, self._num_rows = path.open("wb"), np.dtype(dtype), row, 0
        self._write_header()

    def _write_header(self) -> None:
        """Writes a header, which is equally long for any number of rows."""
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False}
        np.lib.format.write_array_header_1_0(self._file, header | {"shape": (self._num_rows, *self._row)})

    def add(self, rows: np.ndarray) -> None:
        """Adds rows."""
        self._file.write(rows.astype(self._dtype, copy=False).tobytes())
        self._num_rows += len(rows)

    def close(self) -> None:
        """Returns when all is on the disk."""
        self._file.seek(0)
        self._write_header()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def _merge(paths: Sequence[epath.Path], source: Source, folder: Path, tokenizer: Tokenizer, *, tokens: bool) -> bool:
    """Writes the arrays of all shards to a folder, which appears as a whole; False where a shard is missing."""
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir(parents=True)
    try:
        about = _write_arrays(paths, partial, tokenizer, tokens=tokens)
        if about is None:
            return False
        write_meta(partial, about | {"kind": source.kind.kind})
        try:
            os.rename(partial, folder)
        except OSError:
            if not folder.is_dir():
                raise
            # Another host was faster, or what is there is damaged.
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                open_index(source.path, folder)
                return True
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(partial, folder)
        return True
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_arrays(
    paths: Sequence[epath.Path], folder: Path, tokenizer: Tokenizer, *, tokens: bool
) -> dict[str, Any] | None:
    """Writes the arrays of all shards, and returns what an index says of them; None where a shard is missing."""
    stored = _ARRAYS | (_TOKEN_ARRAYS if tokens else {})
    digests, bad, num_records = Digests(tokens=tokens), dict[str, BadRecords](), 0
    ends, plain = dict.fromkeys(STARTS, 0), True
    with contextlib.ExitStack() as stack:
        written = {
            name: _ArrayFile(folder / f"{name}.npy", dtype or token_type(tokenizer), row)
            for name, (dtype, row) in stored.items()
        }
        for array in written.values():
            stack.callback(array.close)
        for name in STARTS:
            if name in written:
                written[name].add(np.zeros(1, np.int64))
        for found in map(read_shard, paths):
            if found is None:
                return None
            add_bad(bad, found.bad_records())
            columns = _columns(found, ends)
            digests.update(columns)
            for name, array in written.items():
                array.add(columns[name])
            ends = {name: int(columns[name][-1]) if len(columns[name]) else end for name, end in ends.items()}
            plain &= np.array_equal(found.lines, num_records + 1 + np.arange(len(found.lines)))
            num_records += len(found.lines)
    if plain:
        (folder / "lines.npy").unlink()
    if tokens:
        made = np.load(folder / "tokens.npy", mmap_mode="r")
        np.save(folder / "checksums.npy", checksums(made, np.arange(-(-made.nbytes // CHECKED_BYTES))))
    names = sorted(path.name for path in folder.iterdir())
    return {
        "bad": list(bad.values()),
        "fingerprint": digests.fingerprint(),
        "arrays": names,
        "sha256": {name: files.sha256(folder / name) for name in names if name != "tokens.npy"},
    }


def _columns(found: Columns, ends: dict[str, int]) -> dict[str, np.ndarray]:
    """A shard's part of each stored array; `ends` are the last text, span and token before it."""
    counts = {"text_starts": found.text_counts, "span_starts": found.span_counts, "token_starts": found.lengths}
    return found._asdict() | {name: ends[name] + np.cumsum(each, dtype=np.int64) for name, each in counts.items()}
