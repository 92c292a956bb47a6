"""Checks every record: malformed ones, duplicates, and texts of evaluation sets."""

from __future__ import annotations

import array
import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
from etils import epath

from grit_jax.data.records import BadRecords, Record, RecordError, add_bad
from grit_jax.data.sources import RECORDS_AT_ONCE, Source, open_source
from grit_jax.data.streams import STREAMS
from grit_jax.data.streams.stream import Stream
from grit_jax.datatools.overlap import EvaluationTexts, Match
from grit_jax.errors import InputError

_EXAMPLES = 3


@dataclasses.dataclass(frozen=True)
class Duplicates:
    """Records that repeat an earlier one.

    Attributes:
      what: The parts compared.
      count: Number of records that repeat one.
      examples: The first few, each as a line that names both.
    """

    what: str
    count: int
    examples: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class FileCheck:
    """One file.

    Attributes:
      path: The file.
      stream: Its stream; None if it cannot be opened.
      records: Number of well-formed records.
      bad: Malformed records.
      problem: Why it cannot be opened.
    """

    path: str
    stream: str | None
    records: int
    bad: tuple[BadRecords, ...]
    problem: str | None = None


@dataclasses.dataclass(frozen=True)
class Validation:
    """All findings."""

    files: tuple[FileCheck, ...]
    duplicates: tuple[Duplicates, ...]
    matches: tuple[Match, ...]
    evaluation_texts: dict[str, int]

    @property
    def num_bad(self) -> int:
        """Malformed records, and files that cannot be opened."""
        return sum(sum(bad.count for bad in file.bad) + (file.problem is not None) for file in self.files)


def validate(
    paths: Sequence[epath.Path],
    *,
    against: EvaluationTexts | None = None,
    progress: Callable[[int], None] = lambda _: None,
    streams: Sequence[type[Stream]] = tuple(STREAMS.values()),
) -> Validation:
    """Reads every record of the files once, keeping 32 bytes of each to find duplicates.

    Args:
      paths: The files.
      against: Evaluation texts that the files must not contain.
      progress: Called with numbers of records read.
      streams: Streams that may read the files.
    """
    checks, seen, record_types = [], _Seen(), [stream.record for stream in streams]
    for path in paths:
        try:
            source = open_source(path, skip_bad=True, record_types=record_types)
        except InputError as error:
            checks.append(FileCheck(str(path), None, 0, (), str(error)))
            continue
        bad, good = dict[str, BadRecords](), 0
        seen.open(source)
        for start in range(0, len(source), RECORDS_AT_ONCE):
            stop = min(start + RECORDS_AT_ONCE, len(source))
            texts, owners = [], []
            for index, record in enumerate(source.records(start, stop), start):
                if isinstance(record, RecordError):
                    add_bad(bad, BadRecords.of(record))
                    continue
                good += 1
                seen.add(index, record)
                if against:
                    texts += record.texts()
                    owners += [index] * (len(texts) - len(owners))
            if against:
                against.look_up(texts, owners, source.where)
            progress(stop - start)
        checks.append(FileCheck(str(path), source.record_type.name, good, tuple(bad.values())))
    matches = tuple(against.matches()) if against else ()
    return Validation(tuple(checks), seen.duplicates(), matches, dict(against.counts) if against else {})


class _Seen:
    """Hashes of the records read so far, each with its number among the records of all files."""

    def __init__(self):
        self._sources: list[Source] = []
        self._ends = [0]
        self._hashes: defaultdict[str, array.array[int]] = defaultdict(lambda: array.array("q"))
        self._numbers: defaultdict[str, array.array[int]] = defaultdict(lambda: array.array("q"))

    def open(self, source: Source) -> None:
        """Takes the next records from another file."""
        self._sources.append(source)
        self._ends.append(self._ends[-1] + len(source))

    def add(self, index: int, record: Record) -> None:
        """Adds a record of the last file."""
        for what, text in ({"records": repr(record)} | record.comparable()).items():
            self._hashes[what].append(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest()))
            self._numbers[what].append(self._ends[-2] + index)

    def duplicates(self) -> tuple[Duplicates, ...]:
        """Records that occur more than once."""
        found = []
        for what, hashes in self._hashes.items():
            _, first, inverse = np.unique(np.frombuffer(hashes, np.int64), return_index=True, return_inverse=True)
            again = np.flatnonzero(first[inverse] != np.arange(len(inverse)))
            numbers = self._numbers[what]
            examples = [
                f"{self._where(numbers[i])} repeats {self._where(numbers[first[inverse[i]]])}"
                for i in again[:_EXAMPLES]
            ]
            if len(again):
                found.append(Duplicates(what, len(again), tuple(examples)))
        return tuple(found)

    def _where(self, number: int) -> str:
        file = int(np.searchsorted(self._ends, number, side="right")) - 1
        return self._sources[file].where(number - self._ends[file])
