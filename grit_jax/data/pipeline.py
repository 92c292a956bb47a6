"""Batches of tokens, for the rows of this host, from the schedule's plans."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from grit_jax.config import Config
from grit_jax.data.batch import Batch, HostShare
from grit_jax.data.index_builder import build_indexes
from grit_jax.data.packing import Packing, fill_rows
from grit_jax.data.schedule import Schedule, StepPlan, validation_steps
from grit_jax.data.sources import find_files, without_suffix
from grit_jax.data.streams import readers
from grit_jax.data.streams.stream import PlannedRows, RowPlan, Samples, Stream
from grit_jax.data.token_index import IndexedFile, TokenIndex
from grit_jax.errors import InputError
from grit_jax.text.tokenizer import Tokenizer


class FileSamples(NamedTuple):
    """The records of one file that a step takes.

    Attributes:
      stream: The stream that takes them.
      dataset: Short name of the file; see `dataset_names`.
      file: Its path.
      records: Their indices in the file, not counting blank lines and malformed records.
      lines: Their lines, or entries, from 1.
    """

    stream: str
    dataset: str
    file: str
    records: list[int]
    lines: list[int]


class _Files(NamedTuple):
    """Data files, and for each stream their token indexes by file number."""

    indexed: list[IndexedFile]
    indexes: dict[str, dict[int, TokenIndex]]

    @property
    def paths(self) -> list[str]:
        """The files' paths, by their numbers."""
        return [str(path) for _, path in sorted({file.number: file.index.path for file in self.indexed}.items())]


class Pipeline:
    """The batches of a run.

    Args:
      config: The run's settings.
      tokenizer: The model's tokenizer.
      streams: The streams to train.
      host_share: The rows of a batch that this host fills.

    Attributes:
      fingerprint: Identifies the training data; a resumed run must have the same.

    Raises:
      InputError: Files are missing, malformed or without usable records.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, streams: Sequence[Stream], *, host_share: HostShare):
        self._config, self._tokenizer, self._streams, self._host_share = config, tokenizer, streams, host_share
        data, num_shards = config.data, host_share.num_shards
        if not data.train:
            raise InputError("data.train is missing; name the files or folders to train on")
        self._training = self._indexed(data.train)
        self._names = dataset_names(self._training.paths)
        self._schedule = Schedule(self._training.indexed, streams, data=data, train=config.train, num_shards=num_shards)
        self.fingerprint = self._schedule.fingerprint
        self._held_out_plans = self._schedule.held_out_steps()
        self._validation = self._indexed(data.validation) if data.validation else _Files([], {})
        self._validation_plans = validation_steps(
            self._validation.indexed, streams, limit=data.row_buckets, num_shards=num_shards
        )

    def host_facts(self) -> dict[str, str]:
        """What must be equal on every host: the order and the content of its files."""
        facts = {}
        for key, files in (("data.train", self._training), ("data.validation", self._validation)):
            facts[key] = ", ".join(file.index.name for file in files.indexed)
            for number, (_, index, _) in enumerate(files.indexed):
                facts[f"the content of {key}, file {number + 1}"] = f"{index.name} {'-'.join(index.fingerprint)}"
        return facts

    def samples(self, step: int) -> list[FileSamples]:
        """The records that step `step`, counted from 0, takes from each file."""
        return [
            file
            for stream in self._streams
            for file in file_samples(
                stream.name, self._schedule.samples(step, stream.name), self._training.indexes[stream.name], self._names
            )
        ]

    def losses_by_file(
        self, step: int, losses: Mapping[str, float], token_losses: Mapping[str, np.ndarray]
    ) -> dict[str, float]:
        """The losses of a step's files, as `STREAM/FILE`.

        A stream with token losses gives the mean loss of each file's tokens (`file_losses`). A stream whose batches
        come from one file gives the batch's loss under that file's name, or `mixed` if the batch has several files.

        Args:
          step: The step, counted from 0.
          losses: Loss of each stream.
          token_losses: Losses of a stream's tokens, for the streams that have them.
        """
        found = {}
        for stream in self._streams:
            if stream.name in token_losses:
                rows = self._schedule.stream_plan(step, stream.name).rows
                by_file = file_losses(rows, token_losses[stream.name], self._names)
                found |= {f"{stream.name}/{file}": loss for file, loss in by_file.items()}
            elif stream.one_file:
                numbers = self._schedule.files_of_batch(step, stream.name)
                name = self._names[numbers[0]] if len(numbers) == 1 else "mixed"
                found[f"{stream.name}/{name}"] = losses[stream.name]
        return found

    def summary(self) -> list[str]:
        """Lines for people about the training data."""
        return self._schedule.summary()

    def batch(self, step: int) -> Batch:
        """The batch of step `step`, counted from 0."""
        return self._filled(self._schedule.step(step), self._training)

    def validation_batches(self) -> Iterator[Batch]:
        """Batches that hold every validation record and every held-out record once; none without either."""
        for plans, files in ((self._validation_plans, self._validation), (self._held_out_plans, self._training)):
            for plan in plans:
                yield self._filled(plan, files)

    def _indexed(self, paths: str | list[str]) -> _Files:
        streams = readers(self._config, self._streams)
        indexed = build_indexes(find_files(paths), self._tokenizer, streams, skip_bad=self._config.data.skip_bad)
        indexes = {stream.name: {f.number: f.index for f in indexed if f.stream is stream} for stream in streams}
        return _Files(indexed, indexes)

    def _filled(self, plan: StepPlan, files: _Files) -> Batch:
        by_name = {stream.name: stream for stream in self._streams}
        return {
            name: by_name[name].fill(
                part, planned_rows(part.rows, files.indexes[name], self._host_share, by_name[name].row_length)
            )
            for name, part in plan.items()
        }


def planned_rows(plan: RowPlan, indexes: Mapping[int, TokenIndex], share: HostShare, row_length: int) -> PlannedRows:
    """The rows of a plan that a host fills, from the files' indexes by number."""
    here = share.rows(plan.num_rows)
    own_row = np.full(plan.num_rows, -1)
    own_row[here] = np.arange(len(here))
    mine = np.flatnonzero(own_row[plan.row] >= 0)
    mine = mine[np.argsort(plan.file[mine], kind="stable")]
    lengths = plan.length[mine].astype(np.int64)
    # File by file; none of a host's rows may hold a text.
    parts = [(np.zeros(0, np.uint8), np.zeros((0, 2), np.int32), np.zeros(0, np.int64))]
    for file in np.unique(plan.file[mine]).tolist():
        index, own = indexes[file], mine[plan.file[mine] == file]
        texts = index.text_starts[plan.record[own]] + plan.text[own]
        parts.append((index.kept_tokens(texts, plan.length[own]), *index.spans_of(texts)))
    tokens, spans, num_spans = map(np.concatenate, zip(*parts, strict=True))
    packing = Packing(len(here), own_row[plan.row[mine]], plan.offset[mine], plan.segment[mine])
    rows = fill_rows(tokens, lengths, packing, row_length=row_length)
    return PlannedRows(rows, mine, lengths, spans, num_spans)


