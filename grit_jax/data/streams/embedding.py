"""The embedding stream: queries, their positives and hard negatives."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from grit_jax.config import Config, Pooling
from grit_jax.data.batch import EmbeddingBatch, max_segments
from grit_jax.data.packing import ranges
from grit_jax.data.records import EmbeddingRecord
from grit_jax.data.streams.stream import PlannedRows, Ranks, Role, RowPlan, Samples, Stream
from grit_jax.text import prompts
from grit_jax.text.prompts import Prompt
from grit_jax.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from grit_jax.data.usable import StreamFiles


class EmbeddingPlan(NamedTuple):
    """A batch of the stream; see `EmbeddingBatch` for weights and ids.

    Attributes:
      rows: Its texts and their rows.
      query_texts: int [queries]; index of each query's text in `rows`, any for a filler.
      passage_texts: int [queries * group]; likewise.
      query_weights: float32 [queries].
      passage_ids: int32 [queries * group].
    """

    rows: RowPlan
    query_texts: np.ndarray
    passage_texts: np.ndarray
    query_weights: np.ndarray
    passage_ids: np.ndarray


class EmbeddingStream(Stream):
    """Texts that are pooled into vectors: the query, positives and negatives of each record."""

    name = "embedding"
    record = EmbeddingRecord
    no_room = "instruction leaves no room"
    one_file = True
    code = 0

    def __init__(self, config: Config):
        data = config.data
        self.batch_size, self.row_length, self.packing = data.embedding_batch, data.embedding_row_length, data.packing
        self.num_chunks = config.train.embedding_chunks
        self.limits_by_key = {
            "data.query_max_length": data.query_max_length,
            "data.passage_max_length": data.passage_max_length,
        }
        self._query_limit, self._passage_limit = self.limits_by_key.values()
        self._group_size, self._exclude_duplicates = data.group_size, data.exclude_duplicates
        self._pooling: Pooling = config.model.embedding.pooling

    @staticmethod
    def prompts(record: EmbeddingRecord, tokenizer: Tokenizer) -> list[Prompt]:
        """Query, positives and negatives, each after its instruction."""
        return [
            prompts.embedding(text, instruction, bos=tokenizer.bos, ending=tokenizer.ending)
            for instruction, text in (record.query, *record.positives, *record.negatives)
        ]

    @staticmethod
    def num_positives(record: EmbeddingRecord) -> int:
        """Number of positives."""
        return len(record.positives)

    def limits(self, text: np.ndarray) -> np.ndarray:
        """int32 [texts]: the limit of queries for the first text of a record, else that of passages."""
        return np.where(text == 0, self._query_limit, self._passage_limit).astype(np.int32)

    def roles(self, text: np.ndarray, positives: np.ndarray) -> list[Role]:
        """Queries, positives and negatives."""
        return [
            Role("query", text == 0, self._query_limit),
            Role("positive", (text > 0) & (text <= positives), self._passage_limit),
            Role("negative", text > positives, self._passage_limit),
        ]

    def usable(self, ok: np.ndarray, first: np.ndarray, positives: np.ndarray) -> np.ndarray:
        """Those with a query and a positive: bool [records]."""
        sums = np.concatenate([[0], np.cumsum(ok)])
        return ok[first] & (sums[first + 1 + positives] > sums[first + 1])

    def plan(self, files: StreamFiles, samples: Samples, ranks: Ranks, *, summed: bool) -> EmbeddingPlan:
        """Queries, positives and negatives of the samples; fillers complete a short batch."""
        batch, group = self.batch_size, self._group_size
        texts = self._groups(files, samples, ranks)
        present = texts >= 0
        owner = np.nonzero(present)[0]
        of_texts = Samples(samples.file[owner], samples.record[owner])
        rows = files.rows(of_texts, texts[present])
        number, ids = np.zeros((batch, 1 + group), int), np.full((batch, 1 + group), -1, np.int32)
        filled = np.zeros((batch, 1 + group), bool)
        filled[: len(texts)] = present
        number[filled] = np.arange(len(owner))
        if self._exclude_duplicates:
            ids[filled] = np.unique(files.hashes(of_texts, texts[present]), return_inverse=True)[1]
            ids[filled[:, 0], 1:] = _with_positives_of_equal_queries(ids[filled[:, 0]])
        else:
            ids[filled] = number[filled]
        weights = np.where(np.arange(batch) < len(texts), 1 if summed else 1 / batch, 0).astype(np.float32)
        query, passages = number[:, 0], number[:, 1:].reshape(-1)
        return EmbeddingPlan(rows, query, passages, weights, ids[:, 1:].reshape(-1))

    def _groups(self, files: StreamFiles, samples: Samples, ranks: Ranks) -> np.ndarray:
        """Indices of query, positive and negatives in their record, int [samples, 1 + group]; -1 if there is none.

        A record with too few negatives repeats them.
        """
        zeros = np.zeros(len(samples.file), int)
        counts, positives = files.num_texts(samples), files.num_positives(samples)
        owner = np.repeat(np.arange(len(counts)), counts)
        text = ranges(zeros, counts)
        usable = files.targets(Samples(samples.file[owner], samples.record[owner]), text) > 0
        role = np.where(usable, np.where(text == 0, 0, np.where(text <= positives[owner], 1, 2)), 3)
        order = np.lexsort((ranks(len(text)), role, owner))
        num_positives, num_negatives = (np.bincount(owner[role == k], minlength=len(counts)) for k in (1, 2))
        positive = np.cumsum(counts) - counts + 1
        cycled = np.arange(self._group_size - 1) % np.maximum(num_negatives, 1)[:, None]
        negative = (positive + num_positives)[:, None] + np.where(num_negatives[:, None], cycled, 0)
        negative = np.minimum(negative, len(order) - 1)  # the last record may end with its positives
        return np.column_stack(
            [zeros, text[order[positive]], np.where(num_negatives[:, None], text[order[negative]], -1)]
        )

    def fill(self, plan: EmbeddingPlan, planned: PlannedRows) -> EmbeddingBatch:
        """The batch; a text is pooled over its first span."""
        rows, first = planned.rows, np.cumsum(planned.num_spans) - planned.num_spans
        weights = rows.spread(pool_weights(planned.spans[first], planned.lengths, self._pooling))
        slots = plan.rows.row * np.int32(max_segments(self.row_length)) + plan.rows.segment - 1
        texts = slots[plan.query_texts], slots[plan.passage_texts]
        return EmbeddingBatch(*rows[:3], weights, *texts, plan.query_weights, plan.passage_ids)

    def full_step(self) -> np.ndarray:
        """Queries, then passages: int [texts]."""
        passages = self.batch_size * self._group_size
        return np.repeat([self._query_limit, self._passage_limit], [self.batch_size, passages])

    def empty(self, num_rows: int) -> EmbeddingBatch:
        """Zeros of the batch's shapes and dtypes."""

        def zeros(dtype: type, *shape: int) -> np.ndarray:
            return np.broadcast_to(np.zeros((), dtype), shape)

        rows, queries = (num_rows, self.row_length), self.batch_size
        ids, passages = [zeros(np.int32, *rows)] * 3, queries * self._group_size
        slots = zeros(np.int32, queries), zeros(np.int32, passages)
        return EmbeddingBatch(
            *ids, zeros(np.float32, *rows), *slots, zeros(np.float32, queries), zeros(np.int32, passages)
        )


def _with_positives_of_equal_queries(ids: np.ndarray) -> np.ndarray:
    """Ids of passages, [queries, group], that are also equal for positives of equal queries.

    Args:
      ids: int [queries, 1 + group]; ids of query, positive and negatives, equal for equal texts, -1 for fillers.
    """
    size = ids.max() + 1
    queries, positives = ids[:, 0], ids[:, 1]
    edges = coo_array((np.ones(len(ids)), (queries, size + positives)), shape=(2 * size, 2 * size))
    labels = connected_components(edges, directed=False)[1][size:]
    return np.where(ids[:, 1:] == -1, -1, labels[ids[:, 1:]])


def pool_weights(spans: np.ndarray, lengths: np.ndarray | int, pooling: Pooling) -> np.ndarray:
    """The weight of each token's hidden state in the vector of its text.

    Args:
      spans: int [texts, 2]; token range of each text, after BOS, instruction and markers.
      lengths: int [texts]; tokens of the whole prompts after truncation, each longer than the start of its span.
      pooling: `mean` of the text, `weighted_mean` with weights 1, 2, 3, ..., `last_token`, or `cls`, the first token of
        the prompt.

    Returns:
      float32 [sum of lengths], for the texts in order; each text's weights sum to 1.
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
