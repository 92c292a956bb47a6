"""The endless order in which a stream takes samples from its files, as a function of the index in that order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from grit_jax.data.shuffle import shuffled
from grit_jax.data.streams.stream import Samples, Stream
from grit_jax.data.usable import UsableFile

_ORDER, _FILE, _POOL, _BATCH = range(3, 7)  # names of random streams; lower numbers are the schedule's


class _Draws(NamedTuple):
    """Samples as indices of files, and indices in these files' endless shuffles; int [samples] each."""

    file: np.ndarray
    index: np.ndarray


class Order:
    """The endless order in which one stream takes samples from some files.

    Every epoch takes `epoch_sizes[f]` samples of file f: the next of the file's own endless sequence of shuffles. So no
    record is taken twice before every record of its file is taken once.

    Args:
      files: The files, each with usable records.
      epoch_sizes: Samples that an epoch takes of each.
      stream: The stream.
      seed: The run's.
      stage: Index of the stage of the curriculum.

    Attributes:
      files: The files.
      epoch_size: Samples of an epoch.
    """

    def __init__(
        self, files: Sequence[UsableFile], epoch_sizes: Sequence[int], stream: Stream, *, seed: int, stage: int
    ):
        self._stream, self.files = stream, files
        self._sizes, self._key = np.array(epoch_sizes, np.int64), (seed, stage, stream.code)
        self._ends = np.cumsum(self._sizes)
        self.epoch_size = int(self._ends[-1])

    def batch(self, k: int) -> Samples:
        """Batch `k`: from one file where `Stream.one_file` asks for that and the file can fill it, else a mixture."""
        return self._samples(self._draws(k))

    def files_of_batch(self, k: int) -> list[int]:
        """Numbers of the files of batch `k`."""
        return [self.files[which].number for which in np.unique(self._draws(k).file)]

    def _draws(self, k: int) -> _Draws:
        draws = self._of_one_file if self._stream.one_file else self._mixed
        return draws(k, self._stream.batch_size)

    def _mixed(self, k: int, batch: int) -> _Draws:
        epoch, index = np.divmod(np.arange(k * batch, (k + 1) * batch), self.epoch_size)
        index = shuffled(index, self.epoch_size, *self._key, _ORDER, epoch)
        file = np.searchsorted(self._ends, index, side="right")
        return _Draws(file, epoch * self._sizes[file] + index - (self._ends - self._sizes)[file])

    def _of_one_file(self, k: int, batch: int) -> _Draws:
        """Batch `k`, from one file where possible.

        Batch k holds samples k * batch to (k + 1) * batch of the endless sequence of epochs. So an epoch starts with
        the `head` that completes the last batch of the previous epoch, and ends with the `tail` that begins the first
        batch of the next.
        """
        if self.epoch_size < batch:
            return self._mixed(k, batch)
        epoch, begin = divmod(k * batch, self.epoch_size)
        batches, head = self._one_file_batches(epoch, batch), -epoch * self.epoch_size % batch
        full = (self.epoch_size - head) // batch
        index = begin // batch
        if index == full:
            tail = np.arange(head + (full - batches.sum()) * batch, self.epoch_size - batches.sum() * batch)
            parts = self._pool(epoch, batch, tail), self._pool(epoch + 1, batch, np.arange(batch - len(tail)))
            return _Draws(*map(np.concatenate, zip(*parts)))
        index = int(shuffled(np.array([index]), full, *self._key, _BATCH, epoch)[0])
        ends = np.cumsum(batches)
        if index >= ends[-1]:
            return self._pool(epoch, batch, head + (index - ends[-1]) * batch + np.arange(batch))
        file = int(np.searchsorted(ends, index, side="right"))
        first = epoch * self._sizes[file] + (index - ends[file] + batches[file]) * batch
        return _Draws(np.full(batch, file), first + np.arange(batch))

    def _one_file_batches(self, epoch: int, batch: int) -> np.ndarray:
        """int64 [files]: an epoch's one-file batches of each file. The samples left over fill at least the head."""
        batches = self._sizes // batch
        head = -epoch * self.epoch_size % batch
        if self.epoch_size - batches.sum() * batch < head:
            any_batch = shuffled(np.zeros(1, np.int64), int(batches.sum()), *self._key, _POOL, _BATCH, epoch)
            batches[np.searchsorted(np.cumsum(batches), any_batch[0], side="right")] -= 1
        return batches

    def _pool(self, epoch: int, batch: int, indices: np.ndarray) -> _Draws:
        """The draws at some indices of the shuffled pool of samples that are in no batch of one file."""
        batches = self._one_file_batches(epoch, batch)
        left = self._sizes - batches * batch
        ends = np.cumsum(left)
        indices = shuffled(indices, int(ends[-1]), *self._key, _POOL, epoch) if len(indices) else indices
        file = np.searchsorted(ends, indices, side="right")
        within = indices - (ends - left)[file] + batches[file] * batch
        return _Draws(file, epoch * self._sizes[file] + within)

    def _samples(self, draws: _Draws) -> Samples:
        file, index = draws
        record, number = np.zeros(len(file), np.int64), np.zeros(len(file), np.int64)
        for which in np.unique(file).tolist():
            mine, of = file == which, self.files[which]
            number[mine] = of.number
            times, within = np.divmod(index[mine], of.num_usable)
            record[mine] = of.records(shuffled(within, of.num_usable, *self._key, _FILE, of.number, times))
        return Samples(number, record)
