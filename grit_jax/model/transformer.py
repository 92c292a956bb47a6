"""The decoder: blocks stacked along a `layers` dim and scanned."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from grit_jax.config import TransformerConfig
from grit_jax.model.attention import AttentionMask, attention
from grit_jax.model.layers import GatedMLP, Linear, RMSNorm, Rotation, rotate, rotation
from grit_jax.sharding import constrain

Remat = Literal["none", "full", "dots"]
Params = dict[str, Any]


class KVCache(NamedTuple):
    """Rotated keys and values of every layer; slot `p` holds the token at position `p`.

    Attributes:
      keys: [layers, batch, slots, kv_heads, head_dim].
      values: The same shape.
    """

    keys: Array
    values: Array


class SelfAttention(nnx.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, config: TransformerConfig, *, key: PRNGKeyArray, out_scale: float):
        query_key, key_key, value_key, out_key = jax.random.split(key, 4)
        embed = {"embed": config.embed_dim}
        heads = {"heads": config.num_heads, "head_dim": config.head_dim}
        kv_heads = {"kv_heads": config.num_kv_heads, "head_dim": config.head_dim}
        self.query = Linear(embed, heads, key=query_key)
        self.key = Linear(embed, kv_heads, key=key_key)
        self.value = Linear(embed, kv_heads, key=value_key)
        self.out = Linear(heads, embed, key=out_key, scale=out_scale)

    def __call__(
        self, x: Float[Array, "batch length embed"], by: Rotation, mask: AttentionMask, cache: KVCache | None
    ) -> tuple[Float[Array, "batch length embed"], KVCache | None]:
        """What attention adds to the residual stream; with a cache, after writing the new keys and values into it."""
        dims = ("batch", "length", "activation_heads", "head_dim")
        query = constrain(rotate(self.query(x), by), *dims)
        key = constrain(rotate(self.key(x), by), *dims)
        value = constrain(self.value(x), *dims)
        if cache is not None:
            rows = jnp.arange(x.shape[0])[:, None]
            key = cache.keys.at[rows, mask.query_positions].set(key)
            value = cache.values.at[rows, mask.query_positions].set(value)
            cache = KVCache(key, value)
        return self.out(attention(query, key, value, mask)), cache


class Block(nnx.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: TransformerConfig, *, key: PRNGKeyArray):
        attention_key, mlp_key = jax.random.split(key)
        # Branches start small against the residual stream: a new model is close to a bag of words, which already
        # ranks texts by their common words, and learns from there.
        out_scale = 0.1 * (2 * config.num_layers) ** -0.5
        self.attention_norm = RMSNorm(config.embed_dim, epsilon=config.norm_epsilon)
        self.attention = SelfAttention(config, key=attention_key, out_scale=out_scale)
        self.mlp_norm = RMSNorm(config.embed_dim, epsilon=config.norm_epsilon)
        self.mlp = GatedMLP(config, key=mlp_key, out_scale=out_scale)

    def __call__(
        self, x: Float[Array, "batch length embed"], by: Rotation, mask: AttentionMask, cache: KVCache | None = None
    ) -> tuple[Float[Array, "batch length embed"], KVCache | None]:
        """The residual stream after the block, and the cache."""
        attended, cache = self.attention(self.attention_norm(x), by, mask, cache)
        x = constrain(x + attended, "batch", "length", "activation_embed")
        x = constrain(x + self.mlp(self.mlp_norm(x)), "batch", "length", "activation_embed")
        return x, cache


class Transformer(nnx.Module):
    """A Mistral/Llama-style decoder with an optional projection head for embeddings.

    Args:
      config: Resolved architecture (`TransformerConfig.resolve`).
      key: Seed of the initial weights.
      projection_dim: Width of the linear embedding head; None for none.
    """

    def __init__(self, config: TransformerConfig, *, key: PRNGKeyArray, projection_dim: int | None = None):
        self.config = config
        embedding_key, layers_key, head_key, projection_key = jax.random.split(key, 4)
        table = (config.vocab_size, config.embed_dim)
        std = config.embed_dim**-0.5  # logits of unit variance
        embedding_std = std if config.tie_embeddings else 1.0
        self.embedding = nnx.Param(
            embedding_std * jax.random.normal(embedding_key, table, jnp.float32), axes=("vocab", "embed")
        )
        layer_keys = jax.random.split(layers_key, config.num_layers)
        self.layers = jax.vmap(lambda layer_key: Block(config, key=layer_key))(layer_keys)
        self.final_norm = RMSNorm(config.embed_dim, epsilon=config.norm_epsilon)
        if not config.tie_embeddings:
            self.head = nnx.Param(std * jax.random.normal(head_key, table, jnp.float32), axes=("vocab", "embed"))
        if projection_dim is not None:
            widths = {"embed": config.embed_dim}, {"projection": projection_dim}
            self.projection = Linear(*widths, key=projection_key, bias=True)

    @property
    def output_table(self) -> Float[Array, "vocab embed"]:
        """Rows that hidden states are multiplied with to give logits."""
        return self.embedding[...] if self.config.tie_embeddings else self.head[...]

    def mask(
        self, segment_ids: Int[Array, "batch length"], positions: Int[Array, "batch length"], *, causal: bool
    ) -> AttentionMask:
        """The mask of packed rows, with this model's sliding window."""
        return AttentionMask.packed(segment_ids, positions, causal=causal, window=self.config.sliding_window)

    def __call__(
        self, tokens: Int[Array, "batch length"], mask: AttentionMask, *, dtype: jnp.dtype, remat: Remat = "none"
    ) -> Float[Array, "batch length embed"]:
        """Final-norm hidden states.

        Args:
          tokens: Token ids.
          mask: Attention of this call; its query positions are the tokens' rotary positions.
          dtype: Type of the activations.
          remat: What a layer recomputes in the backward pass.
        """
        block = _rematerialized(Block.__call__, remat)
        x, by = self._start(tokens, mask, dtype)
        x, _ = jax.lax.scan(lambda x, layer: (block(layer, x, by, mask)[0], None), x, self.layers)
        return self.final_norm(x)

    def with_cache(
        self, tokens: Int[Array, "batch length"], mask: AttentionMask, cache: KVCache, *, dtype: jnp.dtype
    ) -> tuple[Float[Array, "batch length embed"], KVCache]:
        """Final-norm hidden states of tokens that attend to `cache`, and the cache with them written in."""

        def step(x, layer_and_cache):
            layer, (keys, values) = layer_and_cache
            return layer(x, by, mask, KVCache(keys, values))

        x, by = self._start(tokens, mask, dtype)
        x, cache = jax.lax.scan(step, x, (self.layers, cache))
        return self.final_norm(x), cache

    def _start(self, tokens, mask: AttentionMask, dtype) -> tuple[Array, Rotation]:
        x = constrain(self.embedding[...].astype(dtype)[tokens], "batch", "length", "activation_embed")
        return x, rotation(mask.query_positions, head_dim=self.config.head_dim, theta=self.config.rope_theta)


