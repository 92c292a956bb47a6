"""Exact search over vectors on all devices."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from grit_jax.data.batch import sizes

_QUERIES_AT_ONCE = 256
_SMALLEST_K, _GROWTH = 16, 8  # `k` of the first program, and the factor from one program to the next
_PASSAGES_AT_ONCE = 16384  # that a device converts to float32 and sorts at a time


class _Rows(Protocol):
    """A NumPy array [rows, ...], or an object that reads slices of one from disk."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> Any: ...
    def __getitem__(self, rows: slice, /) -> np.ndarray: ...


class Searchable:
    """Vectors of passages in their stored dtype, a share of them on each device of this process.

    Inner products are float32, computed from float32 queries and the exact values of the vectors.

    Args:
      vectors: float32, bfloat16 or int8 [passages, embed].
      scales: float32 [passages], the factor of each int8 vector; None for other dtypes.
    """

    def __init__(self, vectors: _Rows, scales: _Rows | None = None):
        devices = jax.local_devices()
        self._mesh = jax.make_mesh((len(devices),), ("passages",), devices=devices, axis_types=(AxisType.Auto,))
        self._size = vectors.shape[0]
        share = -(-self._size // len(devices))
        share += -share % min(share, _PASSAGES_AT_ONCE)
        self._passages = tuple(self._split(rows, share) for rows in (vectors, scales) if rows is not None)

    def _split(self, rows: _Rows, share: int) -> jax.Array:
        """`rows`, padded with zeros, `share` on each device; the host holds one device's share at a time."""
        pieces = []
        for index, device in enumerate(self._mesh.devices.flat):
            piece = np.zeros((share, *rows.shape[1:]), rows.dtype)
            found = rows[index * share : (index + 1) * share]
            piece[: len(found)] = found
            pieces.append(jax.block_until_ready(jax.device_put(piece, device)))
        shape = share * len(pieces), *rows.shape[1:]
        split = NamedSharding(self._mesh, PartitionSpec("passages"))
        return jax.make_array_from_single_device_arrays(shape, split, pieces)

    def scores(self, queries: np.ndarray) -> np.ndarray:
        """Inner products, float32 [queries, passages].

        Args:
          queries: float32 [queries, embed].
        """
        with jax.set_mesh(self._mesh):  # not the caller's mesh
            scores = jax.jit(_products)(self._replicated(queries), *self._passages)
        return np.asarray(scores)[: len(queries), : self._size]

    def top_k(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The passages with the largest inner products, best first; ties go to the smaller index.

        Args:
          queries: float32 [queries, embed].
          k: Number of passages to find, at most all.

        Returns:
          Inner products, float32 [queries, k], and indices of passages, int32 [queries, k].
        """
        k = min(k, self._size)
        compiled_k = next(size for size in self._compiled_ks() if size >= k)
        scores, indices = np.zeros((len(queries), k), np.float32), np.zeros((len(queries), k), np.int32)
        for first in range(0, len(queries), _QUERIES_AT_ONCE):
            some = slice(first, min(first + _QUERIES_AT_ONCE, len(queries)))
            with jax.set_mesh(self._mesh):
                best = _best(self._replicated(queries[some]), *self._passages, k=compiled_k, size=self._size)
            scores[some], indices[some] = (np.asarray(x)[: some.stop - first, :k] for x in best)
        return scores, indices

    def warm_up(self, k: int, progress: Callable[[int], None]) -> None:
        """Compiles the programs that find up to `k` passages for up to 8 queries; calls `progress(1)` after each."""
        for compiled_k in self._compiled_ks():
            if compiled_k < _GROWTH * k:
                self.top_k(np.zeros((1, self._passages[0].shape[1]), np.float32), compiled_k)
                progress(1)

    def _compiled_ks(self) -> list[int]:
        """The few values of `k` to compile programs for; `top_k` truncates their results to any number."""
        return sizes(_SMALLEST_K, self._size, growth=_GROWTH)

    def _replicated(self, queries: np.ndarray) -> jax.Array:
        rows = 1 << max(3, (len(queries) - 1).bit_length())  # so that few shapes are compiled
        padded = np.pad(queries, ((0, rows - len(queries)), (0, 0)))
        return jax.device_put(padded, NamedSharding(self._mesh, PartitionSpec()))


def _products(queries: jax.Array, passages: jax.Array, scales: jax.Array | None = None) -> jax.Array:
    # True float32: a TPU's default product would reorder neighbours.
    products = jnp.matmul(queries, passages.astype(jnp.float32).T, precision=jax.lax.Precision.HIGHEST)
    return products if scales is None else products * scales


@functools.partial(jax.jit, static_argnames=("k", "size"))
def _best(queries: jax.Array, *passages: jax.Array, k: int, size: int) -> tuple[jax.Array, jax.Array]:
    """Finds each device's best passages, then the best of these, without gathering the scores of all passages."""
    passages_axis = PartitionSpec("passages")

    @functools.partial(
        jax.shard_map, in_specs=(PartitionSpec(), passages_axis), out_specs=PartitionSpec(None, "passages")
    )
    def best_here(queries, passages):
        share = len(passages[0])
        block = min(share, _PASSAGES_AT_ONCE)
        blocks = [x.reshape(share // block, block, *x.shape[1:]) for x in passages]
        first = jax.lax.axis_index("passages") * share

        def better(best, step):
            number, block_passages = step
            indices = first + number * block + jnp.arange(block, dtype=jnp.int32)
            scores = jnp.where(indices < size, _products(queries, *block_passages), -jnp.inf)
            # Smaller indices come first, and `top_k` takes the first of equal scores.
            scores = jnp.concatenate([best[0], scores], axis=1)
            indices = jnp.concatenate([best[1], jnp.broadcast_to(indices, (len(queries), block))], axis=1)
            scores, columns = jax.lax.top_k(scores, k)
            return (scores, jnp.take_along_axis(indices, columns, axis=1)), None

        none = jnp.full((len(queries), k), -jnp.inf), jnp.zeros((len(queries), k), jnp.int32)
        none = jax.lax.pcast(none, "passages", to="varying")
        return jax.lax.scan(better, none, (jnp.arange(share // block), blocks))[0]

    scores, indices = best_here(queries, passages)
    scores, columns = jax.lax.top_k(scores, k)
    return scores, jnp.take_along_axis(indices, columns, axis=1)
