"""Exact search over vectors on all devices."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

_QUERIES_AT_ONCE = 256


class Searchable:
    """Vectors of passages, a share of them on each device.

    Args:
      vectors: float32 [passages, embed].
    """

    def __init__(self, vectors: np.ndarray):
        devices = jax.local_devices()
        self._mesh = jax.make_mesh((len(devices),), ("passages",), devices=devices, axis_types=(AxisType.Auto,))
        self._size = len(vectors)
        padded = np.pad(vectors, ((0, -len(vectors) % len(devices)), (0, 0)))
        self._passages = jax.device_put(padded, NamedSharding(self._mesh, PartitionSpec("passages")))

    def scores(self, queries: np.ndarray) -> np.ndarray:
        """Inner products, float32 [queries, passages].

        Args:
          queries: float32 [queries, embed].
        """
        with jax.set_mesh(self._mesh):  # and not the caller's
            scores = jax.jit(_products)(self._placed(queries), self._passages)
        return np.asarray(scores)[: len(queries), : self._size]

    def top_k(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The passages with the largest inner products, best first; of equal ones the smaller number comes first.

        Args:
          queries: float32 [queries, embed].
          k: How many; no more than there are passages are given.

        Returns:
          Inner products, float32 [queries, k], and numbers of passages, int32 [queries, k].
        """
        k = min(k, self._size)
        scores, numbers = np.zeros((len(queries), k), np.float32), np.zeros((len(queries), k), np.int32)
        for first in range(0, len(queries), _QUERIES_AT_ONCE):
            some = slice(first, min(first + _QUERIES_AT_ONCE, len(queries)))
            with jax.set_mesh(self._mesh):
                best = _best(self._placed(queries[some]), self._passages, k=k, size=self._size)
            scores[some], numbers[some] = (np.asarray(x)[: some.stop - first] for x in best)
        return scores, numbers

    def _placed(self, queries: np.ndarray) -> jax.Array:
        rows = 1 << max(3, (len(queries) - 1).bit_length())  # a handful of shapes to compile for
        padded = np.pad(queries, ((0, rows - len(queries)), (0, 0)))
        return jax.device_put(padded, NamedSharding(self._mesh, PartitionSpec()))


def _products(queries: jax.Array, passages: jax.Array) -> jax.Array:
    # True float32: a TPU's default product would reorder neighbours.
    return jnp.matmul(queries, passages.T, precision=jax.lax.Precision.HIGHEST)


@functools.partial(jax.jit, static_argnames=("k", "size"))
def _best(queries: jax.Array, passages: jax.Array, *, k: int, size: int) -> tuple[jax.Array, jax.Array]:
    """Each device's best are sorted together: scores of all passages are never in one place."""
    passages_axis = PartitionSpec(None, "passages")

    @functools.partial(jax.shard_map, in_specs=(PartitionSpec(), PartitionSpec("passages")), out_specs=passages_axis)
    def best_here(queries, passages):
        numbers = jax.lax.axis_index("passages") * len(passages) + jnp.arange(len(passages), dtype=jnp.int32)
        scores = jnp.where(numbers < size, _products(queries, passages), -jnp.inf)
        scores, places = jax.lax.top_k(scores, min(k, len(passages)))
        return scores, numbers[places]

    scores, numbers = best_here(queries, passages)
    scores, places = jax.lax.top_k(scores, k)
    return scores, jnp.take_along_axis(numbers, places, axis=1)
