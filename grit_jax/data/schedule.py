"""What every step consists of: a pure function of seed, files and step number.

Nothing here reads a token. From the indexes alone it decides which texts a step takes, where each of them is packed
and what it weighs, the same on every host and without looking at earlier steps.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from grit_jax.batch import max_segments
from grit_jax.config import DataConfig, InputError, LossConfig, StageConfig, TrainConfig
from grit_jax.data.examples import HASH_BITS
from grit_jax.data.index import FileIndex, num_targets
from grit_jax.data.packing import choose_buckets, pack, ranges, round_up
from grit_jax.data.records import Stream
from grit_jax.data.shuffle import shuffled

_LAWS = 2  # raised when the same settings give other batches than before
_SAMPLED_STEPS = 64  # steps whose packing decides the row buckets
_RECORDS_AT_ONCE = 1 << 20  # records whose lengths are looked at together
_NO_LIMIT = np.iinfo(np.int32).max
_EMBEDDING, _GENERATIVE, _PICK, _ORDER, _FILE, _POOL, _BATCH = range(7)  # names of the random streams


class RowPlan(NamedTuple):
    """Where each text of a stream goes.

    Attributes:
      num_rows: Rows of the batch, rounded up to a bucket.
      file: int32 [texts]; number of the file.
      record: int32 [texts]; number of the record in the file.
      text: int32 [texts]; number of the text in the record.
      length: int32 [texts]; tokens that are kept.
      row: int32 [texts].
      offset: int32 [texts].
      segment: int32 [texts], from 1.
    """

    num_rows: int
    file: np.ndarray
    record: np.ndarray
    text: np.ndarray
    length: np.ndarray
    row: np.ndarray
    offset: np.ndarray
    segment: np.ndarray


class EmbeddingPlan(NamedTuple):
    """The embedding half of a step; see `EmbeddingBatch` for slots, weights and ids.

    Attributes:
      rows: Where its texts are.
      slots_per_row: Texts that a row may hold.
      query_texts: int [queries]; number of each query's text in `rows`, that of a filler is any.
      passage_texts: int [queries * group]; likewise.
      query_weights: float32 [queries].
      passage_ids: int32 [queries * group].
    """

    rows: RowPlan
    slots_per_row: int
    query_texts: np.ndarray
    passage_texts: np.ndarray
    query_weights: np.ndarray
    passage_ids: np.ndarray

    @property
    def query_slots(self) -> np.ndarray:
        """int32 [queries]."""
        return self._slots[self.query_texts]

    @property
    def passage_slots(self) -> np.ndarray:
        """int32 [queries * group]."""
        return self._slots[self.passage_texts]

    @property
    def _slots(self) -> np.ndarray:
        return self.rows.row * np.int32(self.slots_per_row) + self.rows.segment - 1


class GenerativePlan(NamedTuple):
    """The generative half of a step; `token_weights` float32 [texts] is what each scored token of a text weighs."""

    rows: RowPlan
    token_weights: np.ndarray


class StepPlan(NamedTuple):
    """Both halves of a step; a stream that is not trained is None."""

    embedding: EmbeddingPlan | None
    generative: GenerativePlan | None


class Samples(NamedTuple):
    """Records in an order: file and record numbers, int [samples] each."""

    file: np.ndarray
    record: np.ndarray


# For each text of some records a number; of a record's usable positives the one with the smallest is taken, and of its
# negatives those with the smallest ones.
Ranks = Callable[[int], np.ndarray]


class _File:
    """The usable records of one file under the length limits, without those that are held out.

    Attributes:
      number: Its number among all files.
      dropped: Number of unusable records by reason.
      held_out: int64; numbers of the records that would be usable and are held out.
    """

    def __init__(self, number: int, index: FileIndex, data: DataConfig):
        self.number, self.index, self._data = number, index, data
        no_room = (
            "instruction leaves no room" if index.stream == "embedding" else "prompt leaves no room for the answer"
        )
        self.dropped = {"empty text": 0, no_room: 0}
        left_out, held_out = [], []
        for start in range(0, index.num_records, _RECORDS_AT_ONCE):
            stop = min(start + _RECORDS_AT_ONCE, index.num_records)
            within, whole = self._usable(start, stop)
            held = self._is_held_out(start, stop)
            left_out.append(start + np.flatnonzero(~within | held))
            held_out.append(start + np.flatnonzero(within & held))
            self.dropped["empty text"] += int(np.sum(~whole))
            self.dropped[no_room] += int(np.sum(whole & ~within))
        # Most records are usable, so those that are not are kept: for each, how many usable ones come before it.
        numbers, self.held_out = (np.concatenate([np.zeros(0, np.int64), *parts]) for parts in (left_out, held_out))
        self._usable_before = numbers - np.arange(len(numbers))

    @property
    def num_usable(self) -> int:
        """Usable records."""
        return self.index.num_records - len(self._usable_before)

    def records(self, which: np.ndarray) -> np.ndarray:
        """Record numbers of some of the usable records."""
        return which + np.searchsorted(self._usable_before, which, side="right")

    def fingerprint(self) -> str:
        """Equal for files with the same texts of which the same records are usable; their structure is left out."""
        digest = hashlib.sha256(b"" if len(self._usable_before) else b"all")
        for start in range(0, self.num_usable if len(self._usable_before) else 0, _RECORDS_AT_ONCE):
            usable = self.records(np.arange(start, min(start + _RECORDS_AT_ONCE, self.num_usable)))
            digest.update(usable.tobytes())
        return f"{self.index.fingerprint.texts} {digest.hexdigest()}"

    def limits(self, text: np.ndarray) -> np.ndarray:
        """int32 [texts]: most tokens of texts with these numbers in their records."""
        if self.index.stream == "generative":
            return np.full(len(text), self._data.generative_max_length, np.int32)
        return np.where(text == 0, self._data.query_max_length, self._data.passage_max_length).astype(np.int32)

    def targets(self, record: np.ndarray, text: np.ndarray) -> np.ndarray:
        """int32 [texts]: span tokens that truncation leaves of some texts."""
        return num_targets(self.index, self.limits(text), self.index.text_starts[record] + text)

    def _is_held_out(self, start: int, stop: int) -> np.ndarray:
        """Which of records `start` to `stop` are held out, by the hash of their first text: bool [records]."""
        if not self._data.held_out:
            return np.zeros(stop - start, bool)
        first = np.asarray(self.index.text_starts[start:stop])
        return np.asarray(self.index.hashes[first]) < self._data.held_out * 2.0**HASH_BITS

    def _usable(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Whether records `start` to `stop` are usable within the limits, and without any: bool [records] each."""
        bounds = np.asarray(self.index.text_starts[start : stop + 1])
        counts = np.diff(bounds)
        text = ranges(np.zeros(len(counts), np.int64), counts)
        texts, first = slice(int(bounds[0]), int(bounds[-1])), bounds[:-1] - bounds[0]
        results = []
        for limits in (self.limits(text), np.full(len(text), _NO_LIMIT, np.int32)):
            ok = num_targets(self.index, limits, texts) > 0
            usable = ok[first]
            if self.index.stream == "embedding":
                sums = np.concatenate([[0], np.cumsum(ok)])
                positives = np.asarray(self.index.num_positives[start:stop])
                usable = usable & (sums[first + 1 + positives] > sums[first + 1])
            results.append(usable)
        return results[0], results[1]


