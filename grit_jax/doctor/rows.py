"""Batches of given texts in given rows, made without the data pipeline."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from grit_jax.data.batch import EmbeddingBatch, GenerativeBatch, max_segments
from grit_jax.data.packing import Packing, fill_rows

# The (row, offset, segment) of each text, by its number.
Places = dict[int, tuple[int, int, int]]


def random_texts(rng: np.random.Generator, count: int, *, low: int = 4, high: int = 14, vocab: int = 64):
    """Texts of `low` to `high - 1` random tokens."""
    return [rng.integers(1, vocab, rng.integers(low, high)).astype(np.int32) for _ in range(count)]


def layout(
    texts: Sequence[np.ndarray], rows: Sequence[Sequence[int]], length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Places]:
    """`tokens`, `segment_ids`, `positions`, each int32 [rows, length], and where each text is.

    `rows` lists the numbers of the texts of each row, which must fit in.
    """
    places: Places = {}
    for row, members in enumerate(rows):
        offset = 0
        for segment, number in enumerate(members, start=1):
            places[number] = (row, offset, segment)
            offset += len(texts[number])
        assert offset <= length
    packing = Packing(len(rows), *np.array(list(places.values()), np.int32).reshape(-1, 3).T)
    lengths = np.array([len(texts[number]) for number in places])
    filled = fill_rows(np.concatenate([texts[number] for number in places]), lengths, packing, row_length=length)
    return filled.tokens, filled.segment_ids, filled.positions, places


def embedding_batch(
    texts: Sequence[np.ndarray], rows: Sequence[Sequence[int]], length: int, *, num_queries: int, skip: int = 2
) -> EmbeddingBatch:
    """Texts 0..num_queries-1 are queries, the others passages; the first `skip` tokens of each are not pooled."""
    tokens, segment_ids, positions, places = layout(texts, rows, length)
    pool_weights = np.zeros(tokens.shape, np.float32)
    slots = np.zeros(len(texts), np.int32)
    for number, (row, offset, segment) in places.items():
        pool_weights[row, offset + skip : offset + len(texts[number])] = 1 / (len(texts[number]) - skip)
        slots[number] = row * max_segments(length) + segment - 1
    return EmbeddingBatch(
        tokens,
        segment_ids,
        positions,
        pool_weights,
        slots[:num_queries],
        slots[num_queries:],
        np.full(num_queries, 1 / num_queries, np.float32),
        np.arange(len(texts) - num_queries, dtype=np.int32),
    )


def generative_batch(
    texts: Sequence[np.ndarray], rows: Sequence[Sequence[int]], length: int, *, skip: int = 2
) -> GenerativeBatch:
    """Every token after the first `skip` of each text is scored, all with the same weight."""
    tokens, segment_ids, positions, places = layout(texts, rows, length)
    targets, loss_weights = np.zeros(tokens.shape, np.int32), np.zeros(tokens.shape, np.float32)
    scored = sum(len(text) - skip for text in texts)
    for number, (row, offset, _) in places.items():
        end = offset + len(texts[number])
        targets[row, offset : end - 1] = tokens[row, offset + 1 : end]
        loss_weights[row, offset + skip - 1 : end - 1] = 1 / scored
    return GenerativeBatch(tokens, segment_ids, positions, targets, loss_weights)
