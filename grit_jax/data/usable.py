"""The records that a stream can use, and facts about their texts, from the token indexes of its files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from grit_jax.data.streams.stream import RowPlan, Samples, Stream
from grit_jax.data.token_index import IndexedFile, num_targets
from grit_jax.text.prompts import HASH_BITS

_RECORDS_AT_ONCE = 1 << 20  # records whose lengths are examined together
_NO_LIMIT = np.iinfo(np.int32).max


class UsableFile:
    """The records of one file that a stream can use under its limits and that are not held out.

    Args:
      file: The file.
      held_out: Share of the records to hold out.

    Attributes:
      number: The file's number among all files.
      index: The file's texts.
      stream: The stream.
      dropped: Number of unusable records by reason.
      held_out: int64 [held out]; the held-out records, which would be usable.
    """

    def __init__(self, file: IndexedFile, *, held_out: float):
        self.number, self.index, self.stream = file
        self.dropped = {"empty text": 0, self.stream.no_room: 0}
        left_out, kept_back = [], []
        for start in range(0, self.index.num_records, _RECORDS_AT_ONCE):
            stop = min(start + _RECORDS_AT_ONCE, self.index.num_records)
            within, whole = self._usable(start, stop)
            held = self._is_held_out(start, stop, held_out)
            left_out.append(start + np.flatnonzero(~within | held))
            kept_back.append(start + np.flatnonzero(within & held))
            self.dropped["empty text"] += int(np.sum(~whole))
            self.dropped[self.stream.no_room] += int(np.sum(whole & ~within))
        # Most records are usable, so only the others are stored, each as the number of usable ones before it.
        numbers, self.held_out = (np.concatenate([np.zeros(0, np.int64), *parts]) for parts in (left_out, kept_back))
        self._usable_before = numbers - np.arange(len(numbers))

    @property
    def num_usable(self) -> int:
        """Number of usable records."""
        return self.index.num_records - len(self._usable_before)

    def records(self, which: np.ndarray) -> np.ndarray:
        """The records at these indices among the usable ones."""
        return which + np.searchsorted(self._usable_before, which, side="right")

    def samples(self) -> Samples:
        """All usable records, in the file's order."""
        return Samples(np.full(self.num_usable, self.number), self.records(np.arange(self.num_usable)))

    def fingerprint(self) -> str:
        """Equal for files with the same texts and the same usable records, whatever their structure."""
        digest = hashlib.sha256(b"" if len(self._usable_before) else b"all")
        for start in range(0, self.num_usable if len(self._usable_before) else 0, _RECORDS_AT_ONCE):
            usable = self.records(np.arange(start, min(start + _RECORDS_AT_ONCE, self.num_usable)))
            digest.update(usable.tobytes())
        return f"{self.index.fingerprint.texts} {digest.hexdigest()}"

    def targets(self, record: np.ndarray, text: np.ndarray) -> np.ndarray:
        """int32 [texts]: pooled or scored tokens within the limits."""
        texts = self.index.text_starts[record] + text
        return num_targets(self.index, self.stream.limits(text), texts, first=self.stream.first_target)

    def _is_held_out(self, start: int, stop: int, share: float) -> np.ndarray:
        """Bool [records]: which of records `start` to `stop` are held out, by the hash of their first text."""
        if not share:
            return np.zeros(stop - start, bool)
        first = np.asarray(self.index.text_starts[start:stop])
        return np.asarray(self.index.hashes[first]) < share * 2.0**HASH_BITS

    def _usable(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Bool [records] twice: which of records `start` to `stop` are usable within the limits, and without limits."""
        texts, counts, text = self.index.texts_of(start, stop)
        first = np.cumsum(counts) - counts
        positives = np.asarray(self.index.num_positives[start:stop])

        def usable(limits: np.ndarray) -> np.ndarray:
            ok = num_targets(self.index, limits, texts, first=self.stream.first_target) > 0
            return self.stream.usable(ok, first, positives)

        return usable(self.stream.limits(text)), usable(np.full(len(text), _NO_LIMIT, np.int32))


class StreamFiles:
    """The files of one stream, in the order of their numbers, and facts about their records and texts."""

    def __init__(self, stream: Stream, files: Sequence[UsableFile]):
        self.stream, self.files = stream, files
        self._by_number = {file.number: file for file in files}

    def num_texts(self, samples: Samples) -> np.ndarray:
        """int64 [samples]: texts of each record."""
        end_of = self._per_text(samples, samples.record, lambda f, r, _: f.index.text_starts[r + 1])
        return end_of - self._per_text(samples, samples.record, lambda f, r, _: f.index.text_starts[r])

    def num_positives(self, samples: Samples) -> np.ndarray:
        """int32 [samples]: positives of each record."""
        return self._per_text(samples, samples.record, lambda f, r, _: f.index.num_positives[r])

    def targets(self, samples: Samples, text: np.ndarray) -> np.ndarray:
        """int32 [texts]: pooled or scored tokens within the limits, of texts of the samples' records."""
        return self._per_text(samples, text, UsableFile.targets)

    def hashes(self, samples: Samples, text: np.ndarray) -> np.ndarray:
        """int64 [texts]: equal for equal formatted texts."""
        return self._per_text(samples, text, lambda f, r, t: f.index.hashes[f.index.text_starts[r] + t])

    def rows(self, samples: Samples, text: np.ndarray) -> RowPlan:
        """The texts packed into rows."""
        whole = self._per_text(samples, text, lambda f, r, t: f.index.lengths[f.index.text_starts[r] + t])
        length = np.minimum(whole, self.stream.limits(text))
        packing = self.stream.packed(length)
        where = (part.astype(np.int32) for part in (*samples, text))
        return RowPlan(packing.num_rows, *where, length, *packing[1:])

    def held_out(self) -> Samples:
        """The held-out records, in the order of the files."""
        found = [Samples(np.full(len(file.held_out), file.number), file.held_out) for file in self.files]
        none = Samples(*np.zeros((2, 0), np.int64))
        return Samples(*map(np.concatenate, zip(none, *found, strict=True)))

    def _per_text(
        self, samples: Samples, text: np.ndarray, values: Callable[[UsableFile, np.ndarray, np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """A value for each text, from a function of a file, its records and the texts' indices in them."""
        result: np.ndarray | None = None
        for number in np.unique(samples.file).tolist():
            mine = samples.file == number
            found = values(self._by_number[number], samples.record[mine].astype(np.int64), text[mine])
            result = np.zeros(len(mine), found.dtype) if result is None else result
            result[mine] = found
        return np.zeros(0, np.int64) if result is None else result