class _Planner:
    """Places samples in rows and gives them their weights."""

    def __init__(self, indexes: Sequence[FileIndex], data: DataConfig):
        self.files = [_File(number, index, data) for number, index in enumerate(indexes)]
        self._data = data

    def dropped_lines(self) -> list[str]:
        """What was left out of each file, and why."""
        lines = []
        for file in self.files:
            index = file.index
            total = index.num_records + sum(bad.count for bad in index.bad)
            lines += [
                f"{index.path}: skipped {bad.count:,} of {total:,} records: {bad.kind}; for example {bad.examples[0]}"
                for bad in index.bad
            ]
            lines += [
                f"{index.path}: dropped {count:,} of {total:,} records: {reason}"
                for reason, count in file.dropped.items()
                if count
            ]
        return lines

    def embedding(self, samples: Samples, ranks: Ranks, *, query_weight: float, batch: int) -> EmbeddingPlan:
        """Queries, positives and negatives of the samples; fillers make a short batch whole."""
        group = self._data.group_size
        texts = self._groups(samples, ranks)
        present = texts >= 0
        owner = np.nonzero(present)[0]
        rows = self._rows(samples.file[owner], samples.record[owner], texts[present], self._data.embedding_row_length)
        number, ids = np.zeros((batch, 1 + group), int), np.full((batch, 1 + group), -1, np.int32)
        filled = np.zeros((batch, 1 + group), bool)
        filled[: len(texts)] = present
        number[filled] = np.arange(len(owner))
        if self._data.exclude_duplicates:
            ids[filled] = np.unique(self._hashes(rows), return_inverse=True)[1]
            ids[filled[:, 0], 1:] = _with_positives_of_equal_queries(ids[filled[:, 0]])
        else:
            ids[filled] = number[filled]
        weights = np.where(np.arange(batch) < len(texts), query_weight, 0).astype(np.float32)
        slots_per_row = max_segments(self._data.embedding_row_length)
        query, passages = number[:, 0], number[:, 1:].reshape(-1)
        return EmbeddingPlan(rows, slots_per_row, query, passages, weights, ids[:, 1:].reshape(-1))

    def generative(self, samples: Samples) -> tuple[RowPlan, np.ndarray]:
        """Rows of the samples' conversations, and the scored tokens of each, int32 [samples]."""
        text = np.zeros(len(samples.file), int)
        rows = self._rows(*samples, text, self._data.generative_max_length)
        return rows, self._per_text(*samples, text, _File.targets)

    def _groups(self, samples: Samples, ranks: Ranks) -> np.ndarray:
        """Numbers of query, positive and negatives in their record, int [samples, 1 + group]; -1 where there is none.

        Negatives are taken again, in the same order, where a record has too few.
        """
        zeros = np.zeros(len(samples.file), int)
        starts = self._per_text(*samples, zeros, lambda file, record, _: file.index.text_starts[record])
        counts = self._per_text(*samples, zeros, lambda file, record, _: file.index.text_starts[record + 1]) - starts
        positives = self._per_text(*samples, zeros, lambda file, record, _: file.index.num_positives[record])
        owner = np.repeat(np.arange(len(counts)), counts)
        text = ranges(zeros, counts)
        usable = self._per_text(samples.file[owner], samples.record[owner], text, _File.targets) > 0
        kind = np.where(usable, np.where(text == 0, 0, np.where(text <= positives[owner], 1, 2)), 3)
        order = np.lexsort((ranks(len(text)), kind, owner))
        num_positives, num_negatives = (np.bincount(owner[kind == k], minlength=len(counts)) for k in (1, 2))
        positive = np.cumsum(counts) - counts + 1
        places = np.arange(self._data.group_size - 1) % np.maximum(num_negatives, 1)[:, None]
        negative = (positive + num_positives)[:, None] + np.where(num_negatives[:, None], places, 0)
        negative = np.minimum(negative, len(order) - 1)  # the last record has nothing behind its positives
        return np.column_stack(
            [zeros, text[order[positive]], np.where(num_negatives[:, None], text[order[negative]], -1)]
        )

    def _rows(self, file: np.ndarray, record: np.ndarray, text: np.ndarray, row_length: int) -> RowPlan:
        whole = self._per_text(file, record, text, lambda f, r, t: f.index.lengths[f.index.text_starts[r] + t])
        length = np.minimum(whole, self._per_text(file, record, text, lambda f, _, t: f.limits(t)))
        most = max_segments(row_length) if self._data.packing else 1
        packing = pack(length, row_length=row_length, max_segments=most)
        place = (part.astype(np.int32) for part in (file, record, text))
        return RowPlan(packing.num_rows, *place, length, packing.row, packing.offset, packing.segment)

    def _hashes(self, rows: RowPlan) -> np.ndarray:
        return self._per_text(
            rows.file, rows.record, rows.text, lambda f, r, t: f.index.hashes[f.index.text_starts[r] + t]
        )

    def _per_text(
        self,
        file: np.ndarray,
        record: np.ndarray,
        text: np.ndarray,
        values: Callable[[_File, np.ndarray, np.ndarray], np.ndarray],
    ) -> np.ndarray:
        """One value for each text, given a function from a file, its records and the texts' numbers in them."""
        result: np.ndarray | None = None
        for number in np.unique(file).tolist():
            mine = file == number
            found = values(self.files[number], record[mine].astype(np.int64), text[mine])
            result = np.zeros(len(file), found.dtype) if result is None else result
            result[mine] = found
        return np.zeros(0, np.int64) if result is None else result


