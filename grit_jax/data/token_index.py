"""The token index of a data file: the tokens of its texts, and all that the schedule needs to know about them."""

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
from grit_jax.data.packing import kept_indices, ranges
from grit_jax.data.records import BadRecords
from grit_jax.data.streams.stream import Stream

CHECKED_BYTES = 4096  # of tokens share a checksum; a disk reads no fewer
_META = "meta.json"


class Fingerprint(NamedTuple):
    """Digests of a file's content.

    Attributes:
      texts: Digest of the formatted texts, in order, and their numbers of tokens.
      structure: Digest of the texts' records, roles (query, positive, negative) and pooled or scored tokens.
      tokens: Digest of the tokens, and of how many stay at the end of a text that is cut; empty without tokens.
    """

    texts: str
    structure: str
    tokens: str = ""


# The arrays from which each part of a `Fingerprint` is computed.
_FINGERPRINTED = {
    "texts": ("hashes", "lengths"),
    "structure": ("text_starts", "num_positives", "span_starts", "spans"),
    "tokens": ("tokens", "endings"),
}
STARTS = ("text_starts", "span_starts", "token_starts")  # arrays with one more row than there are records or texts


@dataclasses.dataclass(frozen=True)
class TokenIndex:
    """The texts of a file as a stream reads them; `build_indexes` memory-maps the arrays.

    Attributes:
      path: The file.
      record_name: The name of its type of record.
      text_starts: int64 [records + 1]; texts of record r are `text_starts[r]:text_starts[r + 1]`: query, positives,
        negatives; or one conversation.
      num_positives: int32 [records]; 0 for a conversation.
      lengths: int32 [texts]; tokens of the formatted text, untruncated.
      hashes: int64 [texts]; hash of the formatted text.
      span_starts: int64 [texts + 1]; spans of text t are `span_starts[t]:span_starts[t + 1]`.
      spans: int32 [spans, 2]; token ranges that are pooled or scored.
      lines: int64 [records]; line or entry of each record in the file, from 1; None if they are 1, 2, 3, ...
      tokens: uint8, uint16 or uint32 [tokens]; of all texts in order. Without tokens, this and the next three are None.
      token_starts: int64 [texts + 1]; tokens of text t are `token_starts[t]:token_starts[t + 1]`.
      endings: uint8 [texts]; tokens that stay at the end of a text that is cut.
      checksums: uint32 [blocks]; CRC-32 of every 4096 bytes of the tokens.
      bad: The malformed records, which are not counted as records.
      folder: Where the arrays are mapped from; None for arrays in memory.
    """

    path: os.PathLike[str]
    record_name: str
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
        """The file's name, as settings name it."""
        return Path(self.path).name

    @property
    def num_records(self) -> int:
        """Number of well-formed records."""
        return len(self.num_positives)

    def line_numbers(self, records: np.ndarray) -> np.ndarray:
        """int64 [records]: lines, or entries, of records in the file, from 1."""
        return records + 1 if self.lines is None else np.asarray(self.lines[records])

    def texts_of(self, start: int, stop: int) -> tuple[slice, np.ndarray, np.ndarray]:
        """The texts of records `start` to `stop`, exclusive.

        Returns:
          Which texts they are; int64 [records], the number of each record's; int64 [texts], their indices in their
          records.
        """
        bounds = np.asarray(self.text_starts[start : stop + 1])
        counts = np.diff(bounds)
        return slice(int(bounds[0]), int(bounds[-1])), counts, ranges(np.zeros(len(counts), np.int64), counts)

    def kept_tokens(self, texts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Tokens of texts cut to these lengths, in order: [sum of lengths].

        Args:
          texts: int [texts]; their indices.
          lengths: int [texts]; tokens that stay of each, at most all.

        Raises:
          UnreachableError: The tokens on disk are damaged; the next start makes them again.
        """
        assert self.tokens is not None
        assert self.token_starts is not None
        assert self.endings is not None
        starts, whole = np.asarray(self.token_starts[texts]), np.asarray(self.lengths[texts])
        kept = kept_indices(starts, whole, lengths, np.asarray(self.endings[texts]))
        if self.folder:
            self._check(kept * self.tokens.itemsize // CHECKED_BYTES)
        return np.asarray(self.tokens)[kept]

    def spans_of(self, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The spans of texts in order, int32 [spans, 2], and how many each text has, int64 [texts]."""
        starts = np.asarray(self.span_starts[texts])
        counts = np.asarray(self.span_starts[texts + 1]) - starts
        return np.asarray(self.spans[ranges(starts, counts)]), counts

    @functools.cached_property
    def fingerprint(self) -> Fingerprint:
        """Digests of the file's content."""
        if self.folder:
            return Fingerprint(*read_meta(self.folder)["fingerprint"])
        digests = Digests(tokens=self.tokens is not None)
        # Arrays of starts begin with a 0.
        digests.update({name: getattr(self, name)[1:] if name in STARTS else getattr(self, name) for name in digests})
        return digests.fingerprint()

    @functools.cached_property
    def _checked(self) -> np.ndarray:
        """Bool [blocks]: which ones this process has compared with their checksums."""
        return np.zeros_like(self.checksums, bool)

    def _check(self, blocks: np.ndarray) -> None:
        """Compares blocks with their checksums on first use: all at once would delay the start."""
        assert self.tokens is not None
        assert self.checksums is not None
        assert self.folder
        blocks = np.unique(blocks[np.flatnonzero(np.diff(blocks, prepend=-1))])
        blocks = blocks[~self._checked[blocks]]
        if np.any(checksums(self.tokens, blocks) != self.checksums[blocks]):
            try:
                (self.folder / _META).unlink()
                remedy = "the next start makes them again"
            except OSError as error:
                remedy = f"remove it; the next start then makes them again ({error})"
            raise files.UnreachableError(
                f"{self.folder}: tokens of {self.path} are damaged (tokens.npy differs from its checksums); {remedy}"
            )
        self._checked[blocks] = True


class IndexedFile(NamedTuple):
    """A file as one stream reads it.

    Attributes:
      number: The file's number among all files, the same for every stream.
      index: The file's texts as the stream formats them.
      stream: The stream.
    """

    number: int
    index: TokenIndex
    stream: Stream


def checksums(tokens: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """uint32 [blocks]: CRC-32 of the blocks with these numbers."""
    content = np.asarray(tokens).view(np.uint8).data
    starts = (blocks * CHECKED_BYTES).tolist()
    return np.array([zlib.crc32(content[start : start + CHECKED_BYTES]) for start in starts], np.uint32)


def num_targets(
    index: TokenIndex, limits: int | np.ndarray, texts: slice | np.ndarray = slice(None), *, first: int
) -> np.ndarray:
    """int32 [texts]: pooled or scored tokens of texts that are cut.

    Args:
      index: The file's.
      limits: Most tokens of all texts, or of each.
      texts: Which texts.
      first: Position of the first token of a text that counts.
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


def open_index(path: os.PathLike[str], folder: Path) -> TokenIndex:
    """Opens the index of a file in a folder; checks tokens when they are read, all else now.

    Raises:
      OSError: It is missing or cannot be read.
      ValueError or KeyError: It is damaged.
    """
    meta = read_meta(folder)
    for name, expected in meta["sha256"].items():
        if files.sha256(folder / name) != expected:
            raise ValueError(f"{name} differs from its checksum")
    arrays = {Path(name).stem: np.load(folder / name, mmap_mode="r") for name in meta["arrays"]}
    return TokenIndex(path, meta["kind"], **arrays, bad=BadRecords.from_json(meta["bad"]), folder=folder)


def read_meta(folder: Path) -> dict[str, Any]:
    """The description of an index; raises as `open_index`."""
    meta, checksum = json.loads((folder / _META).read_text())
    if _checksum(meta) != checksum:
        raise ValueError(f"{_META} differs from its checksum")
    return meta


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    """Writes what `read_meta` reads."""
    (folder / _META).write_text(json.dumps([meta, _checksum(meta)]))


def _checksum(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta).encode()).hexdigest()


class Digests:
    """Makes a `Fingerprint` from the arrays of consecutive ranges of records; iterates over the arrays' names."""

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
        """The fingerprint of all records added."""
        return Fingerprint(**{part: self._joined(names) for part, names in self._parts.items()})

    def _joined(self, names: Sequence[str]) -> str:
        return hashlib.sha256(b"".join(self._digests[name].digest() for name in names)).hexdigest()[:16]
