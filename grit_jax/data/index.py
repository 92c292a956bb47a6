"""What is known of a file once its texts have been tokenized: their tokens, and all that the schedule asks for."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from grit_jax import files
from grit_jax.data.packing import kept_places, ranges
from grit_jax.data.streams.base import Stream

CHECKED_BYTES = 4096  # of tokens that have a checksum: what a disk reads at least
_META = "meta.json"
_EXAMPLES = 3  # messages kept of each kind of bad record


class BadRecords(NamedTuple):
    """Malformed records with the same fault.

    Attributes:
      kind: The fault.
      count: How many.
      examples: Messages of the first few, with file and line.
    """

    kind: str
    count: int
    examples: tuple[str, ...]


def add_bad(found: dict[str, BadRecords], more: Sequence[BadRecords]) -> None:
    """Adds records to those found before them, by kind."""
    for kind, count, examples in more:
        before = found.get(kind, BadRecords(kind, 0, ()))
        examples = (*before.examples, *examples)[:_EXAMPLES]
        found[kind] = BadRecords(kind, before.count + count, examples)


class Fingerprint(NamedTuple):
    """What a file holds, in short.

    Attributes:
      texts: Equal for files with the same formatted texts in the same order, tokenized in the same way.
      structure: Equal where the texts also have the same roles (query, positive, negative), make the same records, and
        are pooled or scored at the same tokens.
      tokens: Equal where the texts have the same tokens, and keep the same ones at their end; empty without tokens.
    """

    texts: str
    structure: str
    tokens: str = ""


# What each part of a `Fingerprint` is made from.
_FINGERPRINTED = {
    "texts": ("hashes", "lengths"),
    "structure": ("text_starts", "num_positives", "span_starts", "spans"),
    "tokens": ("tokens", "endings"),
}
STARTS = ("text_starts", "span_starts", "token_starts")  # arrays with one more row than there are records or texts


@dataclasses.dataclass(frozen=True)
class FileIndex:
    """What a run needs of a file.

    The arrays are memory-mapped where they come from `build_indexes`.

    Attributes:
      path: The file.
      kind: Kind of its records.
      text_starts: int64 [records + 1]; texts of record r are `text_starts[r]:text_starts[r + 1]`: query, positives,
        negatives; or one conversation.
      num_positives: int32 [records]; 0 for a conversation.
      lengths: int32 [texts]; tokens of the formatted text, untruncated.
      hashes: int64 [texts]; of the formatted text.
      span_starts: int64 [texts + 1]; spans of text t are `span_starts[t]:span_starts[t + 1]`.
      spans: int32 [spans, 2]; token ranges that are pooled or scored.
      lines: int64 [records]; line or entry of each record in the file, from 1; None where they are 1, 2, 3 ...
      tokens: uint8, uint16 or uint32 [tokens]; those of all texts, one text after the other. This and the next three
        are None where only lengths were asked for.
      token_starts: int64 [texts + 1]; tokens of text t are `token_starts[t]:token_starts[t + 1]`.
      endings: uint8 [texts]; tokens at the end that stay where a text is cut.
      checksums: uint32 [blocks]; CRC-32 of every 4096 bytes of the tokens.
      bad: The malformed records, which are no records here.
      folder: Where the arrays are mapped from; None for arrays in memory.
    """

    path: os.PathLike[str]
    kind: str
    text_starts: np.ndarray
    num_positives: np.ndarray
    lengths: np.ndarray
    hashes: np.ndarray
    span_starts: np.ndarray
    spans: np.ndarray
    lines: np.ndarray | None = None
    tokens: np.ndarray | None = None
    token_starts: np.ndarray | None = None
    endings: np.ndarray | None = None
    checksums: np.ndarray | None = None
    bad: tuple[BadRecords, ...] = ()
    folder: Path | None = None

    @property
    def name(self) -> str:
        """The file's name, by which settings name it."""
        return Path(self.path).name

    @property
    def num_records(self) -> int:
        """Well-formed records in the file."""
        return len(self.num_positives)

    def line_numbers(self, records: np.ndarray) -> np.ndarray:
        """int64 [records]: where records are in the file, counted from 1: their lines, or their entries."""
        return records + 1 if self.lines is None else np.asarray(self.lines[records])

    def kept_tokens(self, texts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Tokens of texts that are cut, one text after the other: [sum of lengths].

        Args:
          texts: int [texts]; their numbers.
          lengths: int [texts]; tokens that stay of each, at most all.

        Raises:
          UnreachableError: What the disk holds is damaged. It is given up, so that the next start makes it anew.
        """
        assert self.tokens is not None
        assert self.token_starts is not None
        assert self.endings is not None
        starts, whole = np.asarray(self.token_starts[texts]), np.asarray(self.lengths[texts])
        places = kept_places(starts, whole, lengths, np.asarray(self.endings[texts]))
        if self.folder:
            self._check(places * self.tokens.itemsize // CHECKED_BYTES)
        return np.asarray(self.tokens)[places]

    def spans_of(self, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The spans of texts, int32 [spans, 2], one text after the other, and how many each has, int64 [texts]."""
        starts = np.asarray(self.span_starts[texts])
        counts = np.asarray(self.span_starts[texts + 1]) - starts
        return np.asarray(self.spans[ranges(starts, counts)]), counts

    @functools.cached_property
    def fingerprint(self) -> Fingerprint:
        """What the file holds, in short."""
        if self.folder:
            return Fingerprint(*read_meta(self.folder)["fingerprint"])
        digests = Digests(tokens=self.tokens is not None)
        # Those that start each record's and each text's part have a 0 before all others.
        digests.update({name: getattr(self, name)[1:] if name in STARTS else getattr(self, name) for name in digests})
        return digests.fingerprint()

    @functools.cached_property
    def _checked(self) -> np.ndarray:
        """Which blocks this process has compared with their checksums."""
        assert self.checksums is not None
        return np.zeros(len(self.checksums), bool)

    def _check(self, blocks: np.ndarray) -> None:
        """Compares blocks with their checksums when they are first read: of all at once, a start would wait."""
        assert self.tokens is not None
        assert self.checksums is not None
        assert self.folder
        blocks = np.unique(blocks[np.flatnonzero(np.diff(blocks, prepend=-1))])
        blocks = blocks[~self._checked[blocks]]
        if np.any(checksums(self.tokens, blocks) != self.checksums[blocks]):
            try:
                (self.folder / _META).unlink()
                remedy = "they are made anew at the next start"
            except OSError as error:
                remedy = f"remove it, so that they are made anew ({error})"
            raise files.UnreachableError(
                f"{self.folder}: tokens of {self.path} are damaged (tokens.npy differs from its checksums); {remedy}"
            )
        self._checked[blocks] = True


class ReadFile(NamedTuple):
    """A file as one stream reads it.

    Attributes:
      number: Its number among all files, whatever streams read it.
      index: Its texts as the stream has them.
      stream: The stream.
    """

    number: int
    index: FileIndex
    stream: Stream


def checksums(tokens: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """uint32 [blocks]: what `FileIndex.checksums` has of blocks with these numbers."""
    content = np.asarray(tokens).view(np.uint8).data
    starts = (blocks * CHECKED_BYTES).tolist()
    return np.array([zlib.crc32(content[start : start + CHECKED_BYTES]) for start in starts], np.uint32)


def num_targets(
    index: FileIndex, limits: int | np.ndarray, texts: slice | np.ndarray = slice(None), *, first: int
) -> np.ndarray:
    """int32 [texts]: span tokens left when texts are cut.

    Args:
      index: Of the file.
      limits: Tokens that are kept, of all texts or of each.
      texts: Which texts; all of them without.
      first: Place in a text of the first token that counts.
    """
    if isinstance(texts, slice):
        start, stop, _ = texts.indices(len(index.lengths))
        bounds = np.asarray(index.span_starts[start : stop + 1])
        counts, spans = np.diff(bounds), np.asarray(index.spans[bounds[0] : bounds[-1]])
    else:
        spans, counts = index.spans_of(texts)
    most = np.repeat(np.broadcast_to(limits, counts.shape), counts)
    kept = np.maximum(np.minimum(spans[:, 1], most), first) - np.maximum(np.minimum(spans[:, 0], most), first)
    sums = np.concatenate([[0], np.cumsum(kept)])
    ends = np.cumsum(counts)
    return (sums[ends] - sums[ends - counts]).astype(np.int32)


def open_index(path: os.PathLike[str], folder: Path) -> FileIndex:
    """The index of a file that is kept in a folder.

    Tokens are looked at when they are read, all else now.

    Raises:
      OSError: It is missing or cannot be read.
      ValueError: It is damaged.
      KeyError: The same.
    """
    meta = read_meta(folder)
    for name, expected in meta["sha256"].items():
        if files.sha256(folder / name) != expected:
            raise ValueError(f"{name} differs from its checksum")
    arrays = {Path(name).stem: np.load(folder / name, mmap_mode="r") for name in meta["arrays"]}
    bad = tuple(BadRecords(kind, count, tuple(examples)) for kind, count, examples in meta["bad"])
    return FileIndex(path, meta["kind"], **arrays, bad=bad, folder=folder)


def read_meta(folder: Path) -> dict[str, Any]:
    """What an index says of itself; raises as `open_index`."""
    meta, checksum = json.loads((folder / _META).read_text())
    if _checksum(meta) != checksum:
        raise ValueError(f"{_META} differs from its checksum")
    return meta


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    """What `read_meta` reads."""
    (folder / _META).write_text(json.dumps([meta, _checksum(meta)]))


def _checksum(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta).encode()).hexdigest()


class Digests:
    """Makes a `Fingerprint` from the arrays of one range of records after the other; iterates over their names."""

    def __init__(self, *, tokens: bool):
        self._parts = {part: names for part, names in _FINGERPRINTED.items() if tokens or part != "tokens"}
        self._digests = {name: hashlib.sha256() for names in self._parts.values() for name in names}

    def __iter__(self) -> Iterator[str]:
        return iter(self._digests)

    def update(self, columns: Mapping[str, np.ndarray]) -> None:
        """Adds the next records."""
        for name, digest in self._digests.items():
            digest.update(columns[name].tobytes())

    def fingerprint(self) -> Fingerprint:
        """Of all records that were added."""
        return Fingerprint(**{part: self._joined(names) for part, names in self._parts.items()})

    def _joined(self, names: Sequence[str]) -> str:
        return hashlib.sha256(b"".join(self._digests[name].digest() for name in names)).hexdigest()[:16]
