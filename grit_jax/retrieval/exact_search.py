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
_FEWEST_BEST, _GROWTH = 16, 8  # of the best that a program finds, and from one program to the next
_PASSAGES_AT_ONCE = 16384  # of a device: what is in float32 at a time, and what is sorted at a time


class Rows(Protocol):
    """An array [rows, ...], or what can be sliced like one and is read from disk then."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As of an array."""
        ...

    @property
    def dtype(self) -> Any:
        """As of an array."""
        ...

    def __getitem__(self, rows: slice, /) -> np.ndarray:
        """As of an array."""
        ...


class Searchable:
    """Vectors of passages, a share of them on each device of this process, in the type that they have.

    Products are float32, of float32 queries and the exact values of the vectors, whatever type these are of.

    Args:
      vectors: float32, bfloat16 or int8 [passages, embed].
      scales: float32 [passages], what each vector of int8 is multiplied by; None for other types.
    """

    def __init__(self, vectors: Rows, scales: Rows | None = None):
        devices = jax.local_devices()
        self._mesh = jax.make_mesh((len(devices),), ("passages",), devices=devices, axis_types=(AxisType.Auto,))
        self._size = vectors.shape[0]
        share = -(-self._size // len(devices))
        share += -share % min(share, _PASSAGES_AT_ONCE)
        self._passages = tuple(self._split(rows, share) for rows in (vectors, scales) if rows is not None)

    def _split(self, rows: Rows, share: int) -> jax.Array:
        """`rows` and zeros after them, `share` on each device; no more than one device's are in memory here."""
        pieces = []
        for number, device in enumerate(self._mesh.devices.flat):
            piece = np.zeros((share, *rows.shape[1:]), rows.dtype)
            found = rows[number * share : (number + 1) * share]
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
        with jax.set_mesh(self._mesh):  # and not the caller's
            scores = jax.jit(_products)(self._placed(queries), *self._passages)
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
        most = next(most for most in self._counts() if most >= k)
        scores, numbers = np.zeros((len(queries), k), np.float32), np.zeros((len(queries), k), np.int32)
        for first in range(0, len(queries), _QUERIES_AT_ONCE):
            some = slice(first, min(first + _QUERIES_AT_ONCE, len(queries)))
            with jax.set_mesh(self._mesh):
                best = _best(self._placed(queries[some]), *self._passages, k=most, size=self._size)
            scores[some], numbers[some] = (np.asarray(x)[: some.stop - first, :k] for x in best)
        return scores, numbers

    def warm_up(self, k: int, progress: Callable[[int], None] = lambda _: None) -> int:
        """Compiles the programs that find up to `k` passages for up to 8 queries, and returns how many.

        `progress` is called after each.
        """
        needed = [most for most in self._counts() if most < _GROWTH * k]
        for most in needed:
            self.top_k(np.zeros((1, self._passages[0].shape[1]), np.float32), most)
            progress(1)
        return len(needed)

    def _counts(self) -> list[int]:
        """How many of the best programs find: a handful, so that any number is had without a program of its own."""
        return sizes(_FEWEST_BEST, self._size, growth=_GROWTH)

    def _placed(self, queries: np.ndarray) -> jax.Array:
        rows = 1 << max(3, (len(queries) - 1).bit_length())  # a handful of shapes to compile for
        padded = np.pad(queries, ((0, rows - len(queries)), (0, 0)))
        return jax.device_put(padded, NamedSharding(self._mesh, PartitionSpec()))


def _products(queries: jax.Array, passages: jax.Array, scales: jax.Array | None = None) -> jax.Array:
    # True float32: a TPU's default product would reorder neighbours.
    products = jnp.matmul(queries, passages.astype(jnp.float32).T, precision=jax.lax.Precision.HIGHEST)
    return products if scales is None else products * scales


@functools.partial(jax.jit, static_argnames=("k", "size"))
def _best(queries: jax.Array, *passages: jax.Array, k: int, size: int) -> tuple[jax.Array, jax.Array]:
    """Each device's best are sorted together: scores of all passages are never in one place."""
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
            numbers = first + number * block + jnp.arange(block, dtype=jnp.int32)
            scores = jnp.where(numbers < size, _products(queries, *block_passages), -jnp.inf)
            # Those of smaller numbers are before the others, and of equal scores the first is taken.
            scores = jnp.concatenate([best[0], scores], axis=1)
            numbers = jnp.concatenate([best[1], jnp.broadcast_to(numbers, (len(queries), block))], axis=1)
            scores, places = jax.lax.top_k(scores, k)
            return (scores, jnp.take_along_axis(numbers, places, axis=1)), None

        none = jnp.full((len(queries), k), -jnp.inf), jnp.zeros((len(queries), k), jnp.int32)
        none = jax.lax.pcast(none, "passages", to="varying")
        return jax.lax.scan(better, none, (jnp.arange(share // block), blocks))[0]

    scores, numbers = best_here(queries, passages)
    scores, places = jax.lax.top_k(scores, k)
    return scores, jnp.take_along_axis(numbers, places, axis=1)
