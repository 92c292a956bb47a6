"""Batches of given texts in given rows, without the data pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from grit_jax.data.batch import EmbeddingBatch, GenerativeBatch, max_segments
from grit_jax.data.packing import FilledRows, Packing, fill_rows
from grit_jax.data.streams.embedding import pool_weights

_OPENING = 2  # first tokens of a text, which are neither pooled nor scored


class Layout(NamedTuple):
    """Texts in rows.

    Attributes:
      order: int [texts]; indices of the texts, row by row; the other fields are in this order.
      lengths: int [texts]; tokens of each text.
      packing: Where each text goes.
      rows: The filled rows.
    """

    order: np.ndarray
    lengths: np.ndarray
    packing: Packing
    rows: FilledRows


def random_texts(rng: np.random.Generator, count: int, *, vocab: int = 64) -> list[np.ndarray]:
    """Texts of 4 to 13 random tokens from 1 on."""
    return [rng.integers(1, vocab, rng.integers(4, 14)).astype(np.int32) for _ in range(count)]


def lay_out(texts: Sequence[np.ndarray], rows: Sequence[Sequence[int]], length: int) -> Layout:
    """Fills rows of `length` tokens, each with the texts whose indices are given for it."""
    order = np.array([i for members in rows for i in members])  # a row may be empty
    row = np.repeat(np.arange(len(rows)), [len(members) for members in rows])
    offset = np.concatenate([np.cumsum([0, *(len(texts[i]) for i in members)])[:-1] for members in rows])
    segment = np.concatenate([np.arange(1, len(members) + 1) for members in rows])
    lengths = np.array([len(texts[i]) for i in order])
    assert np.all(offset + lengths <= length)
    packing = Packing(len(rows), row, offset, segment)
    filled = fill_rows(np.concatenate([texts[i] for i in order]), lengths, packing, row_length=length)
    return Layout(order, lengths, packing, filled)


def embedding_batch(
    texts: Sequence[np.ndarray], rows: Sequence[Sequence[int]], length: int, *, num_queries: int
) -> EmbeddingBatch:
    """A batch whose first `num_queries` texts are queries, the others passages; the first 2 tokens are not pooled."""
    order, lengths, packing, filled = lay_out(texts, rows, length)
    spans = np.stack([np.full_like(lengths, _OPENING), lengths], axis=1)
    slots = np.zeros(len(texts), np.int32)
    slots[order] = packing.row * max_segments(length) + packing.segment - 1
    return EmbeddingBatch(
        *filled[:3],
        filled.spread(pool_weights(spans, lengths, "mean")),
        slots[:num_queries],
        slots[num_queries:],
        np.full(num_queries, 1 / num_queries, np.float32),
        np.arange(len(texts) - num_queries, dtype=np.int32),
    )


def generative_batch(texts: Sequence[np.ndarray], rows: Sequence[Sequence[int]], length: int) -> GenerativeBatch:
    """Every token after the first 2 of each text is scored, all with the same weight; no token is 0."""
    filled = lay_out(texts, rows, length).rows
    targets = np.zeros_like(filled.tokens)
    targets[:, :-1] = filled.tokens[:, 1:] * (filled.segment_ids[:, 1:] == filled.segment_ids[:, :-1])
    scored = (targets > 0) & (filled.positions >= _OPENING - 1)
    return GenerativeBatch(*filled[:3], targets, (scored / scored.sum()).astype(np.float32))
