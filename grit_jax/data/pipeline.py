"""From the schedule's plans to batches of tokens, for the rows of this host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from grit_jax.config import Config
from grit_jax.data.batch import Batch, HostShare
from grit_jax.data.index import FileIndex, ReadFile
from grit_jax.data.indexing import build_indexes
from grit_jax.data.packing import Packing, fill_rows
from grit_jax.data.samples import FileSamples, dataset_names, file_losses, file_samples
from grit_jax.data.schedule import Schedule, StepPlan, validation_steps
from grit_jax.data.sources import find_files
from grit_jax.data.streams import readers
from grit_jax.data.streams.base import PlannedRows, RowPlan, Stream
from grit_jax.errors import InputError
from grit_jax.text.tokenizer import Tokenizer


def planned_rows(plan: RowPlan, indexes: Mapping[int, FileIndex], share: HostShare, row_length: int) -> PlannedRows:
    """The rows of a plan that a host fills, from the indexes of the files by the numbers that the plan has."""
    here = share.rows(plan.num_rows)
    own_row = np.full(plan.num_rows, -1)
    own_row[here] = np.arange(len(here))
    mine = np.flatnonzero(own_row[plan.row] >= 0)
    mine = mine[np.argsort(plan.file[mine], kind="stable")]
    lengths = plan.length[mine].astype(np.int64)
    # One file after the other; hosts may have rows without a text.
    parts = [(np.zeros(0, np.uint8), np.zeros((0, 2), np.int32), np.zeros(0, np.int64))]
    for file in np.unique(plan.file[mine]).tolist():
        index, own = indexes[file], mine[plan.file[mine] == file]
        texts = index.text_starts[plan.record[own]] + plan.text[own]
        parts.append((index.kept_tokens(texts, plan.length[own]), *index.spans_of(texts)))
    tokens, spans, num_spans = map(np.concatenate, zip(*parts, strict=True))
    packing = Packing(len(here), own_row[plan.row[mine]], plan.offset[mine], plan.segment[mine])
    rows = fill_rows(tokens, lengths, packing, row_length=row_length)
    return PlannedRows(rows, mine, lengths, spans, num_spans)


class _Files(NamedTuple):
    """Data files, and their indexes by their numbers for each stream."""

    read: list[ReadFile]
    indexes: dict[str, dict[int, FileIndex]]

    @property
    def paths(self) -> list[str]:
        """The files' paths, by their numbers."""
        return [str(path) for _, path in sorted({file.number: file.index.path for file in self.read}.items())]


class Pipeline:
    """The batches of a run.

    Args:
      config: The run's settings.
      tokenizer: The model's tokenizer.
      streams: The streams that are trained.
      host_share: Which of a batch's rows this host fills.

    Attributes:
      fingerprint: Names the training data; a resumed run must have the same.

    Raises:
      InputError: Files are missing, malformed or without usable records.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, streams: Sequence[Stream], *, host_share: HostShare):
        self._config, self._tokenizer, self._streams, self._host_share = config, tokenizer, streams, host_share
        if not config.data.train:
            raise InputError("data.train is missing; name the files or folders to train on")
        num_shards = host_share.num_shards
        self._training = self._read(config.data.train)
        self._names = dataset_names(self._training.paths)
        self._schedule = Schedule(
            self._training.read, streams, data=config.data, train=config.train, num_shards=num_shards
        )
        self.fingerprint = self._schedule.fingerprint
        self._held_out_plans = self._schedule.held_out_steps()
        self._validation = self._read(config.data.validation) if config.data.validation else _Files([], {})
        self._validation_plans = validation_steps(
            self._validation.read, streams, limit=config.data.row_buckets, num_shards=num_shards
        )

    def host_facts(self) -> dict[str, str]:
        """What every host must have found in its files: their order, and what each of them holds."""
        facts = {}
        for key, files in (("data.train", self._training), ("data.validation", self._validation)):
            facts[key] = ", ".join(file.index.name for file in files.read)
            for number, (_, index, _) in enumerate(files.read):
                facts[f"the content of {key}, file {number + 1}"] = f"{index.name} {'-'.join(index.fingerprint)}"
        return facts

    def samples(self, step: int) -> list[FileSamples]:
        """The records that step `step`, counted from 0, takes of each file."""
        found = []
        for stream in self._streams:
            samples = self._schedule.samples(step, stream.name)
            found += file_samples(stream.name, samples, self._training.indexes[stream.name], self._names)
        return found

    def losses_by_file(
        self, step: int, losses: Mapping[str, float], token_losses: Mapping[str, np.ndarray]
    ) -> dict[str, float]:
        """The losses of a step's files, as `STREAM/FILE`.

        A stream with token losses has the mean loss of each file's tokens, see `file_losses`; one whose batches are
        taken from one file has that of the batch, which is `mixed` where it is of several files.

        Args:
          step: The step, counted from 0.
          losses: Loss of each stream.
          token_losses: Losses of each stream's tokens, of those streams that have them.
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

    def report(self) -> list[str]:
        """Lines for people about the training data."""
        return self._schedule.report()

    def batch(self, step: int) -> Batch:
        """The batch of step `step`, counted from 0."""
        return self._filled(self._schedule.step(step), self._training)

    def batches(self, start: int) -> Iterator[Batch]:
        """The batches of steps `start`, `start + 1`, ..., counted from 0, to the last one."""
        return map(self.batch, range(start, self._config.train.steps))

    def validation_batches(self) -> Iterator[Batch]:
        """Batches that hold every validation record and every record held out once; none without either."""
        for plans, files in ((self._validation_plans, self._validation), (self._held_out_plans, self._training)):
            for plan in plans:
                yield self._filled(plan, files)

    def _read(self, paths: str | list[str]) -> _Files:
        streams = readers(self._config, self._streams)
        read = build_indexes(find_files(paths), self._tokenizer, streams, skip_bad=self._config.data.skip_bad)
        indexes = {stream.name: {f.number: f.index for f in read if f.stream is stream} for stream in streams}
        return _Files(read, indexes)

    def _filled(self, plan: StepPlan, files: _Files) -> Batch:
        by_name = {stream.name: stream for stream in self._streams}
        return {
            name: by_name[name].fill(
                part, planned_rows(part.rows, files.indexes[name], self._host_share, by_name[name].row_length)
            )
            for name, part in plan.items()
        }
