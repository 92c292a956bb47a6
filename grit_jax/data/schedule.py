"""The content of every step, a pure function of seed, files and step number.

From the token indexes alone, without reading a token, the schedule decides which texts a step takes and how they are
packed and weighted. Every host gets the same result, and no step depends on earlier ones.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from grit_jax.config import DataConfig, StageConfig, TrainConfig
from grit_jax.data.order import Order
from grit_jax.data.packing import choose_buckets, round_up
from grit_jax.data.streams.stream import RowPlan, Samples, Stream
from grit_jax.data.token_index import IndexedFile
from grit_jax.data.usable import StreamFiles, UsableFile
from grit_jax.errors import InputError

_LAWS = 2  # raised when the same settings give other batches
_SAMPLED_STEPS = 64  # steps whose packing decides the row buckets
_PICK = 2  # name of the random stream that picks texts of records; those of `Order` follow

StepPlan = dict[str, Any]  # results of `Stream.plan`, by the stream's name


class _Stage(NamedTuple):
    """Steps from `first` to `last`, exclusive (None: to the end); `orders` are by stream name."""

    first: int
    last: int | None
    orders: dict[str, Order]


class Schedule:
    """The training steps.

    Args:
      files: The training files.
      streams: The streams to train; other streams' files give no samples.
      data: How to sample.
      train: Seed and mode.
      num_shards: Number of equal parts into which a batch's rows are divided.

    Attributes:
      buckets: Row counts of each stream's batches.

    Raises:
      InputError: A stream has no usable record, or a setting names no file.
    """

    def __init__(
        self,
        files: Sequence[IndexedFile],
        streams: Sequence[Stream],
        *,
        data: DataConfig,
        train: TrainConfig,
        num_shards: int,
    ):
        self._data, self._train, self._num_shards, self._streams = data, train, num_shards, streams
        self._files = [UsableFile(file, held_out=data.held_out) for file in files]
        self._by_stream = {
            stream.name: StreamFiles(stream, [file for file in self._files if file.stream is stream])
            for stream in streams
        }
        self._stages: list[_Stage] = []
        for number, stage in enumerate(data.curriculum or [StageConfig()]):
            first = self._stages[-1].last if self._stages else 0
            assert first is not None
            last = None if stage.steps is None else first + stage.steps
            self._stages.append(_Stage(first, last, self._orders(number, stage)))
        if data.held_out:
            self._refuse_nothing_held_out()
        self.buckets = {stream.name: self._buckets(stream) for stream in streams}

    @functools.cached_property
    def fingerprint(self) -> str:
        """Identifies the data: equal if every file holds the same records, tokenized and cut alike.

        It has the three parts of `Fingerprint`; see `same_data`.
        """
        texts = [str(_LAWS), *(file.fingerprint() for file in self._files)]
        structure = [file.index.fingerprint.structure for file in self._files]
        tokens = [file.index.fingerprint.tokens for file in self._files]
        return "-".join(hashlib.sha256(" ".join(part).encode()).hexdigest()[:16] for part in (texts, structure, tokens))

    def step(self, k: int) -> StepPlan:
        """Step `k`, counted from 0."""
        return {name: self.stream_plan(k, name) for name in self._by_stream}

    def stream_plan(self, k: int, name: str) -> Any:
        """The plan of the stream `name` of step `k`."""
        pieces = self._by_stream[name].stream.num_chunks * self._num_shards
        return _dealt(self._plan(k, name), self.buckets[name], pieces)

    def samples(self, k: int, name: str) -> Samples:
        """The records of a stream that step `k` takes, in order."""
        order, number = self._order(k, name)
        return order.batch(number)

    def files_of_batch(self, k: int, name: str) -> list[int]:
        """Numbers of the files that a stream's batch of step `k` comes from."""
        order, number = self._order(k, name)
        return order.files_of_batch(number)

    def summary(self) -> list[str]:
        """Lines for people: samples, epochs, row counts, dropped records."""
        lines = []
        for stream in self._streams:
            buckets = " or ".join(map(str, self.buckets[stream.name]))
            for stage in self._stages:
                order = stage.orders[stream.name]
                name = stream.name + (f" from step {stage.first + 1:,}" if len(self._stages) > 1 else "")
                lines.append(
                    f"{name}: {order.epoch_size:,} samples in {len(order.files)} files, "
                    f"{order.epoch_size / stream.batch_size:,.1f} steps an epoch, batches of {buckets} rows"
                )
                if order.epoch_size < stream.batch_size:
                    what = "is more than an epoch, so a batch repeats samples"
                    lines.append(f"{name}: data.{stream.name}_batch={stream.batch_size} {what}")
        for stream in self._streams if self._data.held_out else ():
            count = len(self._by_stream[stream.name].held_out().file)
            lines.append(f"{stream.name}: {count:,} records held out, never trained on")
        return [*lines, *dropped_lines(self._files)]

    def held_out_steps(self) -> list[StepPlan]:
        """Plans that hold every held-out record once, like those of `validation_steps`.

        Here a batch may hold records of several files, since each file has few of them.
        """
        batches = []
        for files in self._by_stream.values() if self._data.held_out else ():
            batches += [(files, samples) for samples in _cut(files.held_out(), files.stream.batch_size)]
        return _evaluation_plans(batches, limit=self._data.row_buckets, num_shards=self._num_shards)

    def _refuse_nothing_held_out(self) -> None:
        for name, files in self._by_stream.items():
            if not len(files.held_out().file):
                count = sum(file.num_usable for file in files.files)
                raise InputError(
                    f"data.held_out={self._data.held_out} holds out none of {count:,} {name} records; raise it, or "
                    "set it to 0 and name data.validation"
                )

    def _orders(self, number: int, stage: StageConfig) -> dict[str, Order]:
        """The order of each stream in a stage."""
        where = f"data.curriculum[{number}]" if self._data.curriculum else "data"
        names = [file.index.name for file in self._files]
        num_samples = self._data.num_samples | stage.num_samples
        _check_num_samples("data.num_samples", self._data.num_samples, names)
        _check_num_samples(f"{where}.num_samples", stage.num_samples, names)
        for pattern in stage.files:
            if not fnmatch.filter(names, pattern):
                raise InputError(
                    f"{where}.files names {pattern!r}, which is not a file of data.train; {_hint(pattern, names)}"
                )
        orders = {}
        for stream in self._streams:
            used, sizes = [], []
            for file in self._by_stream[stream.name].files:
                named = not stage.files or any(fnmatch.fnmatchcase(file.index.name, pattern) for pattern in stage.files)
                size = num_samples.get(file.index.name, file.num_usable)
                if named and file.num_usable and size:
                    used.append(file)
                    sizes.append(size)
            if not used:
                self._refuse(stream, where if stage.files else "data.train")
            orders[stream.name] = Order(used, sizes, stream, seed=self._train.seed, stage=number)
        return orders

    def _refuse(self, stream: Stream, where: str) -> None:
        dropped = "; ".join(dropped_lines(self._files)) or "no file holds that stream"
        others = [file.stream.name for file in self._files if file.num_usable and file.stream is not stream]
        remedy = f" or set train.mode={others[0]}" if others else ""
        raise InputError(
            f"{where} has no usable {stream.name} record ({dropped}), and train.mode={self._train.mode} trains that "
            f"stream; add such data{remedy}"
        )

    def _stage(self, k: int) -> _Stage:
        return next(stage for stage in self._stages if stage.last is None or k < stage.last)

    def _order(self, k: int, name: str) -> tuple[Order, int]:
        """The order of a stream at step `k`, and the index of the step's batch in it."""
        stage = self._stage(k)
        return stage.orders[name], k - stage.first

    def _buckets(self, stream: Stream) -> tuple[int, ...]:
        needed = []
        for stage in self._stages:
            epoch = -(-stage.orders[stream.name].epoch_size // stream.batch_size)
            # An epoch, more if it is short, but no step of another stage.
            steps = min(max(_SAMPLED_STEPS, epoch), (stage.last or np.inf) - stage.first)
            for k in np.unique(np.linspace(stage.first, stage.first + steps - 1, _SAMPLED_STEPS).astype(int)).tolist():
                needed.append(self._plan(k, stream.name).rows.num_rows)
        multiple = stream.num_chunks * self._num_shards
        return choose_buckets(np.array(needed), multiple=multiple, limit=self._data.row_buckets)

    def _plan(self, k: int, name: str) -> Any:
        files = self._by_stream[name]
        ranks = np.random.default_rng((self._train.seed, files.stream.code, _PICK, k)).random
        return files.stream.plan(files, self.samples(k, name), ranks, summed=False)


def same_data(recorded: str, fingerprint: str) -> bool:
    """Whether a recorded fingerprint matches the present data; older runs recorded only its first parts."""
    return f"{fingerprint}-".startswith(f"{recorded}-")


def validation_steps(
    files: Sequence[IndexedFile],
    streams: Sequence[Stream],
    *,
    limit: int,
    num_shards: int,
) -> list[StepPlan]:
    """Plans that hold every usable record once, in file order, with its first positive and first negatives.

    Queries and scored tokens weigh 1, so callers divide sums by sums of weights. Batches have the sizes of training,
    with fillers in the last one of a file; each plan has one stream.

    Args:
      files: The validation files.
      streams: The streams to train; other streams' files are left out.
      limit: Most row counts of a stream's batches.
      num_shards: Number of equal parts into which a batch's rows are divided.
    """
    batches = []
    for file in files:
        if file.stream in streams:
            usable = UsableFile(file, held_out=0.0)
            of_stream = StreamFiles(file.stream, [usable])
            batches += [(of_stream, samples) for samples in _cut(usable.samples(), file.stream.batch_size)]
    return _evaluation_plans(batches, limit=limit, num_shards=num_shards)


def dropped_lines(files: Sequence[UsableFile]) -> list[str]:
    """The records left out of each file, and why."""
    lines = []
    for file in files:
        index = file.index
        total = index.num_records + sum(bad.count for bad in index.bad)
        lines += [
            f"{index.path}: skipped {bad.count:,} of {total:,} records: {bad.fault}; for example {bad.examples[0]}"
            for bad in index.bad
        ]
        lines += [
            f"{index.path}: dropped {count:,} of {total:,} records: {reason}"
            for reason, count in file.dropped.items()
            if count
        ]
    return lines


def _cut(samples: Samples, size: int) -> list[Samples]:
    """The samples in pieces of at most `size`."""
    starts = range(0, len(samples.file), size)
    return [Samples(*(part[start : start + size] for part in samples)) for start in starts]


def _evaluation_plans(batches: Sequence[tuple[StreamFiles, Samples]], *, limit: int, num_shards: int) -> list[StepPlan]:
    """A plan for each batch, in which queries and scored tokens weigh 1."""
    planned = [(files.stream, files.stream.plan(files, samples, np.arange, summed=True)) for files, samples in batches]
    buckets: dict[str, tuple[int, ...]] = {}
    for stream in {stream.name: stream for stream, _ in planned}.values():
        needed = np.array([plan.rows.num_rows for other, plan in planned if other is stream])
        buckets[stream.name] = choose_buckets(needed, multiple=stream.num_chunks * num_shards, limit=limit)
    return [
        {stream.name: _dealt(plan, buckets[stream.name], stream.num_chunks * num_shards)} for stream, plan in planned
    ]


def _dealt(plan: Any, buckets: tuple[int, ...], pieces: int) -> Any:
    """The plan with its rows rounded up to a bucket and dealt in turn to equal pieces, the chunks on devices.

    Packing puts long texts in the first rows and padding in the last; dealing gives every piece its share of both.
    """
    rows: RowPlan = plan.rows
    num_rows = round_up(rows.num_rows, buckets)
    moved = np.arange(num_rows, dtype=np.int32).reshape(pieces, -1).T.reshape(-1)
    return plan._replace(rows=rows._replace(num_rows=num_rows, row=moved[rows.row]))


def _check_num_samples(key: str, num_samples: dict[str, int], names: Sequence[str]) -> None:
    for name in num_samples:
        if name not in names:
            raise InputError(f"{key} names {name!r}, which is not a file of data.train; {_hint(name, names)}")


def _hint(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"the files are {', '.join(names)}"
