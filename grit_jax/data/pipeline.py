"""From the schedule's plans to batches of tokens, for the rows of this host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from grit_jax.batch import EmbeddingBatch, GenerativeBatch, GritBatch, HostShare
from grit_jax.config import Config, InputError, Pooling
from grit_jax.data.index import FileIndex
from grit_jax.data.indexing import build_indexes
from grit_jax.data.packing import FilledRows, Packing, fill_rows, ranges
from grit_jax.data.records import Stream
from grit_jax.data.samples import FileSamples, dataset_names, file_losses, file_samples
from grit_jax.data.schedule import EmbeddingPlan, GenerativePlan, RowPlan, Schedule, StepPlan, validation_steps
from grit_jax.data.sources import find_files
from grit_jax.tokenizer import Tokenizer


class PlannedRows(NamedTuple):
    """This host's rows of a stream, and the texts in them.

    Attributes:
      rows: With the texts in place.
      texts: int64 [texts]; their numbers in the plan.
      lengths: int64 [texts]; tokens of each.
      spans: int32 [spans, 2]; of the texts, one after the other, as they are without a cut.
      num_spans: int64 [texts].
    """

    rows: FilledRows
    texts: np.ndarray
    lengths: np.ndarray
    spans: np.ndarray
    num_spans: np.ndarray


def planned_rows(plan: RowPlan, indexes: Sequence[FileIndex], share: HostShare, row_length: int) -> PlannedRows:
    """The rows of a plan that a host fills, from the indexes of the files that the plan counts."""
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


def embedding_batch(plan: EmbeddingPlan, planned: PlannedRows, pooling: Pooling) -> EmbeddingBatch:
    """The embedding half of a batch; a text is pooled over its first span."""
    rows, first = planned.rows, np.cumsum(planned.num_spans) - planned.num_spans
    weights = rows.spread(pool_weights(planned.spans[first], planned.lengths, pooling))
    return EmbeddingBatch(
        *rows[:3], weights, plan.query_slots, plan.passage_slots, plan.query_weights, plan.passage_ids
    )


def generative_batch(plan: GenerativePlan, planned: PlannedRows) -> GenerativeBatch:
    """The generative half of a batch; a token is scored from the one before it, so the first one never is."""
    rows, lengths = planned.rows, planned.lengths
    targets = np.zeros_like(rows.tokens)
    targets[:, :-1] = rows.tokens[:, 1:] * (rows.segment_ids[:, 1:] == rows.segment_ids[:, :-1])
    owner = np.repeat(np.arange(len(lengths)), planned.num_spans)
    starts, ends = np.clip(planned.spans, 1, lengths[owner, None]).T
    scored = ranges((np.cumsum(lengths) - lengths)[owner] + starts - 1, ends - starts)
    weights = np.zeros(int(lengths.sum()), np.float32)
    weights[scored] = np.repeat(plan.token_weights[planned.texts][owner], ends - starts)
    return GenerativeBatch(*rows[:3], targets, rows.spread(weights))


def pool_weights(spans: np.ndarray, lengths: np.ndarray | int, pooling: Pooling) -> np.ndarray:
    """What each token's hidden state weighs in the vector of its text.

    Args:
      spans: int [texts, 2]; token range of each text, after BOS, instruction and markers.
      lengths: int [texts]; tokens of the whole prompts after truncation; more than where their spans start.
      pooling: `mean` of the text, `weighted_mean` with weights 1, 2, 3 ..., `last_token`, or `cls`, the first token
        of the prompt.

    Returns:
      float32 [sum of lengths], one text after the other, each summing to 1.
    """
    lengths = np.broadcast_to(lengths, len(spans)).astype(np.int64)
    firsts = np.cumsum(lengths) - lengths
    starts, ends = firsts + spans[:, 0], firsts + np.minimum(spans[:, 1], lengths)
    counts = ends - starts
    weights = np.zeros(int(lengths.sum()), np.float32)
    match pooling:
        case "mean":
            weights[ranges(starts, counts)] = np.repeat(1 / counts, counts)
        case "weighted_mean":
            sums = counts * (counts + 1) / 2
            weights[ranges(starts, counts)] = ranges(np.ones_like(counts), counts) / np.repeat(sums, counts)
        case "last_token":
            weights[ends - 1] = 1
        case "cls":
            weights[firsts] = 1
    return weights


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
        self._config, self._tokenizer, self._host_share = config, tokenizer, host_share
        if not config.data.train:
            raise InputError("data.train is missing; name the files or folders to train on")
        self._training = self._indexes(config.data.train)
        self._names = dataset_names([index.path for index in self._training])
        self._schedule = Schedule(
            self._training, data=config.data, loss=config.loss, train=config.train, row_multiples=row_multiples
        )
        self.fingerprint = self._schedule.fingerprint
        self._held_out_plans = self._schedule.held_out_steps()
        self._validation = self._indexes(config.data.validation) if config.data.validation else []
        self._validation_plans = validation_steps(
            self._validation, data=config.data, train=config.train, row_multiples=row_multiples
        )

    def host_facts(self) -> dict[str, str]:
        """What every host must have found in its files: their order, and what each of them holds."""
        facts = {}
        for key, indexes in (("data.train", self._training), ("data.validation", self._validation)):
            facts[key] = ", ".join(index.name for index in indexes)
            for number, index in enumerate(indexes):
                facts[f"the content of {key}, file {number + 1}"] = f"{index.name} {'-'.join(index.fingerprint)}"
        return facts

    def samples(self, step: int) -> list[FileSamples]:
        """The records that step `step`, counted from 0, takes of each file."""
        streams: tuple[Stream, ...] = ("embedding", "generative")
        return [
            part
            for stream in streams
            for part in file_samples(stream, self._schedule.samples(step, stream), self._training, self._names)
        ]

    def embedding_dataset(self, step: int) -> str | None:
        """Name of the file of a step's embedding batch, `mixed` for several; None where that stream is not trained."""
        numbers = self._schedule.embedding_files(step)
        return None if not numbers else self._names[numbers[0]] if len(numbers) == 1 else "mixed"

    def generative_losses(self, step: int, token_losses: np.ndarray) -> dict[str, float]:
        """The mean loss of each file of a step's generative batch; see `file_losses`."""
        return file_losses(self._schedule.generative_rows(step), token_losses, self._names)

    def report(self) -> list[str]:
        """Lines for people about the training data."""
        return self._schedule.report()

    def batch(self, step: int) -> GritBatch:
        """The batch of step `step`, counted from 0."""
        return self._filled(self._schedule.step(step), self._training)

    def batches(self, start: int) -> Iterator[GritBatch]:
        """The batches of steps `start`, `start + 1`, ..., counted from 0, to the last one."""
        return map(self.batch, range(start, self._config.train.steps))

    def validation_batches(self) -> Iterator[GritBatch]:
        """Batches that hold every validation record and every record held out once; none without either."""
        for plans, indexes in ((self._validation_plans, self._validation), (self._held_out_plans, self._training)):
            for plan in plans:
                yield self._filled(plan, indexes)

    def _indexes(self, paths: str | list[str]) -> list[FileIndex]:
        return build_indexes(find_files(paths), self._tokenizer, skip_bad=self._config.data.skip_bad)

    def _filled(self, plan: StepPlan, indexes: Sequence[FileIndex]) -> GritBatch:
        data, share = self._config.data, self._host_share
        embedding, generative = None, None
        if plan.embedding:
            rows = planned_rows(plan.embedding.rows, indexes, share, data.embedding_row_length)
            embedding = embedding_batch(plan.embedding, rows, self._config.model.embedding.pooling)
        if plan.generative:
            rows = planned_rows(plan.generative.rows, indexes, share, data.generative_max_length)
            generative = generative_batch(plan.generative, rows)
        return GritBatch(embedding, generative)
