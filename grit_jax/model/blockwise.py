"""Attention of packed rows in tiles, skipping hidden ones; in plain JAX, for CPUs.

The softmax over tiles follows FlashAttention (Dao et al., arXiv 2205.14135): memory is linear in the row length.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from grit_jax.parallel.execution import ATTENTION, num_chunks, wide

_TILE = 64
_SCORES = 64  # rows * heads in one tile: their scores take a megabyte, which fits a core's cache


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """The mask and the tiling. Arrays are [row groups * tiles per row, rows, kv_heads, tokens, head_dim].

    In queries, the tokens dim holds the heads of a group one after another.
    """

    causal: bool
    window: int | None
    soft_cap: float | None
    tiles_per_row: int

    def in_sight(self, segments: Int[Array, "tiles rows tokens"]) -> tuple[Array, Array, Array]:
        """Tiles of queries and of keys, pairs with visible keys first, and the number of these pairs."""
        number = self.tiles_per_row
        # Segments ascend along a row.
        first, last = (x.reshape(-1, number, x.shape[-1]) for x in (segments[..., 0], segments[..., -1]))
        common = (first[:, :, None] <= last[:, None]) & (first[:, None] <= last[:, :, None])
        steps = jnp.arange(number)[:, None] - jnp.arange(number)
        seen = jnp.any(common, axis=-1)
        if self.causal:
            seen &= steps >= 0
        if self.window is not None:
            seen &= (abs(steps) - 1) * segments.shape[-1] < self.window
        group, query, key = jnp.unravel_index(jnp.argsort(~seen.reshape(-1), stable=True), seen.shape)
        return group * number + query, group * number + key, jnp.sum(seen)

    def scores(self, query: Array, key: Array, segments: Array, i: Array, j: Array) -> tuple[Array, Array]:
        """Scores of a pair of tiles [rows, kv_heads, queries, keys], -inf for hidden keys, and the soft cap's slope."""
        scores = jnp.einsum("rkqh,rksh->rkqs", query[i], key[j], preferred_element_type=wide(query))
        slope = jnp.ones((), scores.dtype)
        if self.soft_cap is not None:
            bounded = jnp.tanh(scores / self.soft_cap)
            scores, slope = self.soft_cap * bounded, 1 - jnp.square(bounded)
        tokens = jnp.arange(segments.shape[-1])
        distance = (i - j) * len(tokens) + tokens[:, None] - tokens
        seen = segments[i][:, :, None] == segments[j][:, None]
        if self.causal:
            seen &= distance >= 0
        if self.window is not None:
            seen &= (distance < self.window) if self.causal else (abs(distance) <= self.window)
        by_head = scores.reshape(*scores.shape[:2], -1, *seen.shape[1:])
        return jnp.where(seen[:, None, None], by_head, -jnp.inf).reshape(scores.shape), slope


