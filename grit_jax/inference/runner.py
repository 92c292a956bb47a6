"""A model's parameters on a mesh, and the batches that go through it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from jax.sharding import Mesh

from grit_jax.config.ranges import require_positive
from grit_jax.data.batch import max_segments, sizes
from grit_jax.data.packing import FilledRows, Packing, fill_rows, pack
from grit_jax.model.transformer import Params, Transformer, split_layers
from grit_jax.parallel import sharding
from grit_jax.parallel.execution import Execution

T = TypeVar("T")


class PackedTexts(NamedTuple):
    """A batch of packed rows.

    Attributes:
      rows: The rows.
      texts: int [texts]; indices of the texts in them.
      starts: int [texts]; index of each text's first token in the flattened rows.
      slots: int [texts]; index of each text's vector.
    """

    rows: FilledRows
    texts: np.ndarray
    starts: np.ndarray
    slots: np.ndarray


class ModelRunner:
    """A model's parameters on a mesh, and the few shapes that its programs are compiled for.

    Attributes:
      params: Parameters; a list of layers on CPU, stacked layers elsewhere.
      model: Abstract model.
      mesh: Where it runs.
      execution: How it computes.
      shards: Pieces that batches are split into.
      batch_tokens: Default number of tokens that go through the model at a time.
      shortest_row: Tokens of the shortest row.
    """

    def __init__(self, params: Params, model: Transformer, mesh: Mesh, execution: Execution):
        on_cpu = sharding.platform(mesh) == "cpu"
        self.params = split_layers(params) if on_cpu else params
        self.model, self.mesh, self.execution = model, mesh, execution
        self.shards = sharding.axis_size(mesh, "batch")
        self.batch_tokens = 2048 if on_cpu else 16384  # more does not fit the caches of a CPU
        self.shortest_row = max(64, execution.row_unit)

    def row_length(self, num_tokens: int) -> int:
        """Length of the row for a text of `num_tokens`."""
        return bucket(num_tokens, at_least=self.shortest_row)

    def row_lengths(self, max_length: int) -> list[int]:
        """Lengths of the rows for texts of up to `max_length` tokens."""
        return sizes(self.shortest_row, self.row_length(max_length), growth=2)

    def full_batch(self, row_length: int, batch_tokens: int | None) -> int:
        """Rows that go through the model at a time."""
        require_positive("batch_tokens", batch_tokens, "leave it out to let the device decide")
        return max(1, (batch_tokens or self.batch_tokens) // (row_length * self.shards)) * self.shards

    def packed(self, texts: Sequence[np.ndarray], batch_tokens: int | None) -> Iterator[PackedTexts]:
        """Packs the tokens of texts, int [tokens] each, into batches of rows."""
        if not len(texts):
            return
        lengths = np.array([len(tokens) for tokens in texts], np.int64)
        # Attention costs more in longer rows, so short texts get short rows, twice their length, which fill well.
        longest = self.row_length(int(lengths.max()))
        row_lengths = np.array([min(2 * self.row_length(int(length)), longest) for length in lengths])
        if lengths.sum() <= (batch_tokens or self.batch_tokens):
            row_lengths[:] = longest  # one batch: several would leave more rows empty
        for row_length in np.unique(row_lengths).tolist():
            of_length = np.flatnonzero(row_lengths == row_length)
            most = max_segments(row_length)
            packing = pack(lengths[of_length], row_length=row_length, max_segments=most)
            full = self.full_batch(row_length, batch_tokens)
            for first in range(0, packing.num_rows, full):
                num_rows = min(full, bucket(min(full, packing.num_rows - first), at_least=self.shards))
                here = np.flatnonzero((packing.row >= first) & (packing.row < first + num_rows))
                row, offset, segment = (each[here] for each in packing[1:])
                indices, placed = of_length[here], Packing(num_rows, row - first, offset, segment)
                tokens = np.concatenate([texts[index] for index in indices])
                yield PackedTexts(
                    fill_rows(tokens, lengths[indices], placed, row_length=row_length), indices,
                    placed.row * row_length + offset, placed.row * most + segment - 1,
                )  # fmt: skip


def bucket(size: int, *, at_least: int) -> int:
    """The next power of two times `at_least`, so that few shapes are compiled."""
    while at_least < size:
        at_least *= 2
    return at_least


def one_behind(batches: Iterator[T]) -> Iterator[T]:
    """Yields each batch once the device has the next, so that it works while the host takes results."""
    earlier: list[T] = []
    for batch in batches:
        yield from earlier
        earlier = [batch]
    yield from earlier
