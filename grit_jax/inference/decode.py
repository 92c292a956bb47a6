"""Generation with a KV cache: reads tokens into rows of a batch, and samples the next ones."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from grit_jax.model.attention import AttentionMask
from grit_jax.model.transformer import Cache, KVCache, Params, Transformer, bind
from grit_jax.parallel.execution import Execution
from grit_jax.parallel.sharding import constrain

TOP_LOGPROBS = 20  # likeliest tokens whose log p accompanies each sampled token

Values = Any  # an array of JAX or NumPy


class DecodeState(NamedTuple):
    """State of the rows of a batch: keys and values of the tokens read, and float32 logits of the next token."""

    cache: Cache
    logits: Float[Array, "rows vocab"]


class Sampling(NamedTuple):
    """How the next tokens of some rows are chosen.

    Attributes:
      seeds: uint32 [batch]; a token's draw depends only on its row's seed and its position.
      temperature: float32 [batch]; 0 takes the likeliest token.
      top_p: float32 [batch]; probability of the nucleus to draw from.
      logprobs: Whether to compute log p of the tokens.
    """

    seeds: Values
    temperature: Values
    top_p: Values
    logprobs: Values


class Logprobs(NamedTuple):
    """Log p of sampled tokens and of the likeliest ones, at temperature 1; zeros if not wanted.

    Attributes:
      chosen: float32 [batch, steps].
      likeliest: int32 [batch, steps, up to 20]; tokens, likeliest first.
      values: float32 of the same shape; their log p.
    """

    chosen: Values
    likeliest: Values
    values: Values


@functools.partial(jax.jit, static_argnums=0, static_argnames=("rows", "slots", "dtype"))
def empty_state(model: Transformer, params: Params, *, rows: int, slots: int, dtype: jnp.dtype) -> DecodeState:
    """An empty state for rows of up to `slots` tokens, its layers stacked or listed as those of `params`."""
    config = model.config

    def zeros():
        return jnp.zeros((rows, slots, config.num_kv_heads, config.head_dim), dtype)

    layers = [KVCache(zeros(), zeros()) for _ in range(config.num_layers)]
    cache = layers if bind(model, params).is_split else stacked(layers)
    return _placed(DecodeState(cache, jnp.zeros((rows, config.vocab_size), jnp.float32)))


@functools.partial(jax.jit, donate_argnames="state")
def clear(state: DecodeState, row: Int[Array, ""]) -> DecodeState:
    """Empties a row for its next text: masked values must still be finite, as 0 times infinity is not 0."""
    before = (slice(None),) * _dim_of_rows(state.cache)
    return _placed(state._replace(cache=jax.tree.map(lambda x: x.at[(*before, row)].set(0), state.cache)))


@functools.partial(jax.jit, static_argnums=0, donate_argnames="state")
def extend(
    model: Transformer,
    params: Params,
    state: DecodeState,
    tokens: Int[Array, "batch length"],
    starts: Int[Array, " batch"],
    lengths: Int[Array, " batch"],
    rows: Int[Array, " batch"] | None = None,
) -> DecodeState:
    """Reads more tokens of some rows.

    Args:
      model: Abstract model.
      params: Its parameters.
      state: The state before; donated.
      tokens: Padded on the right.
      starts: Tokens that each row has read before.
      lengths: Tokens that each row reads now; 0 leaves the row as it is.
      rows: Indices of the rows in the state; None for all of them. An index beyond the state is padding.
    """
    model, part = bind(model, params), _take(state, rows)
    hidden, cache = _advance(model, tokens, starts[:, None] + jnp.arange(tokens.shape[1]), part.cache)
    last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    logits = model.output_layer(_dtype(cache))(last).astype(jnp.float32)
    return _put(state, DecodeState(cache, jnp.where(lengths[:, None] > 0, logits, part.logits)), rows)


@functools.partial(jax.jit, donate_argnames="state")
def write_prefix(state: DecodeState, prefix: KVCache, row: Int[Array, ""], start: Int[Array, ""]) -> DecodeState:
    """Writes keys and values, [layers, tokens, kv_heads, head_dim], into a row from slot `start` on."""
    slots = start + jnp.arange(prefix.keys.shape[1])

    def write(into, values):
        index = (slice(None), row, slots)[-(into.ndim - 2) :]
        return into.at[index].set(values, mode="drop")

    is_stacked = isinstance(state.cache, KVCache)
    prefix_like = prefix if is_stacked else [KVCache(*layer) for layer in zip(*prefix, strict=True)]
    return _placed(state._replace(cache=jax.tree.map(write, state.cache, prefix_like)))


@functools.partial(jax.jit, static_argnums=0, static_argnames="steps", donate_argnames="state")
def decode(
    model: Transformer,
    params: Params,
    state: DecodeState,
    lengths: Int[Array, " batch"],
    sampling: Sampling,
    rows: Int[Array, " batch"] | None = None,
    *,
    steps: int,
) -> tuple[Int[Array, "batch steps"], Logprobs, DecodeState]:
    """Samples the next `steps` tokens of some rows.

    Args:
      model: Abstract model.
      params: Its parameters.
      state: The state before; donated.
      lengths: Tokens that each row has read.
      sampling: How to choose tokens.
      rows: As in `extend`.
      steps: Number of tokens.

    Returns:
      The tokens (-1 where logits are not finite) and their log p, both whole on every device, and the new state.
    """
    bound, part = bind(model, params), _take(state, rows)
    output_layer = bound.output_layer(_dtype(part.cache))
    keys = jax.vmap(jax.random.key)(sampling.seeds)

    def step(carry: DecodeState, position_offset):
        positions = lengths + position_offset
        draw_keys = jax.vmap(jax.random.fold_in)(keys, positions)
        tokens = sample(carry.logits, draw_keys, temperature=sampling.temperature, top_p=sampling.top_p)
        logprobs = _logprobs(carry.logits, tokens, sampling.logprobs)
        checked = jnp.where(jnp.isfinite(carry.logits).all(axis=-1), tokens, -1)
        hidden, cache = _advance(bound, tokens[:, None], positions[:, None], carry.cache)
        return DecodeState(cache, output_layer(hidden[:, 0]).astype(jnp.float32)), (checked, logprobs)

    part, by_step = jax.lax.scan(step, part, jnp.arange(steps))
    tokens, logprobs = jax.tree.map(lambda x: constrain(x.swapaxes(0, 1), *["whole"] * x.ndim), by_step)
    return tokens, logprobs, _put(state, part, rows)


def sample(
    logits: Float[Array, "batch vocab"],
    keys: Key[Array, " batch"],
    *,
    temperature: Float[Array, " batch"],
    top_p: Float[Array, " batch"],
) -> Int[Array, " batch"]:
    """One token per row: the likeliest at temperature 0, else a draw from the nucleus.

    The nucleus is the smallest set of likeliest tokens with probability `top_p` (Holtzman et al., arXiv 1904.09751),
    and at least one token.
    """

    def draw(row_logits, key, temperature, top_p, likeliest):
        scaled = row_logits / jnp.maximum(temperature, 1e-6)
        descending = jnp.sort(scaled)[::-1]
        before = jnp.cumsum(jax.nn.softmax(descending)) - jax.nn.softmax(descending)
        kept = before < top_p
        threshold = jnp.min(jnp.where(kept, descending, jnp.inf))
        drawn = jax.random.categorical(key, jnp.where(scaled >= threshold, scaled, -jnp.inf))
        return jnp.where(jnp.sum(kept) > 1, drawn, likeliest)  # one, or none if top_p is 0

    greedy = jnp.argmax(logits, axis=-1)

    def drawn():
        return jnp.where(temperature > 0, jax.vmap(draw)(logits, keys, temperature, top_p, greedy), greedy)

    return jax.lax.cond(jnp.any(temperature > 0), drawn, lambda: greedy)


def _logprobs(logits: Float[Array, "batch vocab"], tokens: Int[Array, " batch"], wanted: Bool[Array, ""]) -> Logprobs:
    count = min(TOP_LOGPROBS, logits.shape[-1])

    def computed():
        log_p = jax.nn.log_softmax(logits)
        values, likeliest = jax.lax.top_k(log_p, count)
        return Logprobs(jnp.take_along_axis(log_p, tokens[:, None], axis=1)[:, 0], likeliest, values)

    none = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(computed))
    return jax.lax.cond(wanted, computed, lambda: none)


def _advance(
    model: Transformer, tokens: Int[Array, "batch length"], positions: Int[Array, "batch length"], cache: Cache
) -> tuple[Float[Array, "batch length embed"], Cache]:
    """Hidden states of `tokens`, which see the cache up to their own position.

    Slot p holds position p, so values beyond a row's end are overwritten before a token sees them; values beyond the
    last slot are dropped.
    """
    slots = jnp.arange(jax.tree.leaves(cache)[0].shape[-3])[None]
    mask = AttentionMask(positions, slots, None, None, causal=True, window=model.config.sliding_window)
    return model.with_cache(tokens, mask, cache, Execution(_dtype(cache)))


def stacked(cache: Cache) -> KVCache:
    """A cache with its layers stacked, [layers, batch, slots, kv_heads, head_dim]."""
    return cache if isinstance(cache, KVCache) else jax.tree.map(lambda *layers: jnp.stack(layers), *cache)


def _dtype(cache: Cache) -> jnp.dtype:
    return jax.tree.leaves(cache)[0].dtype


def _dim_of_rows(cache: Cache) -> int:
    return 1 if isinstance(cache, KVCache) else 0


def _take(state: DecodeState, rows: Array | None) -> DecodeState:
    if rows is None:
        return state
    take = functools.partial(jnp.take, indices=rows, axis=_dim_of_rows(state.cache), mode="clip")
    return DecodeState(jax.tree.map(take, state.cache), jnp.take(state.logits, rows, axis=0, mode="clip"))


def _put(state: DecodeState, part: DecodeState, rows: Array | None) -> DecodeState:
    if rows is None:
        return _placed(part)
    before = (slice(None),) * _dim_of_rows(state.cache)
    cache = jax.tree.map(lambda x, new: x.at[(*before, rows)].set(new, mode="drop"), state.cache, part.cache)
    return _placed(DecodeState(cache, state.logits.at[rows].set(part.logits, mode="drop")))


def _placed(state: DecodeState) -> DecodeState:
    """The state, split over the mesh in the one way that programs are compiled for."""

    def place(x):
        return constrain(x, *["layers"] * (x.ndim - 4), "batch", "length", "activation_heads", "head_dim")

    return DecodeState(jax.tree.map(place, state.cache), constrain(state.logits, "batch", "activation_vocab"))
