"""From the schedule's plans to batches of tokens, for the rows of this host."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np

from grit_jax.batch import EmbeddingBatch, GenerativeBatch, GritBatch, HostShare
from grit_jax.config import Config, DataConfig, InputError, Pooling
from grit_jax.data.cache import CHANGED
from grit_jax.data.examples import record_prompts, text_hash
from grit_jax.data.index import FileIndex, build_indexes
from grit_jax.data.records import Record, Stream
from grit_jax.data.samples import FileSamples, dataset_names, file_losses, file_samples
from grit_jax.data.schedule import RowPlan, Schedule, StepPlan, validation_steps
from grit_jax.data.sources import Source, find_files, open_source
from grit_jax.prompts import TokenizedPrompt, tokenize
from grit_jax.tokenizer import Tokenizer


def pool_weights(spans: np.ndarray, length: int, pooling: Pooling) -> np.ndarray:
    """float32 [length], summing to 1: what each token's hidden state weighs in the vector of its text.

    Args:
      spans: int [1, 2]; token range of the text, after BOS, instruction and markers.
      length: Tokens of the whole prompt after truncation; more than where the span starts.
      pooling: `mean` of the text, `weighted_mean` with weights 1, 2, 3 ..., `last_token`, or `cls`, the first token
        of the prompt.
    """
    weights = np.zeros(length, np.float32)
    start, end = spans[0, 0], min(spans[0, 1], length)
    match pooling:
        case "mean":
            weights[start:end] = 1 / (end - start)
        case "weighted_mean":
            weights[start:end] = np.arange(1, end - start + 1) / ((end - start) * (end - start + 1) / 2)
        case "last_token":
            weights[end - 1] = 1
        case "cls":
            weights[0] = 1
    return weights


class _Rows(NamedTuple):
    """This host's rows of a packed batch, and where each of its texts lies in them."""

    tokens: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    texts: list[tuple[int, int, slice, TokenizedPrompt]]  # number in the plan, row, columns, tokens


@dataclasses.dataclass(frozen=True)
class _Filler:
    """Turns plans into batches; may be sent to worker processes."""

    sources: Sequence[Source]
    indexes: Sequence[FileIndex]
    tokenizer: Tokenizer
    data: DataConfig
    pooling: Pooling
    host_share: HostShare

    def fill(self, plan: StepPlan) -> GritBatch:
        embedding, generative = plan
        return GritBatch(
            embedding and self._embedding(embedding),
            generative and self._generative(generative),
        )

    def _embedding(self, plan) -> EmbeddingBatch:
        rows = self._rows(plan.rows, self.data.embedding_row_length)
        weights = np.zeros(rows.tokens.shape, np.float32)
        for _, row, columns, text in rows.texts:
            weights[row, columns] = pool_weights(text.spans, columns.stop - columns.start, self.pooling)
        return EmbeddingBatch(
            *rows[:3], weights, plan.query_slots, plan.passage_slots, plan.query_weights, plan.passage_ids
        )

    def _generative(self, plan) -> GenerativeBatch:
        rows = self._rows(plan.rows, self.data.generative_max_length)
        targets, weights = np.zeros_like(rows.tokens), np.zeros(rows.tokens.shape, np.float32)
        for number, row, columns, text in rows.texts:
            length = columns.stop - columns.start
            targets[row, columns.start : columns.stop - 1] = text.tokens[1:length]
            for start, end in np.clip(text.spans, 1, length):
                weights[row, columns.start + start - 1 : columns.start + end - 1] = plan.token_weights[number]
        return GenerativeBatch(*rows[:3], targets, weights)

    def _rows(self, plan: RowPlan, row_length: int) -> _Rows:
        here = self.host_share.rows(plan.num_rows)
        tokens, segment_ids, positions = (np.zeros((len(here), row_length), np.int32) for _ in range(3))
        own_row = np.full(plan.num_rows, -1)
        own_row[here] = np.arange(len(here))
        mine = np.flatnonzero(own_row[plan.row] >= 0)
        for file in np.unique(plan.file[mine]).tolist():
            self.sources[file].refuse_changed()
        keys = list(dict.fromkeys(zip(plan.file[mine].tolist(), plan.record[mine].tolist(), strict=True)))
        of_record = {key: record_prompts(self._record(*key), self.tokenizer) for key in keys}
        wanted = []
        for number in mine.tolist():
            file, record, which = int(plan.file[number]), int(plan.record[number]), int(plan.text[number])
            texts_of_record, index = of_record[file, record], self.indexes[file]
            if (
                which >= len(texts_of_record)
                or text_hash(texts_of_record[which]) != index.hashes[index.text_starts[record] + which]
            ):
                raise self._changed(file, record)
            wanted.append(texts_of_record[which])
        texts = []
        for number, text in zip(mine.tolist(), tokenize(wanted, self.tokenizer), strict=True):
            length = int(plan.length[number])
            row, offset = int(own_row[plan.row[number]]), int(plan.offset[number])
            columns = slice(offset, offset + length)
            tokens[row, columns] = text.cut(length).tokens
            segment_ids[row, columns] = plan.segment[number]
            positions[row, columns] = np.arange(length)
            texts.append((number, row, columns, text))
        return _Rows(tokens, segment_ids, positions, texts)

    def _record(self, file: int, record: int) -> Record:
        return self.sources[file][self.indexes[file].number(record)]

    def _changed(self, file: int, record: int) -> InputError:
        where = self.sources[file].where(self.indexes[file].number(record))
        return InputError(f"{where}: {CHANGED}")


