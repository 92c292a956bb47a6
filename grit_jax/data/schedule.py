"""What every step consists of: a pure function of seed, files and step number.

Nothing here reads a token. From the indexes alone it decides which texts a step takes, where each of them is packed
and what it weighs, the same on every host and without looking at earlier steps.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from grit_jax.batch import max_segments
from grit_jax.config import DataConfig, InputError, LossConfig, TrainConfig
from grit_jax.data.index import FileIndex, num_targets
from grit_jax.data.packing import choose_buckets, pack, round_up
from grit_jax.data.records import Stream

_SAMPLED_STEPS = 64  # steps whose packing decides the row buckets
_EMBEDDING, _GENERATIVE, _PICK, _ORDER, _FILE = range(5)  # names of the random streams


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

    def take(self, which: np.ndarray | slice) -> Samples:
        """The samples at these places."""
        return Samples(self.file[which], self.record[which])

    def cut(self, begin: int, end: int, size: int) -> list[Samples]:
        """Pieces of `size` samples; the last one may be shorter."""
        return [self.take(slice(start, min(start + size, end))) for start in range(begin, end, size)]


# Usable positives and negatives of a record and the group size -> the passages of its group, positive first.
Pick = Callable[[np.ndarray, np.ndarray, int], Sequence[int]]


class _File:
    """The usable records of one file under the length limits.

    Attributes:
      number: Its number among all files.
      records: int64 [usable records].
      epoch_size: Samples that an epoch takes.
      targets: int32 [texts]; span tokens left after truncation.
      dropped: Number of unusable records by reason.
    """

    def __init__(self, number: int, index: FileIndex, data: DataConfig):
        self.number, self.index = number, index
        starts = index.text_starts[:-1]
        if index.stream == "embedding":
            is_query = np.zeros(len(index.lengths), bool)
            is_query[starts] = True
            self.limits = np.where(is_query, data.query_max_length, data.passage_max_length).astype(np.int32)
            self.targets = np.where(
                is_query, num_targets(index, data.query_max_length), num_targets(index, data.passage_max_length)
            )
            whole = num_targets(index, np.iinfo(np.int32).max)
            query_ok, query_whole = self.targets[starts] > 0, whole[starts] > 0
            positive_ok, positive_whole = (self._any_positive(counts > 0) for counts in (self.targets, whole))
            usable = query_ok & positive_ok
            filled = query_whole & positive_whole
            self.dropped = {
                "empty text": int(np.sum(~filled)),
                "instruction leaves no room": int(np.sum(filled & ~usable)),
            }
        else:
            self.limits = np.full(len(index.lengths), data.generative_max_length, np.int32)
            self.targets = num_targets(index, data.generative_max_length)
            usable = self.targets > 0
            filled = num_targets(index, np.iinfo(np.int32).max) > 0
            self.dropped = {
                "empty text": int(np.sum(~filled)),
                "prompt leaves no room for the answer": int(np.sum(filled & ~usable)),
            }
        self.records = np.flatnonzero(usable)
        self.epoch_size = data.num_samples.get(index.path.name, len(self.records))

    def _any_positive(self, ok: np.ndarray) -> np.ndarray:
        first = self.index.text_starts[:-1] + 1
        counts = np.concatenate([[0], np.cumsum(ok)])
        return counts[first + self.index.num_positives] - counts[first] > 0

    def usable_texts(self, record: int) -> tuple[np.ndarray, np.ndarray]:
        """Numbers, within the record, of the positives and negatives with something left to pool."""
        start, end = self.index.text_starts[record : record + 2]
        texts = 1 + np.flatnonzero(self.targets[start + 1 : end] > 0)
        first_negative = np.searchsorted(texts, 1 + self.index.num_positives[record])
        return texts[:first_negative], texts[first_negative:]

    def samples(self, epoch: int, seed: int) -> Samples:
        """The samples of an epoch: the next `epoch_size` of the file's endless stream of permutations."""
        size, wanted = len(self.records), np.arange(epoch * self.epoch_size, (epoch + 1) * self.epoch_size)
        passes = [
            _generator(seed, _FILE, self.number, number).permutation(self.records)
            for number in range(wanted[0] // size, wanted[-1] // size + 1)
        ]
        records = np.concatenate(passes)[wanted - wanted[0] // size * size]
        return Samples(np.full(len(records), self.number), records)


class _Planner:
    """Places samples in rows and gives them their weights."""

    def __init__(self, indexes: Sequence[FileIndex], data: DataConfig):
        self.files = [_File(number, index, data) for number, index in enumerate(indexes)]
        self._data = data

    def trained_files(self, stream: Stream, mode: str) -> list[_File]:
        """The files of a stream that have samples; at least one."""
        files = [file for file in self.files if file.index.stream == stream]
        usable = [file for file in files if len(file.records) and file.epoch_size]
        if not usable:
            dropped = "; ".join(self.dropped_lines()) or "no file holds that stream"
            other = "generative" if stream == "embedding" else "embedding"
            raise InputError(
                f"data.train has no usable {stream} record ({dropped}), and train.mode={mode} trains that stream; "
                f"add such data or set train.mode={other}"
            )
        return usable

    def dropped_lines(self) -> list[str]:
        """What was left out of each file, and why."""
        return [
            f"{file.index.path}: dropped {count:,} of {file.index.num_records:,} records: {reason}"
            for file in self.files
            for reason, count in file.dropped.items()
            if count
        ]

    def embedding(self, samples: Samples, pick: Pick, *, query_weight: float, batch: int) -> EmbeddingPlan:
        """Queries, positives and negatives of the samples; fillers make a short batch whole."""
        group = self._data.group_size
        texts = np.full((len(samples.file), 1 + group), -1)
        texts[:, 0] = 0
        for sample, (number, record) in enumerate(zip(*samples, strict=True)):
            passages = pick(*self.files[number].usable_texts(record), group)
            texts[sample, 1 : 1 + len(passages)] = passages
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
        rows = self._rows(*samples, np.zeros(len(samples.file), int), self._data.generative_max_length)
        return rows, self._per_text(rows, lambda file: file.targets)

    def _rows(self, file: np.ndarray, record: np.ndarray, text: np.ndarray, row_length: int) -> RowPlan:
        places = RowPlan(0, *(part.astype(np.int32) for part in (file, record, text)), *[np.zeros(0, np.int32)] * 4)
        length = np.minimum(
            self._per_text(places, lambda file: file.index.lengths), self._per_text(places, lambda file: file.limits)
        )
        most = max_segments(row_length) if self._data.packing else 1
        packing = pack(length, row_length=row_length, max_segments=most)
        return places._replace(length=length, **packing._asdict())

    def _hashes(self, rows: RowPlan) -> np.ndarray:
        return self._per_text(rows, lambda file: file.index.hashes)

    def _per_text(self, rows: RowPlan, values: Callable[[_File], np.ndarray]) -> np.ndarray:
        """One value for each text of `rows`, from arrays over all texts of each file."""
        result = np.zeros(len(rows.file), values(self.files[0]).dtype)
        for number in np.unique(rows.file):
            mine = rows.file == number
            starts = self.files[number].index.text_starts[rows.record[mine]]
            result[mine] = values(self.files[number])[starts + rows.text[mine]]
        return result


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
      InputError: A stream that is trained has no usable record, or `data.num_samples` names no file.
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
        _check_num_samples(data, indexes)
        self._planner = _Planner(indexes, data)
        self._data, self._loss, self._train, self._row_multiples = data, loss, train, row_multiples
        self._embedding = self._planner.trained_files("embedding", train.mode) if train.embeds else []
        self._generative = self._planner.trained_files("generative", train.mode) if train.generates else []
        self.embedding_buckets = self._buckets(
            self._embedding, data.embedding_batch, row_multiples[0], lambda k: self._embedding_plan(k).rows
        )
        self.generative_buckets = self._buckets(
            self._generative, data.generative_batch, row_multiples[1], lambda k: self._generative_plan(k).rows
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        """Names the data: equal when every file holds the same texts, tokenized and cut in the same way."""
        digest = hashlib.sha256()
        for file in self._planner.files:
            for array in (file.index.hashes, file.index.lengths, file.records):
                digest.update(array.tobytes())
        return digest.hexdigest()[:16]

    def step(self, k: int) -> StepPlan:
        """Step `k`, counted from 0."""
        embedding = self._embedding_plan(k) if self._embedding else None
        generative = self._generative_plan(k) if self._generative else None
        pieces = self._row_multiples
        return StepPlan(
            embedding and embedding._replace(rows=_dealt(embedding.rows, self.embedding_buckets, pieces[0])),
            generative and generative._replace(rows=_dealt(generative.rows, self.generative_buckets, pieces[1])),
        )

    def samples(self, k: int, stream: Stream) -> Samples:
        """The records of a stream that step `k` takes, in sample order, without planning their rows."""
        if not (self._embedding if stream == "embedding" else self._generative):
            return _concatenate([])
        if stream == "embedding":
            return self._embedding_samples(k)
        return self._mixed_samples(_GENERATIVE, k, self._data.generative_batch)

    def generative_rows(self, k: int) -> RowPlan:
        """Where the conversations of step `k` are."""
        return _dealt(self._generative_plan(k).rows, self.generative_buckets, self._row_multiples[1])

    def report(self) -> list[str]:
        """Lines for people: samples, epochs, row counts, what was dropped."""
        lines = []
        for stream, files, batch, buckets in (
            ("embedding", self._embedding, self._data.embedding_batch, self.embedding_buckets),
            ("generative", self._generative, self._data.generative_batch, self.generative_buckets),
        ):
            size = _epoch_size(files)
            if files:
                lines.append(
                    f"{stream}: {size:,} samples in {len(files)} files, {size / batch:,.1f} steps an epoch, "
                    f"batches of {' or '.join(map(str, buckets))} rows"
                )
            if files and size < batch:
                lines.append(f"{stream}: data.{stream}_batch={batch} is more than an epoch, so a batch repeats samples")
        return lines + self._planner.dropped_lines()

    def _buckets(
        self, files: list[_File], batch: int, multiple: int, rows: Callable[[int], RowPlan]
    ) -> tuple[int, ...]:
        if not files:
            return ()
        steps = max(_SAMPLED_STEPS, -(-_epoch_size(files) // batch))  # an epoch, or more when that is short
        sampled = np.linspace(0, steps - 1, _SAMPLED_STEPS).astype(int)
        needed = np.array([rows(int(k)).num_rows for k in sampled])
        return choose_buckets(needed, multiple=multiple, limit=self._data.row_buckets)

    def _embedding_plan(self, k: int) -> EmbeddingPlan:
        generator = _generator(self._train.seed, _EMBEDDING, _PICK, k)

        def pick(positives: np.ndarray, negatives: np.ndarray, group: int) -> list[int]:
            chosen = [generator.choice(positives)]
            while len(negatives) and len(chosen) < group:
                chosen.extend(generator.permutation(negatives)[: group - len(chosen)])
            return chosen

        batch = self._data.embedding_batch
        return self._planner.embedding(self._embedding_samples(k), pick, query_weight=1 / batch, batch=batch)

    def _generative_plan(self, k: int) -> GenerativePlan:
        samples = self._mixed_samples(_GENERATIVE, k, self._data.generative_batch)
        rows, scored = self._planner.generative(samples)
        return GenerativePlan(rows, token_weights(scored, self._loss))

    def _embedding_samples(self, k: int) -> Samples:
        """Samples of step k: one file's, or a mixture of what fills no batch; each once in an epoch.

        Of the endless stream of epochs of N samples, batch k holds those numbered k * B to (k + 1) * B. So an epoch
        starts with the `head` that completes the batch which the epoch before began, and ends with the `tail` that
        begins the next one's first.
        """
        size, batch = _epoch_size(self._embedding), self._data.embedding_batch
        if size < batch:
            return self._mixed_samples(_EMBEDDING, k, batch)
        epoch, begin = divmod(k * batch, size)
        _, full, tail = self._embedding_epoch(epoch)
        place = begin // batch
        if place < len(full):
            return full[place]
        head, _, _ = self._embedding_epoch(epoch + 1)
        return _concatenate([tail, head])

    @functools.lru_cache(maxsize=2)  # noqa: B019 - a schedule lives as long as its run
    def _embedding_epoch(self, epoch: int) -> tuple[Samples, list[Samples], Samples]:
        seed, batch = self._train.seed, self._data.embedding_batch
        generator = _generator(seed, _EMBEDDING, _ORDER, epoch)
        full, left = [], []
        for file in self._embedding:
            samples = file.samples(epoch, seed)
            whole = len(samples.file) // batch * batch
            full += samples.cut(0, whole, batch)
            left += samples.cut(whole, len(samples.file), batch)
        head = -epoch * _epoch_size(self._embedding) % batch
        while sum(len(samples.file) for samples in left) < head:
            left.append(full.pop(int(generator.integers(len(full)))))
        pool = _concatenate(left).take(generator.permutation(sum(len(samples.file) for samples in left)))
        end = len(pool.file)
        tail = head + (end - head) // batch * batch
        full += pool.cut(head, tail, batch)
        order = generator.permutation(len(full))
        return pool.take(slice(head)), [full[i] for i in order], pool.take(slice(tail, end))

    def _mixed_samples(self, stream: int, k: int, batch: int) -> Samples:
        """Samples k * batch to (k + 1) * batch of the endless stream of shuffled epochs of all files."""
        size = _epoch_size(self._embedding if stream == _EMBEDDING else self._generative)
        first, begin = divmod(k * batch, size)
        last = ((k + 1) * batch - 1) // size
        epochs = _concatenate([self._mixed_epoch(stream, epoch) for epoch in range(first, last + 1)])
        return epochs.take(slice(begin, begin + batch))

    @functools.lru_cache(maxsize=4)  # noqa: B019
    def _mixed_epoch(self, stream: int, epoch: int) -> Samples:
        files, seed = self._embedding if stream == _EMBEDDING else self._generative, self._train.seed
        samples = _concatenate([file.samples(epoch, seed) for file in files])
        return samples.take(_generator(seed, stream, _ORDER, epoch).permutation(len(samples.file)))


def validation_steps(
    indexes: Sequence[FileIndex], *, data: DataConfig, train: TrainConfig, row_multiples: tuple[int, int]
) -> list[StepPlan]:
    """Plans that hold every usable record once, in file order, with its first positive and first negatives.

    A query and a scored token weigh 1, so that callers divide sums by sums of weights. Batches have the sizes of
    training, the last one of a file is completed with fillers; each plan has one stream.
    """
    planner = _Planner(indexes, data)
    plans = []
    for file in planner.files:
        samples = Samples(np.full(len(file.records), file.number), file.records)
        if file.index.stream == "embedding" and train.embeds:
            batch = data.embedding_batch
            plans += [
                StepPlan(planner.embedding(part, _first_passages, query_weight=1, batch=batch), None)
                for part in samples.cut(0, len(file.records), batch)
            ]
        elif file.index.stream == "generative" and train.generates:
            for part in samples.cut(0, len(file.records), data.generative_batch):
                rows, scored = planner.generative(part)
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


def _first_passages(positives: np.ndarray, negatives: np.ndarray, group: int) -> list[int]:
    return [positives[0], *negatives[: group - 1]]


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


def _epoch_size(files: list[_File]) -> int:
    return sum(file.epoch_size for file in files)


def _concatenate(parts: Sequence[Samples]) -> Samples:
    none = np.zeros(0, np.int64)
    return Samples(
        np.concatenate([none, *(part.file for part in parts)]), np.concatenate([none, *(part.record for part in parts)])
    )


def _generator(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


def _check_num_samples(data: DataConfig, indexes: Sequence[FileIndex]) -> None:
    names = [index.path.name for index in indexes]
    for name, count in data.num_samples.items():
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"the files are {', '.join(names)}"
            raise InputError(f"data.num_samples names {name!r}, which is no file of data.train; {hint}")
        if count < 0:
            raise InputError(f"data.num_samples: {name}={count} is negative; use 0 to leave a file out")
