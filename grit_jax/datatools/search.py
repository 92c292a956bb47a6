"""Exact scores of vectors on all devices."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec


class Searchable:
    """Vectors of passages, a share of them on each device.

    Args:
      vectors: float32 [passages, embed].
    """

    def __init__(self, vectors: np.ndarray):
        mesh = jax.make_mesh((jax.local_device_count(),), ("passages",), devices=jax.local_devices())
        self._size = len(vectors)
        padded = np.pad(vectors, ((0, -len(vectors) % mesh.size), (0, 0)))
        self._passages = jax.device_put(padded, NamedSharding(mesh, PartitionSpec("passages")))
        self._everywhere = NamedSharding(mesh, PartitionSpec())

    def scores(self, queries: np.ndarray) -> np.ndarray:
        """Inner products, float32 [queries, passages].

        Args:
          queries: float32 [queries, embed].
        """
        rows = 1 << max(3, (len(queries) - 1).bit_length())  # a handful of shapes to compile for
        padded = np.pad(queries, ((0, rows - len(queries)), (0, 0)))
        scores = _products(jax.device_put(padded, self._everywhere), self._passages)
        return np.asarray(scores)[: len(queries), : self._size]


@functools.partial(jax.jit)
def _products(queries: jax.Array, passages: jax.Array) -> jax.Array:
    # True float32: a TPU's default product would reorder neighbours.
    return jnp.matmul(queries, passages.T, precision=jax.lax.Precision.HIGHEST)