def file_samples(
    stream: str, samples: Samples, indexes: Mapping[int, TokenIndex], names: Sequence[str]
) -> list[FileSamples]:
    """The samples of a stream by file, in the files' order."""
    found = []
    for number in np.unique(samples.file).tolist():
        index, records = indexes[number], samples.record[samples.file == number]
        lines = index.line_numbers(records)
        found.append(FileSamples(stream, names[number], str(index.path), records.tolist(), lines.tolist()))
    return found


def file_losses(rows: RowPlan, token_losses: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Mean loss of each file's scored tokens in a batch, by file name; in nats, weighted as in the batch's loss.

    Args:
      rows: The batch's texts in their rows.
      token_losses: float32 [2, rows, length]; weighted losses and weights of all tokens.
      names: Name of each file.
    """
    sums = np.zeros((len(names), 2))
    for file, row, offset, length in zip(rows.file, rows.row, rows.offset, rows.length, strict=True):
        sums[file] += token_losses[:, row, offset : offset + length].sum(axis=1, dtype=np.float64)
    return {names[file]: float(loss / weight) for file, (loss, weight) in enumerate(sums) if weight}


def dataset_names(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Short names that tell files apart, without shared folders and suffixes."""
    parts = [without_suffix(os.fspath(path)).split("/") for path in paths]
    folders = list(zip(*(part[:-1] for part in parts)))  # as deep as the shallowest file
    shared = next((depth for depth, names in enumerate(folders) if len(set(names)) > 1), len(folders))
    return ["/".join(part[shared:]) for part in parts]
