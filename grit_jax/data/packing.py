"""Packs texts into fixed-length rows, and fills the rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_SLACK = 0.05  # share of padding rows that buckets may add


class Packing(NamedTuple):
    """Where each text goes.

    Attributes:
      num_rows: Number of rows.
      row: int32 [texts].
      offset: int32 [texts]; index of the first token in the row.
      segment: int32 [texts]; number of the text in its row, from 1.
    """

    num_rows: int
    row: np.ndarray
    offset: np.ndarray
    segment: np.ndarray


def pack(lengths: np.ndarray, *, row_length: int, max_segments: int) -> Packing:
    """Best-fit decreasing: the longest text first, each into the fullest row that still holds it.

    Args:
      lengths: int [texts], each at most `row_length`.
      row_length: Tokens of a row.
      max_segments: Most texts in a row.
    """
    row, offset, segment = (np.zeros(len(lengths), np.int32) for _ in range(3))
    by_space: list[list[int]] = [[] for _ in range(row_length + 1)]  # rows by the number of tokens that still fit
    fullest_with = np.zeros(row_length + 1, bool)  # which of those lists hold a row
    segments: list[int] = []
    for text in np.argsort(-lengths, kind="stable"):
        length = int(lengths[text])
        space = length + int(np.argmax(fullest_with[length:]))
        if fullest_with[space]:
            index = by_space[space].pop()
            fullest_with[space] = bool(by_space[space])
        else:
            space, index = row_length, len(segments)
            segments.append(0)
        segments[index] += 1
        row[text], offset[text], segment[text] = index, row_length - space, segments[index]
        if segments[index] < max_segments:
            by_space[space - length].append(index)
            fullest_with[space - length] = True
    return Packing(len(segments), row, offset, segment)


class FilledRows(NamedTuple):
    """Rows of texts, with 0 in positions without a token.

    Attributes:
      tokens: int32 [rows, length].
      segment_ids: int32 [rows, length]; number of the text in its row, from 1.
      positions: int32 [rows, length]; of each token in its text.
      indices: int64 [tokens]; of the texts' tokens, in order, in the flattened rows.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    indices: np.ndarray

    def spread(self, values: np.ndarray) -> np.ndarray:
        """Values of all tokens of the texts, in order, in their rows: [rows, length]; 0 elsewhere."""
        return _spread(values, self.indices, self.tokens.shape)


def fill_rows(tokens: np.ndarray, lengths: np.ndarray, packing: Packing, *, row_length: int) -> FilledRows:
    """Fills rows with packed texts.

    Args:
      tokens: int [tokens]; tokens of the texts, in order.
      lengths: int [texts]; tokens of each.
      packing: Where each text goes.
      row_length: Tokens of a row.
    """
    indices = ranges(packing.row * np.int64(row_length) + packing.offset, lengths)
    positions = ranges(np.zeros(len(lengths), np.int64), lengths)
    shape = packing.num_rows, row_length
    values = (each.astype(np.int32) for each in (tokens, np.repeat(packing.segment, lengths), positions))
    return FilledRows(*(_spread(each, indices, shape) for each in values), indices)


def fill_single_rows(texts: Sequence[np.ndarray], *, num_rows: int, row_length: int) -> FilledRows:
    """Rows of one text each, in order; rows without a text are padding."""
    row = np.arange(len(texts))
    packing = Packing(num_rows, row, np.zeros_like(row), np.ones_like(row))
    return fill_rows(np.concatenate(texts), np.array([len(text) for text in texts]), packing, row_length=row_length)


def _spread(values: np.ndarray, indices: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    rows = np.zeros(shape, values.dtype)
    rows.reshape(-1)[indices] = values
    return rows


def kept_indices(starts: np.ndarray, whole: np.ndarray, lengths: np.ndarray, endings: np.ndarray) -> np.ndarray:
    """Indices of the tokens left by cutting texts as `TokenizedPrompt.cut` does: int64 [sum of lengths].

    Args:
      starts: int64 [texts]; index of each text's first token in a flat array.
      whole: int [texts]; tokens of the whole text.
      lengths: int [texts]; tokens left, at most all.
      endings: int [texts]; how many of these are the text's last tokens.
    """
    kept = ranges(starts, lengths)
    endings = np.minimum(endings, lengths)
    of_endings = ranges(np.cumsum(lengths) - endings, endings)
    kept[of_endings] += np.repeat(whole - lengths, endings)
    return kept


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """int64 [sum of counts]: for each i, `counts[i]` consecutive numbers from `starts[i]`."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - counts), counts)


def choose_buckets(needed: np.ndarray, *, multiple: int, limit: int) -> tuple[int, ...]:
    """The row counts that steps are rounded up to: the fewest that keep padding rows under 5% of all rows.

    Less padding is not worth another compile.

    Args:
      needed: int [steps]; rows that a sample of steps needs.
      multiple: A divisor of every bucket.
      limit: Most buckets.
    """
    rounded = -(-needed // multiple)
    sizes, counts = np.unique(rounded, return_counts=True)
    total = int(needed.sum())
    chosen: list[int] = []
    for number in range(1, min(limit, len(sizes)) + 1):
        padded, chosen = _best_buckets(sizes, counts, number)
        if padded * multiple <= total * (1 + _SLACK):
            break
    largest = int(needed.max())
    if len(set(needed.tolist())) > 1:
        largest = -(-largest * 105 // 100)  # other steps may need a few more than the sampled ones
    return tuple(size * multiple for size in [*chosen[:-1], -(-largest // multiple)])


def _best_buckets(sizes: np.ndarray, counts: np.ndarray, number: int) -> tuple[int, list[int]]:
    """The rows of all steps under the best `number` sizes, and those sizes; dynamic programming over sorted sizes."""
    steps = np.concatenate([[0], np.cumsum(counts)])
    best: list[tuple[int, list[int]]] = [(0, [])] + [
        (int(steps[i]) * int(sizes[i - 1]), [int(sizes[i - 1])]) for i in range(1, len(sizes) + 1)
    ]
    for _ in range(number - 1):
        best = [best[0]] + [
            min(
                (best[j][0] + int(steps[i] - steps[j]) * int(sizes[i - 1]), [*best[j][1], int(sizes[i - 1])])
                for j in range(i)
            )
            for i in range(1, len(sizes) + 1)
        ]
    return best[-1]


def round_up(num_rows: int, buckets: tuple[int, ...]) -> int:
    """The smallest bucket that holds `num_rows`; over the largest one, a multiple of it."""
    return next((bucket for bucket in buckets if num_rows <= bucket), -(-num_rows // buckets[-1]) * buckets[-1])