class Pipeline:
    """The batches of a run.

    Args:
      config: The run's settings.
      tokenizer: The model's tokenizer.
      row_multiples: Row counts of the embedding and generative batch are multiples of these.
      host_share: Which of a batch's rows this host fills.

    Attributes:
      fingerprint: Names the training data; a resumed run must have the same.

    Raises:
      InputError: Files are missing, malformed or without usable records.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, *, row_multiples: tuple[int, int], host_share: HostShare):
        self._config, self._tokenizer = config, tokenizer
        self._host_share = host_share
        if not config.data.train:
            raise InputError("data.train is missing; name the files or folders to train on")
        self._training = self._open(config.data.train)
        self._names = dataset_names([source.path for source in self._training[0]])
        self._schedule = Schedule(
            self._training[1], data=config.data, loss=config.loss, train=config.train, row_multiples=row_multiples
        )
        self.fingerprint = self._schedule.fingerprint
        self._held_out_plans = self._schedule.held_out_steps()
        self._validation = self._open(config.data.validation) if config.data.validation else ([], [])
        self._validation_plans = validation_steps(
            self._validation[1], data=config.data, train=config.train, row_multiples=row_multiples
        )

    def host_facts(self) -> dict[str, str]:
        """What every host must have found in its files: their order, and what each of them holds."""
        facts = {}
        for key, (sources, indexes) in (("data.train", self._training), ("data.validation", self._validation)):
            names = [source.path.name for source in sources]
            facts[key] = ", ".join(names)
            for number, (name, index) in enumerate(zip(names, indexes, strict=True)):
                facts[f"the content of {key}, file {number + 1}"] = f"{name} {'-'.join(index.fingerprint)}"
        return facts

    def samples(self, step: int) -> list[FileSamples]:
        """The records that step `step`, counted from 0, takes of each file."""
        sources, names = self._training[0], self._names
        streams: tuple[Stream, ...] = ("embedding", "generative")
        return [
            part
            for stream in streams
            for part in file_samples(stream, self._schedule.samples(step, stream), sources, names)
        ]

    def embedding_dataset(self, step: int) -> str | None:
        """Name of the file of a step's embedding batch, `mixed` for several; None where that stream is not trained."""
        numbers = self._schedule.embedding_files(step)
        return None if not numbers else self._names[numbers[0]] if len(numbers) == 1 else "mixed"

    def generative_losses(self, step: int, token_losses: np.ndarray) -> dict[str, float]:
        """The mean loss of each file of a step's generative batch; see `file_losses`."""
        return file_losses(self._schedule.generative_rows(step), token_losses, self._names)

    def plan(self, step: int) -> StepPlan:
        """Which texts step `step`, counted from 0, holds, and where."""
        return self._schedule.step(step)

    def report(self) -> list[str]:
        """Lines for people about the training data."""
        return self._schedule.report()

    def batches(self, start: int) -> Iterator[GritBatch]:
        """Batches of steps `start`, `start + 1`, ..., counted from 0, to the last one, filled ahead of their use."""
        steps = grain.MapDataset.range(start, self._config.train.steps)
        batches = steps.map(_StepFiller(self._schedule, self._filler(*self._training)))
        read = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)  # tokenizing is slower with more threads
        dataset = batches.to_iter_dataset(read_options=read)
        workers = self._config.data.workers
        if workers:
            _parse_absl_flags()
            dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2))
        return iter(dataset)

    def validation_batches(self) -> Iterator[GritBatch]:
        """Batches that hold every validation record and every record held out once; none without either."""
        yield from map(self._filler(*self._validation).fill, self._validation_plans)
        yield from map(self._filler(*self._training).fill, self._held_out_plans)

    def _open(self, paths: str | list[str]) -> tuple[list[Source], list[FileIndex]]:
        skip_bad = self._config.data.skip_bad
        sources = [open_source(path, skip_bad=skip_bad) for path in find_files(paths)]
        return sources, build_indexes(sources, self._tokenizer, skip_bad=skip_bad)

    def _filler(self, sources: list[Source], indexes: list[FileIndex]) -> _Filler:
        config = self._config
        return _Filler(sources, indexes, self._tokenizer, config.data, config.model.embedding.pooling, self._host_share)


@dataclasses.dataclass(frozen=True)
class _StepFiller:
    schedule: Schedule
    filler: _Filler

    def __call__(self, step: int) -> GritBatch:
        return self.filler.fill(self.schedule.step(int(step)))


def _parse_absl_flags() -> None:
    """Grain's workers read absl flags, which nobody parses in a program that is not absl's."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
