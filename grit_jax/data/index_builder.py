"""Builds the token indexes of data files, once per file and tokenizer, on all hosts together."""

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
from grit_jax.data import derived
from grit_jax.data.records import BadRecords, add_bad
from grit_jax.data.sources import Source, open_source
from grit_jax.data.streams.stream import Stream
from grit_jax.data.token_index import (
    CHECKED_BYTES,
    STARTS,
    Digests,
    IndexedFile,
    TokenIndex,
    checksums,
    open_index,
    write_meta,
)
from grit_jax.data.tokenizing import (
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
from grit_jax.errors import InputError
from grit_jax.text.tokenizer import Tokenizer

_TRIES = 3
_SAMPLE = 64  # records of a file from which its number of tokens is estimated
_MARGIN = 1.25  # by which the estimate may be too low
_GIB = 1 << 30
_log = logging.getLogger(__name__)

# The dtypes of the stored arrays, other than tokens, whose dtype depends on the tokenizer.
_ARRAYS: dict[str, Any] = {
    "text_starts": np.int64,
    "num_positives": np.int32,
    "lengths": np.int32,
    "hashes": np.int64,
    "span_starts": np.int64,
    "spans": np.dtype((np.int32, 2)),
    "lines": np.int64,  # only if they are not 1, 2, 3, ...
}
_TOKEN_ARRAYS: dict[str, Any] = {"token_starts": np.int64, "endings": np.uint8}


def build_indexes(
    paths: Sequence[str | os.PathLike[str]],
    tokenizer: Tokenizer,
    streams: Sequence[Stream],
    *,
    skip_bad: bool = False,
    tokens: bool = True,
) -> list[IndexedFile]:
    """Tokenizes files, or opens the token indexes that an earlier call with the same arguments made.

    Each shard is written once made, so an interrupted call can continue. Shards go to `.grit_index/` beside the file,
    where hosts that see the same folder or bucket share them, or to the user's cache folder if that one is read-only or
    full. The arrays of a file in a bucket are always mapped from the cache folder. A file is opened only if an index is
    missing.

    Args:
      paths: The files, as `find_files` gives them.
      tokenizer: The model's.
      streams: Streams that may read the files; each file is tokenized for those of its type of records.
      skip_bad: Whether malformed records are left out and counted.
      tokens: Whether to store tokens, or lengths alone.

    Returns:
      The files in their order, grouped by `Record.numbered_with`.

    Raises:
      InputError: A file cannot be read, a record is malformed and `skip_bad` is false, or there is no room.
    """
    builders = [each for path in paths for each in _builders(epath.Path(path), tokenizer, streams, skip_bad, tokens)]
    for _ in range(_TRIES):
        missing = [builder for builder in builders if builder.index is None]
        if not missing:
            break
        room = _Room()
        for builder in missing:
            builder.prepare(room)
        readings = [builder.reading for builder in missing]
        shards = [shard for number, builder in enumerate(missing) for shard in builder.shards(number)]
        make_shards(shards, readings, tokenizer, skip_bad=skip_bad)
        for builder in missing:
            builder.merge()  # leaves `index` None if a shard is damaged, or was just removed by another host
    builders.sort(key=lambda builder: builder.stream.record.numbered_with)
    numbers: dict[epath.Path, int] = {}
    found = []
    for builder in builders:
        path, index = builder.path, builder.index
        if index is None:
            raise InputError(f"{path}: its index was written but cannot be read; look at {derived.FOLDER} beside it")
        refuse_bad(index.bad, skip_bad)
        found.append(IndexedFile(numbers.setdefault(path, len(numbers)), index, builder.stream))
    return found


def _builders(
    path: epath.Path, tokenizer: Tokenizer, streams: Sequence[Stream], skip_bad: bool, tokens: bool
) -> list[_Builder]:
    """A builder for each stream that reads the file, which is opened once, and only if an index is missing."""
    version, record_types = derived.version(path), list(dict.fromkeys(stream.record for stream in streams))

    @functools.cache
    def opened() -> Source:
        derived.remove_stale(path, version)
        return open_source(path, skip_bad=skip_bad, record_types=record_types, version=version)

    builders = [_Builder(path, version, opened, tokenizer, stream, tokens=tokens) for stream in streams]
    name = next((builder.index.record_name for builder in builders if builder.index), None) or opened().record_type.name
    return [builder for builder in builders if builder.stream.record.name == name]


class _Room:
    """The free space of this machine's disks that is not yet reserved."""

    def __init__(self):
        self._reserved: defaultdict[int, int] = defaultdict(int)

    def left(self, folder: Path) -> int:
        """Bytes left on the disk of a folder."""
        return shutil.disk_usage(folder).free - self._reserved[os.stat(folder).st_dev]

    def reserve(self, folder: Path, size: int) -> None:
        """Reserves bytes on the disk of a folder."""
        self._reserved[os.stat(folder).st_dev] += size


class _Builder:
    """The index of one file for one stream, opened or built.

    Attributes:
      path: The file.
      stream: The stream.
      index: The index, once it exists.
      reading: File and stream, after `prepare`.
    """

    reading: Reading

    def __init__(
        self,
        path: epath.Path,
        version: derived.Version,
        opened: Callable[[], Source],
        tokenizer: Tokenizer,
        stream: Stream,
        *,
        tokens: bool,
    ):
        self.path, self._version, self._opened, self.stream = path, version, opened, stream
        self._tokenizer, self._tokens = tokenizer, tokens
        self._lengths, self._whole = (
            derived.entry(path, version, tokenizer.fingerprint, tokenizer.vocab_size, stream.name, *content)
            for content in (["lengths"], [])
        )
        self._name = self._whole if tokens else self._lengths
        self.index = self._load()

    def _load(self) -> TokenIndex | None:
        for folder in derived.local_folders(self.path):
            for name in dict.fromkeys((self._whole, self._name)):  # an index with tokens has the lengths too
                try:
                    return open_index(self.path, folder / name)
                except FileNotFoundError:
                    continue
                except (OSError, ValueError, KeyError, TypeError) as error:
                    _log.warning("%s: damaged (%s); its texts are tokenized again", folder / name, error)
        return None

    def prepare(self, room: _Room) -> None:
        """Opens the file, and finds a folder with room for its shards and arrays.

        Raises:
          InputError: The file cannot be read, or there is no such folder.
        """
        self.reading = Reading(self._opened(), self.stream)
        folders = derived.local_folders(self.path)
        writable = [folder for folder in folders if derived.can_write(epath.Path(folder))]
        beside = self.path.parent / derived.FOLDER
        if not writable:
            raise InputError(
                f"{self.path}: neither {beside} nor {folders[-1]} can be written to; "
                "set XDG_CACHE_HOME to a folder that can be"
            )
        shared = files.is_bucket(self.path) and derived.can_write(beside)
        shards = f"{self._name}.shards"
        self._folder = self._with_room(writable, shards, room, copies=1 if shared else 2)
        self._shards = (beside if shared else epath.Path(self._folder)) / shards

    def _with_room(self, folders: Sequence[Path], shards: str, room: _Room, *, copies: int) -> Path:
        """The first folder with room for the tokens, once as arrays and, if there are two copies, once as shards."""
        if not self._tokens:
            return folders[0]
        size = copies * token_type(self._tokenizer).itemsize
        for num_tokens in (_most_tokens, _estimated_tokens):
            needed = size * num_tokens(self.reading, self._tokenizer)
            for folder in folders:
                written = sum(path.stat().st_size for path in (folder / shards).glob("*"))  # by an earlier call
                if room.left(folder) >= needed - written:
                    room.reserve(folder, needed - written)
                    return folder
        free = " and ".join(f"{folder} has {room.left(folder) / _GIB:,.2f} GiB" for folder in folders)
        raise InputError(
            f"{self.path}: its tokens need about {needed / _GIB:,.2f} GiB on a disk while they are made, and {free} "
            f"left; {derived.MAKE_ROOM}"
        )

    def shards(self, number: int) -> list[Shard]:
        """The shards of the file; `number` is the index of its reading."""
        size = len(self.reading.source)
        return [
            Shard(number, start, min(start + SHARD, size), self._shards / f"{start:012d}.npz", self._tokens)
            for start in range(0, size, SHARD)
        ]

    def merge(self) -> None:
        """Joins the shards into memory-mapped arrays, and removes what is no longer needed."""
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
                raise InputError(f"{self._folder}: cannot be written to ({problem}); {derived.MAKE_ROOM}") from problem
        if self.index:
            self._clean_up()

    def _clean_up(self) -> None:
        """Removes what the finished index replaces, including partial work of other hosts."""
        if not files.is_bucket(self._shards):  # hosts that start later read a bucket's shards
            derived.remove(self._shards)
        for folder in derived.local_folders(self.path):
            if self._tokens:
                derived.remove(folder / self._lengths)
            for partial in folder.glob(f".{glob.escape(self._name)}.*.partial"):
                derived.remove(partial)
        derived.remove_plain(self.path, self._version)


def _sample(source: Source) -> list[int]:
    return np.unique(np.linspace(0, len(source) - 1, _SAMPLE).astype(int)).tolist()


def _most_tokens(reading: Reading, tokenizer: Tokenizer) -> int:
    """Tokens of a file if every byte were one, estimated from a sample of its lines."""
    source = reading.source
    sample = _sample(source)
    return len(source) * sum(len(source.lines(index, index + 1)[0]) for index in sample) // len(sample)


def _estimated_tokens(reading: Reading, tokenizer: Tokenizer) -> int:
    """A generous estimate of a file's tokens, from a sample of its records."""
    sample = _sample(reading.source)
    found = [tokenize_range(reading, index, index + 1, tokenizer, tokens=False) for index in sample]
    return int(_MARGIN * len(reading.source) * sum(int(columns.lengths.sum()) for columns in found) / len(sample))


class _ArrayFile:
    """A .npy file that grows by rows; `dtype` is that of a row."""

    def __init__(self, path: Path, dtype: Any):
        self._file, self._dtype, self._num_rows = path.open("wb"), np.dtype(dtype), 0
        self._write_header()

    def _write_header(self) -> None:
        """Writes a header, whose size does not depend on the number of rows."""
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype.base), "fortran_order": False}
        np.lib.format.write_array_header_1_0(self._file, header | {"shape": (self._num_rows, *self._dtype.shape)})

    def add(self, rows: np.ndarray) -> None:
        """Adds rows."""
        self._file.write(rows.astype(self._dtype.base, copy=False).tobytes())
        self._num_rows += len(rows)

    def close(self) -> None:
        """Closes the file; returns when everything is on disk."""
        self._file.seek(0)
        self._write_header()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def _merge(paths: Sequence[epath.Path], source: Source, folder: Path, tokenizer: Tokenizer, *, tokens: bool) -> bool:
    """Writes the arrays of all shards to a folder, which appears as a whole; False if a shard is missing."""
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir(parents=True)
    try:
        meta = _write_arrays(paths, partial, tokenizer, tokens=tokens)
        if meta is None:
            return False
        write_meta(partial, meta | {"kind": source.record_type.name})
        try:
            os.rename(partial, folder)
        except OSError:
            if not folder.is_dir():
                raise
            # Another host was faster, or the folder is damaged.
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
    """Writes the arrays of all shards and returns their description; None if a shard is missing."""
    dtypes = _ARRAYS | (_TOKEN_ARRAYS | {"tokens": token_type(tokenizer)} if tokens else {})
    digests, bad, num_records = Digests(tokens=tokens), dict[str, BadRecords](), 0
    ends, plain = dict.fromkeys(STARTS, 0), True
    with contextlib.ExitStack() as stack:
        arrays = {name: _ArrayFile(folder / f"{name}.npy", dtype) for name, dtype in dtypes.items()}
        for array in arrays.values():
            stack.callback(array.close)
        for name in STARTS:
            if name in arrays:
                arrays[name].add(np.zeros(1, np.int64))
        for shard in map(read_shard, paths):
            if shard is None:
                return None
            add_bad(bad, *shard.bad_records())
            columns = _columns(shard, ends)
            digests.update(columns)
            for name, array in arrays.items():
                array.add(columns[name])
            ends = {name: int(columns[name][-1]) if len(columns[name]) else end for name, end in ends.items()}
            plain &= np.array_equal(shard.lines, num_records + 1 + np.arange(len(shard.lines)))
            num_records += len(shard.lines)
    if plain:
        (folder / "lines.npy").unlink()
    if tokens:
        written = np.load(folder / "tokens.npy", mmap_mode="r")
        np.save(folder / "checksums.npy", checksums(written, np.arange(-(-written.nbytes // CHECKED_BYTES))))
    names = sorted(path.name for path in folder.iterdir())
    return {
        "bad": list(bad.values()),
        "fingerprint": digests.fingerprint(),
        "arrays": names,
        "sha256": {name: files.sha256(folder / name) for name in names if name != "tokens.npy"},
    }


def _columns(shard: Columns, ends: dict[str, int]) -> dict[str, np.ndarray]:
    """A shard's part of each stored array; `ends` are the last text, span and token before it."""
    counts = {"text_starts": shard.text_counts, "span_starts": shard.span_counts, "token_starts": shard.lengths}
    return shard._asdict() | {name: ends[name] + np.cumsum(each, dtype=np.int64) for name, each in counts.items()}
