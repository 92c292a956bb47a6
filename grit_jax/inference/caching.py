"""Keys and values of the embedding pass, and what a model makes of texts that come after them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from grit_jax.config import EmbeddingConfig, TransformerConfig
from grit_jax.losses.language import target_log_likelihoods
from grit_jax.model.attention import AttentionMask
from grit_jax.model.decode import empty_state
from grit_jax.model.pooling import vectors_of
from grit_jax.model.transformer import Cache, KVCache, Params, Transformer, bind, rotations
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
    """Vectors of texts, one in each row, and the keys and values of all layers; whole on every device.

    Args:
      model: Abstract model.
      params: Its parameters.
      tokens: Texts, padded on the right to a common length.
      segment_ids: 1 for the tokens of a text, 0 for padding, whose keys and values mean nothing.
      pool_weights: Sums to 1 in each row.
      settings: Attention of the pass, and how vectors are made.
      execution: How to compute; keys and values have the type of activations.

    Returns:
      Float32 vectors, and a cache [layers, batch, length, kv_heads, head_dim].
    """
    bound = bind(model, params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    mask = bound.mask(segment_ids, positions, causal=settings.attention == "causal")
    rows, slots = tokens.shape
    empty = empty_state(model, params, rows=rows, slots=slots, dtype=execution.dtype).cache
    hidden, cache = bound.with_cache(tokens, mask, empty, execution)
    vectors = vectors_of(bound, hidden, segment_ids, pool_weights, num_segments=1, settings=settings)[:, 0]
    return jax.tree.map(lambda x: constrain(x, *["whole"] * x.ndim), (vectors, _stacked(cache)))


@functools.partial(jax.jit, static_argnums=0)
def score_after(
    model: Transformer,
    params: Params,
    prefix: KVCache,
    num_cached: Int[Array, ""],
    tokens: Int[Array, " length"],
    targets: Int[Array, " length"],
) -> Float[Array, " length"]:
    """Log p of a target after each token of a text that comes after keys and values, float32; whole on every device.

    Args:
      model: Abstract model.
      params: Its parameters.
      prefix: [layers, slots, kv_heads, head_dim] with room for the text after what is cached.
      num_cached: Slots that hold something.
      tokens: The text.
      targets: What each token is followed by.
    """
    bound, dtype = bind(model, params), prefix.keys.dtype
    positions = (num_cached + jnp.arange(tokens.shape[0]))[None]
    slots = jnp.arange(prefix.keys.shape[1])[None]
    mask = AttentionMask(positions, slots, None, None, causal=True, window=bound.config.sliding_window)
    row = jax.tree.map(lambda x: x[:, None], prefix)
    cache: Cache = [KVCache(*layer) for layer in zip(*row, strict=True)] if bound.is_split else row
    hidden, _ = bound.with_cache(tokens[None], mask, cache, Execution(dtype))
    scores, _ = target_log_likelihoods(hidden[0], bound.output_layer(dtype), targets)
    return constrain(scores, "whole")


def joined(caches: list[KVCache], config: TransformerConfig, *, corrected: bool) -> KVCache | None:
    """Keys and values of several texts, one after the other; None for no text.

    Args:
      caches: Numpy arrays [layers, tokens, kv_heads, head_dim], each of a text that was read from position 0.
      config: Shape of the model that read them.
      corrected: Whether the keys of each text are rotated on by the tokens before it, as if it had been read there.
        Without, every text keeps its own positions, as the paper's two-cache variants do.
    """
    if not caches:
        return None
    keys, num_before = [], 0
    for cache in caches:
        keys.append(_rotated(cache.keys, num_before, config) if corrected and num_before else cache.keys)
        num_before += cache.keys.shape[1]
    return KVCache(np.concatenate(keys, axis=1), np.concatenate([cache.values for cache in caches], axis=1))


def _rotated(keys: np.ndarray, by: int, config: TransformerConfig) -> np.ndarray:
    """Keys as at positions that are `by` higher.

    Rotations add up: every kind of scaling multiplies a position with a frequency that does not depend on it. In numpy,
    as XLA would compile a program for every length.
    """
    full, local = rotations(jnp.full((1, 1), by), config)
    by_layer = [local if windowed and local is not None else full for windowed in config.layer_windows]
    cos, sin = (np.stack([np.asarray(one[part])[0] for one in by_layer])[:, :, None] for part in (0, 1))
    first, second = np.split(keys, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(keys.dtype)


def _stacked(cache: Cache) -> KVCache:
    return cache if isinstance(cache, KVCache) else jax.tree.map(lambda *layers: jnp.stack(layers), *cache)
