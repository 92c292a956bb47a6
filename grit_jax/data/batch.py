"""The input of one training step: for every stream, packed rows that hold many texts each.

A batch maps the names of streams to named tuples of arrays. Fields in `per_row` have one entry a row, and a host holds
only its own rows of them; other fields it holds whole. `segment_ids` number the texts of a row from 1; 0 is padding.
`positions` restart at 0 with every text. Named tuples are pytrees, so importing them does not import JAX.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Array = Any  # numpy.ndarray on the host, jax.Array on the mesh
Batch = dict[str, Any]  # such as {"embedding": EmbeddingBatch(...), "generative": GenerativeBatch(...)}


class EmbeddingBatch(NamedTuple):
    """Queries and passages of one contrastive step, packed into shared rows.

    A text's vector has the *slot* `row * segments_per_row + segment_id - 1`. Passage `i * group_size` is the positive
    of query `i`; the rest of the group are its hard negatives.

    Attributes:
      tokens: int32 [rows, length].
      segment_ids: int32 [rows, length]; 0 is padding.
      positions: int32 [rows, length]; position of a token in its text.
      pool_weights: float32 [rows, length]; those of a text sum to 1, and are 0 for tokens that are not pooled.
      query_slots: int32 [queries].
      passage_slots: int32 [queries * group_size].
      query_weights: float32 [queries]; weight of each query's loss, 0 for a filler that completes a batch.
      passage_ids: int32 [queries * group_size]; passages with equal ids are never each other's negatives; fillers have
        -1 and are nobody's.
    """

    per_row = ("tokens", "segment_ids", "positions", "pool_weights")

    tokens: Array
    segment_ids: Array
    positions: Array
    pool_weights: Array
    query_slots: Array
    passage_slots: Array
    query_weights: Array
    passage_ids: Array


class GenerativeBatch(NamedTuple):
    """Conversations of one language-modelling step, packed into rows.

    Attributes:
      tokens: int32 [rows, length].
      segment_ids: int32 [rows, length]; 0 is padding.
      positions: int32 [rows, length]; position of a token in its text.
      targets: int32 [rows, length]; the next token, 0 at the end of a text.
      loss_weights: float32 [rows, length]; L_gen = sum(loss_weights * nll). 0 where the target is not scored.
    """

    per_row = ("tokens", "segment_ids", "positions", "targets", "loss_weights")

    tokens: Array
    segment_ids: Array
    positions: Array
    targets: Array
    loss_weights: Array


class HostShare(NamedTuple):
    """The rows of a batch that one host holds: some of `num_shards` equal shards.

    Attributes:
      shards: Indices of its shards, ascending.
      num_shards: Shards of the whole batch.
    """

    shards: tuple[int, ...]
    num_shards: int

    def rows(self, num_rows: int) -> np.ndarray:
        """int64 [host rows]: indices of this host's rows in a batch of `num_rows`, a multiple of `num_shards`."""
        return np.arange(num_rows).reshape(self.num_shards, -1)[list(self.shards)].reshape(-1)


ONE_HOST = HostShare((0,), 1)


def max_segments(row_length: int) -> int:
    """Most texts in a packed row: its number of pooling slots."""
    return max(1, row_length // 8)


def sizes(first: int, last: int, *, growth: int) -> list[int]:
    """`first`, `growth` times that, and so on up to `last`: the few sizes to compile programs for."""
    found = [min(first, last)]
    while found[-1] < last:
        found.append(min(growth * found[-1], last))
    return found
