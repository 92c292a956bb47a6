"""The endless orders in which a stream takes samples from its files, as functions of the place in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from grit_jax.data.shuffle import shuffled
from grit_jax.data.streams.base import Samples, Stream
from grit_jax.data.usable import UsableFile

_ORDER, _FILE, _POOL, _BATCH = range(3, 7)  # names of random streams; those below are the schedule's


class _Places(NamedTuple):
    """Places in the endless streams of some files: which of the files, and which place, int [samples] each."""

    file: np.ndarray
    place: np.ndarray


class Order:
    """The endless order in which one stream takes samples from some files, as a function of the place in it.

    Every epoch takes `epoch_sizes[f]` samples of file f: the next of the file's own endless stream of shuffles of all
    its records. So no record is taken twice before all of its file are taken once.

    Args:
      files: The files, each with usable records.
      epoch_sizes: Samples that an epoch takes of each.
      stream: The stream, which says how batches are taken.
      seed: Of the run.
      stage: Number of the stage of the curriculum.

    Attributes:
      stream: The stream.
      files: Its files.
      epoch_size: Samples of an epoch.
    """

    def __init__(
        self, files: Sequence[UsableFile], epoch_sizes: Sequence[int], stream: Stream, *, seed: int, stage: int
    ):
        self.stream, self.files = stream, files
        self._sizes, self._key = np.array(epoch_sizes, np.int64), (seed, stage, stream.code)
        self._ends = np.cumsum(self._sizes)
        self.epoch_size = int(self._ends[-1])

    def batch(self, k: int) -> Samples:
        """Batch `k`.

        Where the stream asks for it, it is of one file, or a mixture of what fills no batch, and each sample is in one
        batch of an epoch. Else the samples of all files are shuffled together.
        """
        return self._samples(self._places(k))

    def files_of_batch(self, k: int) -> list[int]:
        """Numbers of the files of batch `k`, without looking for their records."""
        return [self.files[which].number for which in np.unique(self._places(k).file)]

    def _places(self, k: int) -> _Places:
        places = self._of_one_file if self.stream.one_file else self._mixed
        return places(k, self.stream.batch_size)

    def _mixed(self, k: int, batch: int) -> _Places:
        epoch, place = np.divmod(np.arange(k * batch, (k + 1) * batch), self.epoch_size)
        place = shuffled(place, self.epoch_size, *self._key, _ORDER, epoch)
        file = np.searchsorted(self._ends, place, side="right")
        return _Places(file, epoch * self._sizes[file] + place - (self._ends - self._sizes)[file])

    def _of_one_file(self, k: int, batch: int) -> _Places:
        """The places of batch `k`, of one file where that is possible.

        Of the endless stream of epochs of N samples, batch k holds those numbered k * B to (k + 1) * B. So an epoch
        starts with the `head` that completes the batch which the epoch before began, and ends with the `tail` that
        begins the next one's first.
        """
        if self.epoch_size < batch:
            return self._mixed(k, batch)
        epoch, begin = divmod(k * batch, self.epoch_size)
        batches, head = self._one_file_batches(epoch, batch), -epoch * self.epoch_size % batch
        full = (self.epoch_size - head) // batch
        place = begin // batch
        if place == full:
            tail = np.arange(head + (full - batches.sum()) * batch, self.epoch_size - batches.sum() * batch)
            parts = self._pool(epoch, batch, tail), self._pool(epoch + 1, batch, np.arange(batch - len(tail)))
            return _Places(*map(np.concatenate, zip(*parts)))
        place = int(shuffled(np.array([place]), full, *self._key, _BATCH, epoch)[0])
        ends = np.cumsum(batches)
        if place >= ends[-1]:
            return self._pool(epoch, batch, head + (place - ends[-1]) * batch + np.arange(batch))
        file = int(np.searchsorted(ends, place, side="right"))
        first = epoch * self._sizes[file] + (place - ends[file] + batches[file]) * batch
        return _Places(np.full(batch, file), first + np.arange(batch))

    def _one_file_batches(self, epoch: int, batch: int) -> np.ndarray:
        """int64 [files]: batches of one file alone in an epoch. The pool of what is left holds at least the head."""
        batches = self._sizes // batch
        head = -epoch * self.epoch_size % batch
        if self.epoch_size - batches.sum() * batch < head:
            any_batch = shuffled(np.zeros(1, np.int64), int(batches.sum()), *self._key, _POOL, _BATCH, epoch)
            batches[np.searchsorted(np.cumsum(batches), any_batch[0], side="right")] -= 1
        return batches

    def _pool(self, epoch: int, batch: int, places: np.ndarray) -> _Places:
        """What is at some places of the shuffled pool of what an epoch's batches of one file leave."""
        batches = self._one_file_batches(epoch, batch)
        left = self._sizes - batches * batch
        ends = np.cumsum(left)
        places = shuffled(places, int(ends[-1]), *self._key, _POOL, epoch) if len(places) else places
        file = np.searchsorted(ends, places, side="right")
        within = places - (ends - left)[file] + batches[file] * batch
        return _Places(file, epoch * self._sizes[file] + within)

    def _samples(self, places: _Places) -> Samples:
        file, place = places
        record, number = np.zeros(len(file), np.int64), np.zeros(len(file), np.int64)
        for which in np.unique(file).tolist():
            mine, of = file == which, self.files[which]
            number[mine] = of.number
            times, within = np.divmod(place[mine], of.num_usable)
            record[mine] = of.records(shuffled(within, of.num_usable, *self._key, _FILE, of.number, times))
        return Samples(number, record)
