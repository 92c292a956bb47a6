"""Who may attend to whom, and attention itself."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grit_jax.precision import wide


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """Which keys a query sees, as data; nothing is inferred from token ids.

    A key is visible when it belongs to the query's segment and, under `causal`, does not
    come later and is less than `window` positions back. A bidirectional query sees keys up
    to `window` positions away on both sides.

    For one row with segments 1 1 1 2 2 0 (0 is padding), `x` marks visible keys:

        causal  x . . . . .      bidirectional  x x x . . .
                x x . . . .                     x x x . . .
                x x x . . .                     x x x . . .
                . . . x . .                     . . . x x .
                . . . x x .                     . . . x x .
                . . . . . x                     . . . . . x

    Attributes:
      query_positions: int32 [batch, length]; position of each query in its text.
      key_positions: int32 [batch or 1, keys]; position of each key in its text.
      query_segments: int32 [batch, length], or None when a row is one text.
      key_segments: int32 [batch, keys], or None.
      causal: Whether later keys are hidden.
      window: Keys a causal query sees, itself included, or farthest key of a bidirectional one; None for all.
    """

    query_positions: Int[Array, "batch length"]
    key_positions: Int[Array, "#batch keys"]
    query_segments: Int[Array, "batch length"] | None
    key_segments: Int[Array, "batch keys"] | None
    causal: bool = dataclasses.field(metadata={"static": True})
    window: int | None = dataclasses.field(default=None, metadata={"static": True})

    @classmethod
    def packed(
        cls,
        segment_ids: Int[Array, "batch length"],
        positions: Int[Array, "batch length"],
        *,
        causal: bool,
        window: int | None,
    ) -> AttentionMask:
        """Mask of packed rows attending to themselves."""
        return cls(positions, positions, segment_ids, segment_ids, causal, window)

    def materialize(self) -> Bool[Array, "batch length keys"]:
        """The dense mask: True where a key is visible. Padding sees padding, so no row is empty."""
        query, key = self.query_positions[:, :, None], self.key_positions[:, None, :]
        visible = jnp.ones((), bool)
        if self.query_segments is not None and self.key_segments is not None:
            visible = self.query_segments[:, :, None] == self.key_segments[:, None, :]
        if self.causal:
            visible &= key <= query
        if self.window is not None:
            visible &= (query - key < self.window) if self.causal else (abs(query - key) <= self.window)
        return jnp.broadcast_to(visible, jnp.broadcast_shapes(query.shape, key.shape))


def attention(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads head_dim"],
    mask: AttentionMask,
    *,
    scale: float,
    soft_cap: float | None,
) -> Float[Array, "batch length heads head_dim"]:
    """Grouped-query attention; query head `n` reads key/value head `n // (heads // kv_heads)`.

    Scores are `scale` times the products of queries and keys, bounded to `soft_cap` by tanh (Gemma 2) where it is
    given. Softmax is float32. The heads of a group are folded into the query dim, so that each
    key/value head is one batched matrix product.
    """
    batch, length, num_heads, head_dim = query.shape
    num_kv_heads, num_keys = key.shape[2], key.shape[1]
    group = num_heads // num_kv_heads
    query = query.reshape(batch, length, num_kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    query = (query * scale).reshape(batch, num_kv_heads, group * length, head_dim)
    scores = jnp.einsum("bkth,bskh->bkts", query, key, preferred_element_type=wide(query))
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = scores.reshape(batch, num_kv_heads, group, length, num_keys)
    scores = jnp.where(mask.materialize()[:, None, None], scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    weights = weights.reshape(batch, num_kv_heads, group * length, num_keys)
    out = jnp.einsum("bkts,bskh->bkth", weights, value)
    out = out.reshape(batch, num_kv_heads, group, length, head_dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, length, num_heads, head_dim)
