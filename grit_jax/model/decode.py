"""Generation with a key/value cache."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt32

from grit_jax import sharding
from grit_jax.model.attention import AttentionMask
from grit_jax.model.transformer import Cache, KVCache, Params, Transformer, bind


def empty_cache(model: Transformer, batch: int, slots: int, dtype: jnp.dtype) -> Cache:
    """A cache for sequences of up to `slots` tokens."""
    config = model.config
    shape = (batch, slots, config.num_kv_heads, config.head_dim)
    if model.is_split:
        return [KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_layers)]
    shape = (config.num_layers, *shape)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def _advance(
    model: Transformer, tokens: Int[Array, "batch length"], positions: Int[Array, "batch length"], cache: Cache
) -> tuple[Float[Array, "batch length embed"], Cache]:
    """Hidden states of `tokens`, which see the cache up to their own position.

    Slot p holds position p, so what is written beyond a sequence's end is overwritten before any token sees it.
    """
    keys = jax.tree.leaves(cache)[0]
    slots = jnp.arange(keys.shape[-3])[None]
    mask = AttentionMask(positions, slots, None, None, causal=True, window=model.config.sliding_window)
    return model.with_cache(tokens, mask, cache, dtype=keys.dtype)


def sample(
    logits: Float[Array, "batch vocab"],
    keys: Key[Array, " batch"],
    *,
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
) -> Int[Array, " batch"]:
    """One token per row: the likeliest at temperature 0, else a draw from the nucleus.

    The nucleus is the smallest set of likeliest tokens with probability `top_p` (Holtzman et al., arXiv 1904.09751).
    `keys` holds one random key per row.
    """

    def draw(row_logits, key):
        scaled = row_logits / jnp.maximum(temperature, 1e-6)
        descending = jnp.sort(scaled)[::-1]
        before = jnp.cumsum(jax.nn.softmax(descending)) - jax.nn.softmax(descending)
        # The likeliest token is always kept: the probability before it is 0.
        threshold = jnp.min(jnp.where(before < top_p, descending, jnp.inf))
        return jax.random.categorical(key, jnp.where(scaled >= threshold, scaled, -jnp.inf))

    greedy = jnp.argmax(logits, axis=-1)
    return jax.lax.cond(temperature > 0, lambda: jax.vmap(draw)(logits, keys), lambda: greedy)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("slots", "dtype"))
def prefill(
    model: Transformer,
    params: Params,
    tokens: Int[Array, "batch length"],
    lengths: Int[Array, " batch"],
    *,
    slots: int,
    dtype: jnp.dtype,
) -> tuple[Float[Array, "batch vocab"], Cache]:
    """Reads prompts, padded on the right to a common length.

    Returns:
      Float32 logits of the token after each prompt, and the cache.
    """
    model = bind(model, params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, cache = _advance(model, tokens, positions, empty_cache(model, tokens.shape[0], slots, dtype))
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return model.output_layer(dtype)(last), cache


@functools.partial(jax.jit, static_argnums=0, static_argnames="steps", donate_argnames="cache")
def decode(
    model: Transformer,
    params: Params,
    logits: Float[Array, "batch vocab"],
    cache: Cache,
    lengths: Int[Array, " batch"],
    seeds: UInt32[Array, " batch"],
    *,
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
    steps: int,
) -> tuple[Int[Array, "batch steps"], Float[Array, "batch vocab"], Cache]:
    """Samples the next `steps` tokens of every sequence.

    Args:
      model: Abstract model.
      params: Its parameters.
      logits: Float32 logits of the first of them.
      cache: Keys and values of what came before; its memory is reused.
      lengths: Tokens that came before.
      seeds: Of each sequence; a token's draw depends on it and the token's position alone.
      temperature: 0 takes the likeliest token.
      top_p: Probability of the nucleus that is drawn from.
      steps: Number of tokens.

    Returns:
      The tokens, whole on every device; logits of the one after them, and the cache.
    """
    bound = bind(model, params)
    output_layer = bound.output_layer(jax.tree.leaves(cache)[0].dtype)
    keys = jax.vmap(jax.random.key)(seeds)

    def step(carry, position_offset):
        logits, cache = carry
        positions = lengths + position_offset
        draw_keys = jax.vmap(jax.random.fold_in)(keys, positions)
        tokens = sample(logits, draw_keys, temperature=temperature, top_p=top_p)
        hidden, cache = _advance(bound, tokens[:, None], positions[:, None], cache)
        return (output_layer(hidden[:, 0]), cache), tokens

    (logits, cache), tokens = jax.lax.scan(step, (logits, cache), jnp.arange(steps))
    return sharding.constrain(tokens.T, "whole", "whole"), logits, cache
