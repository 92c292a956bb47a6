"""From hidden states to one vector per text."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grit_jax.config import EmbeddingConfig
from grit_jax.model.layers import gathered
from grit_jax.model.transformer import Transformer
from grit_jax.parallel.execution import wide


def pool(
    hidden: Float[Array, "batch length embed"],
    pool_weights: Float[Array, "batch length"],
    segment_ids: Int[Array, "batch length"],
    *,
    num_segments: int,
) -> Float[Array, "batch num_segments embed"]:
    """Weighted sums of each text's hidden states, float32; vector `i` of a row belongs to segment `i + 1`."""
    segments = jnp.arange(1, num_segments + 1)
    weights = jnp.where(segment_ids[:, None, :] == segments[:, None], pool_weights[:, None, :], 0.0)
    return jnp.einsum("bst,btd->bsd", weights, hidden.astype(wide(hidden)), precision=jax.lax.Precision.HIGHEST)


def normalize(x: Float[Array, "... embed"]) -> Float[Array, "... embed"]:
    """Scales to unit length over the last dim; a zero vector stays zero."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))


def vectors_of(
    model: Transformer,
    hidden: Float[Array, "batch length embed"],
    segment_ids: Int[Array, "batch length"],
    pool_weights: Float[Array, "batch length"],
    *,
    num_segments: int,
    settings: EmbeddingConfig,
) -> Float[Array, "batch num_segments out"]:
    """Vectors of texts, float32: pooled, projected if the model has a head, normalised if `settings` say so.

    The head is linear and pool weights sum to 1, so projecting after pooling equals projecting every token.
    """
    vectors = pool(hidden, pool_weights, segment_ids, num_segments=num_segments)
    if settings.projection_dim is not None:
        with jax.default_matmul_precision("highest"):
            vectors = gathered(model.projection, vectors.dtype)(vectors)
    return normalize(vectors) if settings.normalized else vectors