def compute_dtype(name: Literal["auto", "float32", "bfloat16"]) -> jnp.dtype:
    """The type of activations: `auto` is float32 on CPU, where bfloat16 is slow, and bfloat16 elsewhere."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def _rematerialized(function, remat: Remat):
    policies = {
        "full": jax.checkpoint_policies.nothing_saveable,
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    }
    return function if remat == "none" else jax.checkpoint(function, policy=policies[remat])


def abstract_model(config: TransformerConfig, projection_dim: int | None = None) -> Transformer:
    """The model with shapes in place of arrays; takes no memory."""
    return jax.eval_shape(lambda: Transformer(config, key=jax.random.key(0), projection_dim=projection_dim))


def abstract_params(model: Transformer) -> Params:
    """Nested dict of the shapes of a model's parameters, as they are stored and optimised."""
    return nnx.to_pure_dict(nnx.state(model))


def param_axes(model: Transformer) -> Params:
    """The same nested dict with each parameter's logical axes; stacked parameters start with `layers`."""

    def axes(param: nnx.Variable):
        names = param.get_metadata()["axes"]
        return ("layers", *names) if param.ndim > len(names) else names

    state = nnx.state(model)
    return nnx.to_pure_dict(jax.tree.map(axes, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)))


def init_params(config: TransformerConfig, key: PRNGKeyArray, projection_dim: int | None = None) -> Params:
    """Initial weights, float32; jit with `out_shardings` to create them in place on a mesh."""
    return nnx.to_pure_dict(nnx.state(Transformer(config, key=key, projection_dim=projection_dim)))


def bind(model: Transformer, params: Params) -> Transformer:
    """The model with `params` as its weights; cheap, for use inside a JAX transform."""
    return nnx.merge(nnx.graphdef(model), params)