class _Places(NamedTuple):
    """Places in the endless streams of some files: which of the files, and which place, int [samples] each."""

    file: np.ndarray
    place: np.ndarray


class _Order:
    """The endless order in which one stream takes samples from some files, as a function of the place in it.

    Every epoch takes `epoch_sizes[f]` samples of file f: the next of the file's own endless stream of shuffles of all
    its records. So no record is taken twice before all of its file are taken once.

    Args:
      files: The files, each with usable records.
      epoch_sizes: Samples that an epoch takes of each.
      seed: Of the run.
      stream: `_EMBEDDING` or `_GENERATIVE`.
      stage: Number of the stage of the curriculum.
    """

    def __init__(self, files: Sequence[_File], epoch_sizes: Sequence[int], *, seed: int, stream: int, stage: int):
        self.files, self._sizes, self._key = files, np.array(epoch_sizes, np.int64), (seed, stage, stream)
        self._ends = np.cumsum(self._sizes)
        self.epoch_size = int(self._ends[-1])

    def mixed_batch(self, k: int, batch: int) -> Samples:
        """Batch `k` of the stream of epochs in which the samples of all files are shuffled together."""
        return self._samples(self._mixed(k, batch))

    def batch_of_one_file(self, k: int, batch: int) -> Samples:
        """Batch `k`: of one file, or a mixture of what fills no batch; each sample once in an epoch."""
        return self._samples(self._of_one_file(k, batch))

    def files_of_batch(self, k: int, batch: int) -> list[int]:
        """Numbers of the files of `batch_of_one_file`, without looking for their records."""
        return [self.files[which].number for which in np.unique(self._of_one_file(k, batch).file)]

    def _mixed(self, k: int, batch: int) -> _Places:
        epoch, place = np.divmod(np.arange(k * batch, (k + 1) * batch), self.epoch_size)
        place = shuffled(place, self.epoch_size, *self._key, _ORDER, epoch)
        file = np.searchsorted(self._ends, place, side="right")
        return _Places(file, epoch * self._sizes[file] + place - (self._ends - self._sizes)[file])

    def _of_one_file(self, k: int, batch: int) -> _Places:
        """The places of batch `k` of `batch_of_one_file`.

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


class _Stage(NamedTuple):
    """A range of steps with its own files.

    Attributes:
      first: First step.
      last: Last step, exclusive; None for the last stage.
      embedding: Order of the embedding stream, None where it is not trained.
      generative: The same of the generative stream.
    """

    first: int
    last: int | None
    embedding: _Order | None
    generative: _Order | None


class Schedule:
    """The training steps.

    Args:
      indexes: Indexes of the training files.
      data: Batch sizes, limits and sampling.
      loss: Normalisation of the LM loss.
      train: Seed, steps and mode.
      row_multiples: Row counts of the embedding and generative batch are multiples of these.

    Attributes:
      embedding_buckets: Row counts of embedding batches.
      generative_buckets: Row counts of generative batches.

    Raises:
      InputError: A stream that is trained has no usable record, or a setting names no file.
    """

    def __init__(
        self,
        indexes: Sequence[FileIndex],
        *,
        data: DataConfig,
        loss: LossConfig,
        train: TrainConfig,
        row_multiples: tuple[int, int],
    ):
        self._planner = _Planner(indexes, data)
        self._data, self._loss, self._train, self._row_multiples = data, loss, train, row_multiples
        self._stages: list[_Stage] = []
        for number, stage in enumerate(data.curriculum or [StageConfig()]):
            first = self._stages[-1].last if self._stages else 0
            assert first is not None
            last = None if stage.steps is None else first + stage.steps
            self._stages.append(_Stage(first, last, *self._orders(number, stage)))
        if data.held_out:
            self._refuse_nothing_held_out()
        batches = (data.embedding_batch, data.generative_batch)
        self.embedding_buckets, self.generative_buckets = (
            self._buckets(stream, batch, multiple)
            for stream, batch, multiple in zip(("embedding", "generative"), batches, row_multiples, strict=True)
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        """Names the data: equal when every file holds the same records, tokenized and cut in the same way.

        It has three parts, for the texts, for what they are in their records and for their tokens; see `same_data`.
        """
        texts = [str(_LAWS), *(file.fingerprint() for file in self._planner.files)]
        structure = [file.index.fingerprint.structure for file in self._planner.files]
        tokens = [file.index.fingerprint.tokens for file in self._planner.files]
        return "-".join(hashlib.sha256(" ".join(part).encode()).hexdigest()[:16] for part in (texts, structure, tokens))

    def step(self, k: int) -> StepPlan:
        """Step `k`, counted from 0."""
        embedding, generative = self._embedding_plan(k), self._generative_plan(k)
        pieces = self._row_multiples
        return StepPlan(
            embedding and embedding._replace(rows=_dealt(embedding.rows, self.embedding_buckets, pieces[0])),
            generative and generative._replace(rows=_dealt(generative.rows, self.generative_buckets, pieces[1])),
        )

    def samples(self, k: int, stream: Stream) -> Samples:
        """The records of a stream that step `k` takes, in sample order, without planning their rows."""
        stage, number = self._stage(k)
        if stream == "embedding" and stage.embedding:
            return stage.embedding.batch_of_one_file(number, self._data.embedding_batch)
        if stream == "generative" and stage.generative:
            return stage.generative.mixed_batch(number, self._data.generative_batch)
        return Samples(np.zeros(0, np.int64), np.zeros(0, np.int64))

    def embedding_files(self, k: int) -> list[int]:
        """Numbers of the files that the embedding batch of step `k` is taken from, without its records."""
        stage, number = self._stage(k)
        return stage.embedding.files_of_batch(number, self._data.embedding_batch) if stage.embedding else []

    def generative_rows(self, k: int) -> RowPlan:
        """Where the conversations of step `k` are."""
        plan = self._generative_plan(k)
        assert plan, "step without a generative stream"
        return _dealt(plan.rows, self.generative_buckets, self._row_multiples[1])

    def report(self) -> list[str]:
        """Lines for people: samples, epochs, row counts, what was dropped."""
        lines = []
        for stream, batch, buckets in (
            ("embedding", self._data.embedding_batch, self.embedding_buckets),
            ("generative", self._data.generative_batch, self.generative_buckets),
        ):
            for stage in self._stages:
                order = getattr(stage, stream)
                if order is None:
                    continue
                steps = f" from step {stage.first + 1:,}" if len(self._stages) > 1 else ""
                lines.append(
                    f"{stream}{steps}: {order.epoch_size:,} samples in {len(order.files)} files, "
                    f"{order.epoch_size / batch:,.1f} steps an epoch, batches of {' or '.join(map(str, buckets))} rows"
                )
                if order.epoch_size < batch:
                    what = "is more than an epoch, so a batch repeats samples"
                    lines.append(f"{stream}{steps}: data.{stream}_batch={batch} {what}")
        for stream in _trained(self._train) if self._data.held_out else ():
            lines.append(f"{stream}: {len(self._held_out_samples(stream).file):,} records held out, never trained on")
        return lines + self._planner.dropped_lines()

    def held_out_steps(self) -> list[StepPlan]:
        """Plans that hold every record once that `data.held_out` keeps from training, as those of `validation_steps`.

        Batches take them in the order of the files, and go from one file to the next: few of each are held out.
        """
        batches = []
        for stream in _trained(self._train) if self._data.held_out else ():
            samples, size = self._held_out_samples(stream), getattr(self._data, f"{stream}_batch")
            for start in range(0, len(samples.file), size):
                batches.append((stream, Samples(*(part[start : start + size] for part in samples))))
        return _evaluation_plans(self._planner, batches, self._data, self._row_multiples)

    def _held_out_samples(self, stream: Stream) -> Samples:
        found = [
            Samples(np.full(len(file.held_out), file.number), file.held_out)
            for file in self._planner.files
            if file.index.stream == stream
        ]
        return (
            Samples(*map(np.concatenate, zip(*found, strict=True))) if found else Samples(*np.zeros((2, 0), np.int64))
        )

    def _refuse_nothing_held_out(self) -> None:
        for stream in _trained(self._train):
            if not len(self._held_out_samples(stream).file):
                count = sum(file.num_usable for file in self._planner.files if file.index.stream == stream)
                raise InputError(
                    f"data.held_out={self._data.held_out} holds out none of {count:,} {stream} records; raise it, or "
                    "set it to 0 and name data.validation"
                )

    def _orders(self, number: int, stage: StageConfig) -> tuple[_Order | None, _Order | None]:
        """The order of each stream in a stage."""
        where = f"data.curriculum[{number}]" if self._data.curriculum else "data"
        files = self._planner.files
        names = [file.index.name for file in files]
        num_samples = self._data.num_samples | stage.num_samples
        _check_num_samples("data.num_samples", self._data.num_samples, names)
        _check_num_samples(f"{where}.num_samples", stage.num_samples, names)
        for pattern in stage.files:
            if not fnmatch.filter(names, pattern):
                raise InputError(
                    f"{where}.files names {pattern!r}, which is no file of data.train; {_hint(pattern, names)}"
                )
        orders = []
        for stream, code, trained in (
            ("embedding", _EMBEDDING, self._train.embeds),
            ("generative", _GENERATIVE, self._train.generates),
        ):
            if not trained:
                orders.append(None)
                continue
            used, sizes = [], []
            for file in files:
                named = not stage.files or any(fnmatch.fnmatchcase(file.index.name, pattern) for pattern in stage.files)
                size = num_samples.get(file.index.name, file.num_usable)
                if file.index.stream == stream and named and file.num_usable and size:
                    used.append(file)
                    sizes.append(size)
            if not used:
                self._refuse(stream, where if stage.files else "data.train")
            orders.append(_Order(used, sizes, seed=self._train.seed, stream=code, stage=number))
        return orders[0], orders[1]

    def _refuse(self, stream: Stream, where: str) -> None:
        dropped = "; ".join(self._planner.dropped_lines()) or "no file holds that stream"
        other = "generative" if stream == "embedding" else "embedding"
        raise InputError(
            f"{where} has no usable {stream} record ({dropped}), and train.mode={self._train.mode} trains that stream; "
            f"add such data or set train.mode={other}"
        )

    def _stage(self, k: int) -> tuple[_Stage, int]:
        """The stage of step `k`, and its number in it."""
        stage = next(stage for stage in self._stages if stage.last is None or k < stage.last)
        return stage, k - stage.first

    def _buckets(self, stream: Stream, batch: int, multiple: int) -> tuple[int, ...]:
        needed = []
        for stage in self._stages:
            order = getattr(stage, stream)
            if order is None:
                return ()
            epoch = -(-order.epoch_size // batch)
            # An epoch, or more when that is short, but no step of another stage.
            steps = min(max(_SAMPLED_STEPS, epoch), (stage.last or np.inf) - stage.first)
            for k in np.unique(np.linspace(stage.first, stage.first + steps - 1, _SAMPLED_STEPS).astype(int)).tolist():
                plan = self._embedding_plan(k) if stream == "embedding" else self._generative_plan(k)
                assert plan
                needed.append(plan.rows.num_rows)
        return choose_buckets(np.array(needed), multiple=multiple, limit=self._data.row_buckets)

    def _embedding_plan(self, k: int) -> EmbeddingPlan | None:
        stage, number = self._stage(k)
        if stage.embedding is None:
            return None
        batch = self._data.embedding_batch
        samples = stage.embedding.batch_of_one_file(number, batch)
        ranks = np.random.default_rng((self._train.seed, _EMBEDDING, _PICK, k)).random
        return self._planner.embedding(samples, ranks, query_weight=1 / batch, batch=batch)

    def _generative_plan(self, k: int) -> GenerativePlan | None:
        stage, number = self._stage(k)
        if stage.generative is None:
            return None
        rows, scored = self._planner.generative(stage.generative.mixed_batch(number, self._data.generative_batch))
        return GenerativePlan(rows, token_weights(scored, self._loss))


def same_data(recorded: str, fingerprint: str) -> bool:
    """Whether a run that recorded a fingerprint was trained on the data that have this one now.

    Runs made before fingerprints named the records' structure, or the tokens, have the parts before these alone, and
    are held to those.
    """
    return f"{fingerprint}-".startswith(f"{recorded}-")


def validation_steps(
    indexes: Sequence[FileIndex], *, data: DataConfig, train: TrainConfig, row_multiples: tuple[int, int]
) -> list[StepPlan]:
    """Plans that hold every usable record once, in file order, with its first positive and first negatives.

    A query and a scored token weigh 1, so that callers divide sums by sums of weights. Batches have the sizes of
    training, the last one of a file is completed with fillers; each plan has one stream.
    """
    planner = _Planner(indexes, dataclasses.replace(data, held_out=0.0))
    batches = []
    for file in planner.files:
        stream = file.index.stream
        if stream not in _trained(train):
            continue
        size = getattr(data, f"{stream}_batch")
        for start in range(0, file.num_usable, size):
            record = file.records(np.arange(start, min(start + size, file.num_usable)))
            batches.append((stream, Samples(np.full(len(record), file.number), record)))
    return _evaluation_plans(planner, batches, data, row_multiples)


def _trained(train: TrainConfig) -> tuple[Stream, ...]:
    streams: dict[Stream, bool] = {"embedding": train.embeds, "generative": train.generates}
    return tuple(stream for stream, trained in streams.items() if trained)


def _evaluation_plans(
    planner: _Planner, batches: Sequence[tuple[Stream, Samples]], data: DataConfig, row_multiples: tuple[int, int]
) -> list[StepPlan]:
    """A plan for each batch, in which a query and a scored token weigh 1."""
    plans = []
    for stream, samples in batches:
        if stream == "embedding":
            plan = planner.embedding(samples, np.arange, query_weight=1, batch=data.embedding_batch)
            plans.append(StepPlan(plan, None))
        else:
            rows, scored = planner.generative(samples)
            plans.append(StepPlan(None, GenerativePlan(rows, np.ones(len(scored), np.float32))))
    return [_round_validation(plan, plans, row_multiples, data.row_buckets) for plan in plans]


def token_weights(scored: np.ndarray, loss: LossConfig) -> np.ndarray:
    """float32 [samples]: what each scored token of a sample weighs in L_gen.

    Args:
      scored: int [samples]; scored tokens of each sample, in sample order.
      loss: Which normalisation: see `LossConfig.type`.
    """
    if loss.type == "token":
        return np.full(len(scored), 1 / len(scored), np.float32)
    size = loss.sub_batch_samples if loss.type == "mixed" and loss.sub_batch_samples else len(scored)
    starts = np.arange(0, len(scored), size)
    totals = np.add.reduceat(scored.astype(np.int64), starts)
    return np.repeat(1 / (len(starts) * totals), size)[: len(scored)].astype(np.float32)


def _with_positives_of_equal_queries(ids: np.ndarray) -> np.ndarray:
    """Ids of passages, [queries, group], that are equal too where passages are positives of equal queries.

    Args:
      ids: int [queries, 1 + group]; equal for equal texts, -1 for fillers. The first text is the query, the second its
        positive.
    """
    size = ids.max() + 1
    queries, positives = ids[:, 0], ids[:, 1]
    edges = coo_array((np.ones(len(ids)), (queries, size + positives)), shape=(2 * size, 2 * size))
    labels = connected_components(edges, directed=False)[1][size:]
    return np.where(ids[:, 1:] == -1, -1, labels[ids[:, 1:]])


def _round_validation(plan: StepPlan, plans: list[StepPlan], multiples: tuple[int, int], limit: int) -> StepPlan:
    rounded = {}
    for name, multiple in zip(StepPlan._fields, multiples, strict=True):
        stream = getattr(plan, name)
        if stream:
            needed = np.array([getattr(other, name).rows.num_rows for other in plans if getattr(other, name)])
            buckets = choose_buckets(needed, multiple=multiple, limit=limit)
            rounded[name] = stream._replace(rows=_dealt(stream.rows, buckets, multiple))
    return plan._replace(**rounded)


def _dealt(rows: RowPlan, buckets: tuple[int, ...], pieces: int) -> RowPlan:
    """The rows, their number rounded up to a bucket, dealt out to equal pieces in turn.

    The pieces are those that devices take, chunk by chunk. Packing leaves long texts in the first rows and padding in
    the last; dealt, every piece has its share of both.
    """
    num_rows = round_up(rows.num_rows, buckets)
    place = np.arange(num_rows, dtype=np.int32).reshape(pieces, -1).T.reshape(-1)
    return rows._replace(num_rows=num_rows, row=place[rows.row])


def _check_num_samples(key: str, num_samples: dict[str, int], names: Sequence[str]) -> None:
    for name in num_samples:
        if name not in names:
            raise InputError(f"{key} names {name!r}, which is no file of data.train; {_hint(name, names)}")


def _hint(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"the files are {', '.join(names)}"
