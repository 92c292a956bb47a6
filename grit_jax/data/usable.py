"""The records that a stream can use, and what their texts are like: looked up in the indexes of its files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from grit_jax.data.batch import max_segments
from grit_jax.data.examples import HASH_BITS
from grit_jax.data.index import ReadFile, num_targets
from grit_jax.data.packing import pack, ranges
from grit_jax.data.streams.base import RowPlan, Samples, Stream

_RECORDS_AT_ONCE = 1 << 20  # records whose lengths are looked at together
_NO_LIMIT = np.iinfo(np.int32).max


class UsableFile:
    """The records of one file that a stream can use under its limits, without those that are held out.

    Args:
      file: The file.
      held_out: Share of the records that is held out.

    Attributes:
      number: Its number among all files.
      index: Its texts.
      stream: The stream.
      dropped: Number of unusable records by reason.
      held_out: int64; numbers of the records that would be usable and are held out.
    """

    def __init__(self, file: ReadFile, *, held_out: float):
        self.number, index, stream = file
        self.index, self.stream = index, stream
        self.dropped = {"empty text": 0, stream.no_room: 0}
        left_out, kept_back = [], []
        for start in range(0, index.num_records, _RECORDS_AT_ONCE):
            stop = min(start + _RECORDS_AT_ONCE, index.num_records)
            within, whole = self._usable(start, stop)
            held = self._is_held_out(start, stop, held_out)
            left_out.append(start + np.flatnonzero(~within | held))
            kept_back.append(start + np.flatnonzero(within & held))
            self.dropped["empty text"] += int(np.sum(~whole))
            self.dropped[stream.no_room] += int(np.sum(whole & ~within))
        # Most records are usable, so those that are not are kept: for each, how many usable ones come before it.
        numbers, self.held_out = (np.concatenate([np.zeros(0, np.int64), *parts]) for parts in (left_out, kept_back))
        self._usable_before = numbers - np.arange(len(numbers))

    @property
    def num_usable(self) -> int:
        """Usable records."""
        return self.index.num_records - len(self._usable_before)

    def records(self, which: np.ndarray) -> np.ndarray:
        """Record numbers of some of the usable records."""
        return which + np.searchsorted(self._usable_before, which, side="right")

    def samples(self) -> Samples:
        """All usable records, in the file's order."""
        return Samples(np.full(self.num_usable, self.number), self.records(np.arange(self.num_usable)))

    def fingerprint(self) -> str:
        """Equal for files with the same texts of which the same records are usable; their structure is left out."""
        digest = hashlib.sha256(b"" if len(self._usable_before) else b"all")
        for start in range(0, self.num_usable if len(self._usable_before) else 0, _RECORDS_AT_ONCE):
            usable = self.records(np.arange(start, min(start + _RECORDS_AT_ONCE, self.num_usable)))
            digest.update(usable.tobytes())
        return f"{self.index.fingerprint.texts} {digest.hexdigest()}"

    def targets(self, record: np.ndarray, text: np.ndarray) -> np.ndarray:
        """int32 [texts]: span tokens that truncation leaves of some texts."""
        texts = self.index.text_starts[record] + text
        return num_targets(self.index, self.stream.limits(text), texts, first=self.stream.first_target)

    def _is_held_out(self, start: int, stop: int, share: float) -> np.ndarray:
        """Which of records `start` to `stop` are held out, by the hash of their first text: bool [records]."""
        if not share:
            return np.zeros(stop - start, bool)
        first = np.asarray(self.index.text_starts[start:stop])
        return np.asarray(self.index.hashes[first]) < share * 2.0**HASH_BITS

    def _usable(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Whether records `start` to `stop` are usable within the limits, and without any: bool [records] each."""
        bounds = np.asarray(self.index.text_starts[start : stop + 1])
        counts = np.diff(bounds)
        text = ranges(np.zeros(len(counts), np.int64), counts)
        texts, first = slice(int(bounds[0]), int(bounds[-1])), bounds[:-1] - bounds[0]
        positives = np.asarray(self.index.num_positives[start:stop])

        def usable(limits: np.ndarray) -> np.ndarray:
            ok = num_targets(self.index, limits, texts, first=self.stream.first_target) > 0
            return self.stream.usable(ok, first, positives)

        return usable(self.stream.limits(text)), usable(np.full(len(text), _NO_LIMIT, np.int32))


class StreamFiles:
    """The files of one stream, in the order of their numbers, and what it asks of their indexes."""

    def __init__(self, stream: Stream, files: Sequence[UsableFile]):
        self.stream, self.files = stream, files
        self._by_number = {file.number: file for file in files}

    def num_texts(self, samples: Samples) -> np.ndarray:
        """int64 [samples]: texts of each record."""
        return self._per_record(samples, lambda f, r: f.index.text_starts[r + 1] - f.index.text_starts[r])

    def num_positives(self, samples: Samples) -> np.ndarray:
        """int32 [samples]: positives of each record."""
        return self._per_record(samples, lambda file, record: file.index.num_positives[record])

    def targets(self, samples: Samples, text: np.ndarray) -> np.ndarray:
        """int32 [texts]: tokens within the limits that are pooled or scored, of texts of the records of `samples`."""
        return self._per_text(samples, text, UsableFile.targets)

    def hashes(self, samples: Samples, text: np.ndarray) -> np.ndarray:
        """int64 [texts]: equal for equal formatted texts."""
        return self._per_text(samples, text, lambda f, r, t: f.index.hashes[f.index.text_starts[r] + t])

    def rows(self, samples: Samples, text: np.ndarray) -> RowPlan:
        """The texts packed into rows."""
        whole = self._per_text(samples, text, lambda f, r, t: f.index.lengths[f.index.text_starts[r] + t])
        length = np.minimum(whole, self.stream.limits(text))
        most = max_segments(self.stream.row_length) if self.stream.packing else 1
        packing = pack(length, row_length=self.stream.row_length, max_segments=most)
        where = (part.astype(np.int32) for part in (*samples, text))
        return RowPlan(packing.num_rows, *where, length, packing.row, packing.offset, packing.segment)

    def held_out(self) -> Samples:
        """The records that are held out, in the order of the files."""
        found = [Samples(np.full(len(file.held_out), file.number), file.held_out) for file in self.files]
        none = Samples(*np.zeros((2, 0), np.int64))
        return Samples(*map(np.concatenate, zip(none, *found, strict=True)))

    def _per_record(self, samples: Samples, values: Callable[[UsableFile, np.ndarray], np.ndarray]) -> np.ndarray:
        return self._per_text(samples, samples.record, lambda file, record, _: values(file, record))

    def _per_text(
        self, samples: Samples, text: np.ndarray, values: Callable[[UsableFile, np.ndarray, np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """One value for each text, given a function from a file, its records and the texts' numbers in them."""
        result: np.ndarray | None = None
        for number in np.unique(samples.file).tolist():
            mine = samples.file == number
            found = values(self._by_number[number], samples.record[mine].astype(np.int64), text[mine])
            result = np.zeros(len(mine), found.dtype) if result is None else result
            result[mine] = found
        return np.zeros(0, np.int64) if result is None else result
