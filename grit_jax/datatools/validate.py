"""Every record checked: malformed ones, duplicates, and texts of evaluation sets."""

from __future__ import annotations

import array
import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
from etils import epath

from grit_jax.data.index import BadRecords, add_bad
from grit_jax.data.records import Record, RecordError
from grit_jax.data.sources import open_source
from grit_jax.data.streams import STREAMS
from grit_jax.data.streams.base import Stream
from grit_jax.datatools.overlap import EvaluationTexts, Match
from grit_jax.errors import InputError

_RECORDS_AT_ONCE = 1024
_EXAMPLES = 3


@dataclasses.dataclass(frozen=True)
class Duplicates:
    """Records that say what an earlier one says.

    Attributes:
      what: What is compared.
      count: Records with an earlier equal.
      examples: The first few, as a line that names both.
    """

    what: str
    count: int
    examples: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class FileReport:
    """One file.

    Attributes:
      path: The file.
      stream: Its stream; None where it cannot be opened.
      records: Well-formed records.
      bad: Malformed ones.
      problem: Why it cannot be opened.
    """

    path: str
    stream: str | None
    records: int
    bad: tuple[BadRecords, ...]
    problem: str | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """What was found."""

    files: tuple[FileReport, ...]
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
) -> Report:
    """Reads every record of the files once.

    Of each record 40 bytes are kept, to find equal ones.

    Args:
      paths: The files.
      against: Evaluation texts that must not occur.
      progress: Called with numbers of records that were read.
      streams: Streams that may read the files.
    """
    files, seen, kinds = [], _Seen(), [stream.record for stream in streams]
    for path in paths:
        try:
            source = open_source(path, skip_bad=True, kinds=kinds)
        except InputError as error:
            files.append(FileReport(str(path), None, 0, (), str(error)))
            continue
        bad: dict[str, BadRecords] = {}
        seen.open(source.where)
        good = 0
        texts: list[str] = []
        numbers: list[int] = []
        for start in range(0, len(source), _RECORDS_AT_ONCE):
            stop = min(start + _RECORDS_AT_ONCE, len(source))
            for number, line in enumerate(source.lines(start, stop), start):
                try:
                    record = source.parse(number, line)
                except RecordError as error:
                    add_bad(bad, [BadRecords(error.kind, 1, (str(error),))])
                    continue
                good += 1
                seen.add(number, record)
                if against:
                    of_record = record.texts()
                    texts += of_record
                    numbers += [number] * len(of_record)
            if against:
                against.look_up(texts, numbers, source.where)
                texts, numbers = [], []
            progress(stop - start)
        files.append(FileReport(str(path), source.kind.kind, good, tuple(bad.values())))
    matches = tuple(against.matches()) if against else ()
    return Report(tuple(files), seen.duplicates(), matches, against.counts if against else {})


class _Seen:
    """Hashes of the records read so far, and where each one is."""

    def __init__(self):
        self._where: list[Callable[[int], str]] = []
        self._starts: list[int] = []
        self._numbers = array.array("q")
        self._hashes: defaultdict[str, array.array[int]] = defaultdict(lambda: array.array("q"))
        self._owners: defaultdict[str, array.array[int]] = defaultdict(lambda: array.array("q"))

    def open(self, where: Callable[[int], str]) -> None:
        """Takes the next records from another file."""
        self._where.append(where)
        self._starts.append(len(self._numbers))

    def add(self, number: int, record: Record) -> None:
        """Adds a record."""
        place = len(self._numbers)
        self._numbers.append(number)
        for what, text in ({"records": repr(record)} | record.comparable()).items():
            self._note(what, text, place)

    def _note(self, what: str, text: str, place: int) -> None:
        self._hashes[what].append(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest()))
        self._owners[what].append(place)

    def duplicates(self) -> tuple[Duplicates, ...]:
        """What occurs more than once."""
        found = []
        for what, hashes in self._hashes.items():
            _, first, inverse = np.unique(np.frombuffer(hashes, np.int64), return_index=True, return_inverse=True)
            again = np.flatnonzero(first[inverse] != np.arange(len(inverse)))
            owners = self._owners[what]
            examples = [
                f"{self._place(owners[i])} repeats {self._place(owners[first[inverse[i]]])}" for i in again[:_EXAMPLES]
            ]
            if len(again):
                found.append(Duplicates(what, len(again), tuple(examples)))
        return tuple(found)

    def _place(self, place: int) -> str:
        file = int(np.searchsorted(self._starts, place, side="right")) - 1
        return self._where[file](self._numbers[place])
