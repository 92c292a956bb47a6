"""Keys and values of the embedding pass: computed with the vectors, and concatenated for a prefix."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from grit_jax.config import EmbeddingConfig, TransformerConfig
from grit_jax.inference.decode import empty_state, stacked
from grit_jax.model.pooling import vectors_of
from grit_jax.model.transformer import KVCache, Params, Transformer, bind, rotations
from grit_jax.parallel.execution import Execution
from grit_jax.parallel.sharding import constrain


@functools.partial(jax.jit, static_argnums=0, static_argnames=("settings", "execution"))
def embed_with_cache(
    model: Transformer,
    params: Params,
    tokens: Int[Array, "batch length"],
    segment_ids: Int[Array, "batch length"],
    pool_weights: Float[Array, "batch length"],
    *,
    settings: EmbeddingConfig,
    execution: Execution,
) -> tuple[Float[Array, "batch out"], KVCache]:
    """Vectors of texts, one per row, float32, and a KV cache of all tokens; both whole on every device.

    `segment_ids` is 1 for the tokens of a text and 0 for padding, whose keys and values are arbitrary.
    """
    bound = bind(model, params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    mask = bound.mask(segment_ids, positions, causal=settings.attention == "causal")
    rows, slots = tokens.shape
    empty = empty_state(model, params, rows=rows, slots=slots, dtype=execution.dtype).cache
    hidden, cache = bound.with_cache(tokens, mask, empty, execution)
    vectors = vectors_of(bound, hidden, segment_ids, pool_weights, num_segments=1, settings=settings)[:, 0]
    return jax.tree.map(lambda x: constrain(x, *["whole"] * x.ndim), (vectors, stacked(cache)))


def concatenate(caches: list[KVCache], config: TransformerConfig, *, corrected: bool) -> KVCache | None:
    """Keys and values of several texts, one after the other; None without a text.

    Args:
      caches: Numpy [layers, tokens, kv_heads, head_dim] each, of texts read from position 0.
      config: Shape of the model that read them.
      corrected: Whether to rotate each text's keys to positions after the preceding texts. Otherwise every text keeps
        its own positions, as in the paper's two-cache variants.
    """
    if not caches:
        return None
    keys, num_before = [], 0
    for cache in caches:
        keys.append(_rotated(cache.keys, num_before, config) if corrected and num_before else cache.keys)
        num_before += cache.keys.shape[1]
    return KVCache(np.concatenate(keys, axis=1), np.concatenate([cache.values for cache in caches], axis=1))


def _rotated(keys: np.ndarray, by: int, config: TransformerConfig) -> np.ndarray:
    """Keys moved on by `by` positions: rotations add up under every scaling. In NumPy, as XLA compiles per length."""
    full, local = rotations(jnp.full((1, 1), by), config)
    by_layer = [local if windowed and local is not None else full for windowed in config.layer_windows]
    cos, sin = (np.stack([np.asarray(one[part])[0] for one in by_layer])[:, :, None] for part in (0, 1))
    first, second = np.split(keys, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(keys.dtype)