def blockwise_attention(
    query: Float[Array, "rows length heads head_dim"],
    key: Float[Array, "rows length kv_heads head_dim"],
    value: Float[Array, "rows length kv_heads head_dim"],
    segments: Int[Array, "rows length"],
    *,
    causal: bool,
    window: int | None,
    soft_cap: float | None,
) -> Float[Array, "rows length heads head_dim"]:
    """Attention, masked as in `AttentionMask`, of rows with ascending segments and padding (0) at their ends.

    Queries are already scaled. Products have the arguments' dtype; softmax and sums are float32.
    """
    rows, length, heads, head_dim = query.shape
    kv_heads, tile = key.shape[2], min(_TILE, length)
    number = -(-length // tile)
    groups = num_chunks(rows, max(1, _SCORES // heads))
    missing, padding = number * tile - length, jnp.iinfo(segments.dtype).max
    query, key, value = (jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) for x in (query, key, value))
    segments = jnp.where(segments == 0, padding, segments)
    segments = jnp.pad(segments, ((0, 0), (0, missing)), constant_values=padding)

    def cut(x):
        """[rows, length, ...] as [groups * tiles, rows of a group, tile, ...]."""
        x = x.reshape(groups, rows // groups, number, tile, *x.shape[2:])
        return jnp.moveaxis(x, 2, 1).reshape(groups * number, rows // groups, tile, *x.shape[4:])

    def by_head(x):
        x = cut(x).reshape(groups * number, rows // groups, tile, kv_heads, -1, head_dim)
        return x.transpose(0, 1, 3, 4, 2, 5).reshape(*x.shape[:2], kv_heads, -1, head_dim)

    tiles = _Tiles(causal, window, soft_cap, number)
    out = _attend(tiles, by_head(query), by_head(key), by_head(value), cut(segments))
    out = out.reshape(groups, number, rows // groups, kv_heads, -1, tile, head_dim).transpose(0, 2, 1, 5, 3, 4, 6)
    return out.reshape(rows, number * tile, heads, head_dim)[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(tiles: _Tiles, query, key, value, segments):
    return _attend_forward(tiles, query, key, value, segments)[0]


def _attend_forward(tiles, query, key, value, segments):
    queries, keys, count = tiles.in_sight(segments)
    dtype = wide(query)

    def add(pair, sums):
        i, j = queries[pair], keys[pair]
        highest, total, weighted = (x[i] for x in sums)
        scores, _ = tiles.scores(query, key, segments, i, j)
        higher = jnp.maximum(highest, jnp.max(scores, axis=-1))
        weights, shrink = jnp.exp(scores - higher[..., None]), jnp.exp(highest - higher)
        total = total * shrink + jnp.sum(weights, axis=-1)
        weighted = weighted * shrink[..., None] + _product("rkqs,rksh->rkqh", weights, value[j])
        return tuple(x.at[i].set(new) for x, new in zip(sums, (higher, total, weighted), strict=True))

    # A finite start: a query without visible keys in a tile keeps its sums.
    start = jnp.full(query.shape[:-1], jnp.finfo(dtype).min / 2, dtype)
    sums = (start, jnp.zeros_like(start), jnp.zeros(query.shape, dtype))
    highest, total, weighted = jax.lax.fori_loop(0, count, add, sums)
    out = checkpoint_name((weighted / total[..., None]).astype(query.dtype), ATTENTION)
    log_total = checkpoint_name(highest + jnp.log(total), ATTENTION)
    return out, (query, key, value, segments, out, log_total)


def _attend_backward(tiles, kept, cotangent):
    query, key, value, segments, out, log_total = kept
    queries, keys, count = tiles.in_sight(segments)
    dtype = wide(query)
    mean = jnp.sum(cotangent.astype(dtype) * out, axis=-1)

    def add(pair, gradients):
        i, j = queries[pair], keys[pair]
        to_query, to_key, to_value = gradients
        scores, slope = tiles.scores(query, key, segments, i, j)
        weights = jnp.exp(scores - log_total[i][..., None])
        to_value = to_value.at[j].add(_product("rkqs,rkqh->rksh", weights, cotangent[i]))
        to_weights = jnp.einsum("rkqh,rksh->rkqs", cotangent[i], value[j], preferred_element_type=dtype)
        to_scores = weights * (to_weights - mean[i][..., None]) * slope
        to_query = to_query.at[i].add(_product("rkqs,rksh->rkqh", to_scores, key[j]))
        to_key = to_key.at[j].add(_product("rkqs,rkqh->rksh", to_scores, query[i]))
        return to_query, to_key, to_value

    zeros = tuple(jnp.zeros(x.shape, dtype) for x in (query, key, value))
    gradients = jax.lax.fori_loop(0, count, add, zeros)
    return *(gradient.astype(query.dtype) for gradient in gradients), None


_attend.defvjp(_attend_forward, _attend_backward)


def _product(subscripts: str, weights: Array, x: Array) -> Array:
    """The product of a tile's weights and `x`, in the dtype of `x`, summed in that of the weights."""
    return jnp.einsum(subscripts, weights.astype(x.dtype), x, preferred_element_type=weights.dtype)
