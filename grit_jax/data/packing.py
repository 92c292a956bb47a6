"""Placing texts in fixed-length rows, and filling the rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Packing(NamedTuple):
    """Where each text goes.

    Attributes:
      num_rows: Rows in use.
      row: int32 [texts].
      offset: int32 [texts]; first token's place in the row.
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
      max_segments: Most texts of a row.
    """
    row, offset, segment = (np.zeros(len(lengths), np.int32) for _ in range(3))
    by_space: list[list[int]] = [[] for _ in range(row_length + 1)]  # rows by the tokens they have left
    fullest_with = np.zeros(row_length + 1, bool)  # which of those lists hold a row
    segments: list[int] = []
    for text in np.argsort(-lengths, kind="stable"):
        length = int(lengths[text])
        space = length + int(np.argmax(fullest_with[length:]))
        if fullest_with[space]:
            place = by_space[space].pop()
            fullest_with[space] = bool(by_space[space])
        else:
            space, place = row_length, len(segments)
            segments.append(0)
        segments[place] += 1
        row[text], offset[text], segment[text] = place, row_length - space, segments[place]
        if segments[place] < max_segments:
            by_space[space - length].append(place)
            fullest_with[space - length] = True
    return Packing(len(segments), row, offset, segment)


class FilledRows(NamedTuple):
    """Rows with texts in them, and 0 where there is none.

    Attributes:
      tokens: int32 [rows, length].
      segment_ids: int32 [rows, length]; numbers of the texts in their row, from 1.
      positions: int32 [rows, length]; of each token in its text.
      places: int64 [tokens]; where the tokens of the texts, one text after the other, are in the flattened rows.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    places: np.ndarray

    def spread(self, values: np.ndarray) -> np.ndarray:
        """Values of all tokens of the texts, one text after the other, in their rows: [rows, length]; 0 elsewhere."""
        return _spread(values, self.places, self.tokens.shape)


def fill_rows(tokens: np.ndarray, lengths: np.ndarray, packing: Packing, *, row_length: int) -> FilledRows:
    """Rows that hold texts where a packing puts them.

    Args:
      tokens: int [tokens]; of the texts, one after the other.
      lengths: int [texts]; tokens of each.
      packing: Where each text goes.
      row_length: Tokens of a row.
    """
    places = ranges(packing.row * np.int64(row_length) + packing.offset, lengths)
    positions = ranges(np.zeros(len(lengths), np.int64), lengths)
    shape = packing.num_rows, row_length
    values = (each.astype(np.int32) for each in (tokens, np.repeat(packing.segment, lengths), positions))
    return FilledRows(*(_spread(each, places, shape) for each in values), places)


def fill_single_rows(texts: Sequence[np.ndarray], *, num_rows: int, row_length: int) -> FilledRows:
    """Rows of one text each, in order; rows without a text are padding."""
    number = np.arange(len(texts))
    packing = Packing(num_rows, number, np.zeros_like(number), np.ones_like(number))
    return fill_rows(np.concatenate(texts), np.array([len(text) for text in texts]), packing, row_length=row_length)


def kept_places(starts: np.ndarray, whole: np.ndarray, lengths: np.ndarray, endings: np.ndarray) -> np.ndarray:
    """Where the tokens are that stay of texts that are cut as `TokenizedPrompt.cut` does: int64 [sum of lengths].

    Args:
      starts: int64 [texts]; where each text's tokens start in a flat array.
      whole: int [texts]; tokens of the whole text.
      lengths: int [texts]; tokens that stay, at most those of the whole text.
      endings: int [texts]; tokens at the end that stay.
    """
    places = ranges(starts, lengths)
    endings = np.minimum(endings, lengths)
    of_endings = ranges(np.cumsum(lengths) - endings, endings)
    places[of_endings] += np.repeat(whole - lengths, endings)
    return places


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """int64 [sum of counts]: `starts[i]`, `starts[i] + 1`, ... `counts[i]` times, for one i after the other."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - counts), counts)


def _spread(values: np.ndarray, places: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    rows = np.zeros(shape, values.dtype)
    rows.reshape(-1)[places] = values
    return rows


def choose_buckets(needed: np.ndarray, *, multiple: int, limit: int, slack: float = 0.05) -> tuple[int, ...]:
    """The row counts that steps are rounded up to: as few as keep the padding rows under `slack` of all rows.

    Args:
      needed: int [steps]; rows that a sample of steps needs.
      multiple: Every bucket is a multiple of it.
      limit: Most buckets.
      slack: Share of padding rows that is accepted; less is not worth another compile.
    """
    rounded = -(-needed // multiple)
    sizes, counts = np.unique(rounded, return_counts=True)
    total = int(needed.sum())
    chosen: list[int] = []
    for number in range(1, min(limit, len(sizes)) + 1):
        padded, chosen = _best_buckets(sizes, counts, number)
        if padded * multiple <= total * (1 + slack):
            break
    largest = int(needed.max())
    if len(set(needed.tolist())) > 1:
        largest = -(-largest * 105 // 100)  # later steps may need a little more than the sampled ones
    return tuple(size * multiple for size in [*chosen[:-1], -(-largest // multiple)])


def _best_buckets(sizes: np.ndarray, counts: np.ndarray, number: int) -> tuple[int, list[int]]:
    """The `number` sizes that minimise the rows of all steps, by dynamic programming over the sorted sizes."""
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
