"""The decoder: blocks stacked along a `layers` dim and scanned."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from grit_jax.config import LoRAConfig, TransformerConfig
from grit_jax.model.attention import AttentionMask, attention
from grit_jax.model.layers import GatedMLP, Linear, RMSNorm, Rotation, gathered, rotate, rotation
from grit_jax.model.lora import NO_ADAPTERS, Noise, add_adapters, mixed
from grit_jax.model.moe import ExpertMLP, RouterStats
from grit_jax.parallel.execution import LAYER_INPUT, PLAIN, Execution, map_chunks, num_chunks, rematerialized, wide
from grit_jax.parallel.sharding import constrain

Params = dict[str, Any]


class KVCache(NamedTuple):
    """Rotated keys, and values, of every layer (JAX or NumPy arrays); slot `p` holds the token at position `p`.

    Attributes:
      keys: [layers, batch, slots, kv_heads, head_dim].
      values: The same shape.
    """

    keys: Any
    values: Any


Cache = KVCache | list[KVCache]  # stacked or listed by layer, as the weights are

# Whether a layer has the sliding window; a scalar of the scan over layers if they differ.
Windowed = bool | Bool[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What all layers of one call share; cut into pieces with the rows.

    Attributes:
      mask: Which keys a query sees in layers with the sliding window.
      real: Which tokens are not padding.
      full: Rotation of layers without the window.
      local: Rotation of layers with the window; None if it is the same.
      noise: The tokens' bits for the dropout of adapters; None for no dropout.
      execution: How the call computes.
    """

    mask: AttentionMask
    real: Bool[Array, "*pieces batch length"]
    full: Rotation
    local: Rotation | None
    noise: Noise | None
    execution: Execution = dataclasses.field(metadata={"static": True})

    def of_layer(self, index: Any) -> Context:
        """The context of the layer at an index, with noise of its own."""
        return self if self.noise is None else dataclasses.replace(self, noise=mixed(self.noise, index))

    def rotation(self, windowed: Windowed) -> Rotation:
        """The rotation of one layer."""
        if self.local is None:
            return self.full
        if isinstance(windowed, bool):
            return self.local if windowed else self.full
        return jax.tree.map(functools.partial(jnp.where, windowed), self.local, self.full)


def rotations(positions: Int[Array, "batch length"], config: TransformerConfig) -> tuple[Rotation, Rotation | None]:
    """`full` and `local` of a `Context`."""
    rotate_by = functools.partial(rotation, positions, head_dim=config.head_dim)
    full = rotate_by(theta=config.rope_theta, scaling=config.rope_scaling)
    return full, rotate_by(theta=config.local_rope_theta, scaling=None) if config.local_rope_theta else None


class SelfAttention(nnx.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, config: TransformerConfig, *, key: PRNGKeyArray, out_scale: float):
        query_key, key_key, value_key, out_key = jax.random.split(key, 4)
        embed = {"embed": config.embed_dim}
        heads = {"heads": config.num_heads, "head_dim": config.head_dim}
        kv_heads = {"kv_heads": config.num_kv_heads, "head_dim": config.head_dim}
        self.config = config
        self.query = Linear(embed, heads, key=query_key, bias=config.qkv_bias)
        self.key = Linear(embed, kv_heads, key=key_key, bias=config.qkv_bias)
        self.value = Linear(embed, kv_heads, key=value_key, bias=config.qkv_bias)
        self.out = Linear(heads, embed, key=out_key, scale=out_scale)
        if config.qk_norm:
            self.query_norm = RMSNorm(config, config.head_dim)
            self.key_norm = RMSNorm(config, config.head_dim)

    def __call__(
        self, x: Float[Array, "batch length embed"], context: Context, windowed: Windowed, cache: KVCache | None
    ) -> tuple[Float[Array, "batch length embed"], KVCache | None]:
        """The addition to the residual stream, and the cache with the new keys and values written in."""
        mask, by, noise = context.mask, context.rotation(windowed), context.noise
        dims = ("batch", "length", "activation_heads", "head_dim")
        query, key = self.query(x, noise), self.key(x, noise)
        if self.config.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key = constrain(rotate(query, by), *dims), constrain(rotate(key, by), *dims)
        value = constrain(self.value(x, noise), *dims)
        if cache is not None:
            rows = jnp.arange(x.shape[0])[:, None]
            key = cache.keys.at[rows, mask.query_positions].set(key)
            value = cache.values.at[rows, mask.query_positions].set(value)
            cache = KVCache(key, value)
        return self.out(self._attend(query, key, value, context, windowed), noise), cache

    def _attend(self, query: Array, key: Array, value: Array, context: Context, windowed: Windowed) -> Array:
        config = self.config
        attend = functools.partial(
            attention, query, key, value,
            scale=(config.attention_scale_dim or config.head_dim) ** -0.5,
            soft_cap=config.attention_soft_cap,
            execution=context.execution,
        )  # fmt: skip
        everywhere = dataclasses.replace(context.mask, window=None)
        if isinstance(windowed, bool):
            return attend(context.mask if windowed else everywhere)
        return jax.lax.cond(windowed, lambda: attend(context.mask), lambda: attend(everywhere))


class Block(nnx.Module):
    """Attention and MLP, each on a normalised input and added to the residual stream."""

    def __init__(self, config: TransformerConfig, *, key: PRNGKeyArray):
        attention_key, mlp_key = jax.random.split(key)
        # Branches start small: a new model is close to a bag of words, which already ranks texts by common words.
        out_scale = 0.1 * (2 * config.num_layers) ** -0.5
        self.config = config
        self.attention_norm = RMSNorm(config, config.embed_dim)
        self.attention = SelfAttention(config, key=attention_key, out_scale=out_scale)
        self.mlp_norm = RMSNorm(config, config.embed_dim)
        mlp: type[GatedMLP | ExpertMLP] = ExpertMLP if config.num_experts else GatedMLP
        self.mlp = mlp(config, key=mlp_key, out_scale=out_scale)
        if config.post_norms:
            self.attention_post_norm = RMSNorm(config, config.embed_dim)
            self.mlp_post_norm = RMSNorm(config, config.embed_dim)

    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        context: Context,
        windowed: Windowed,
        cache: KVCache | None = None,
    ) -> tuple[Float[Array, "batch length embed"], KVCache | None, RouterStats | None]:
        """The residual stream after the block, the cache, and the router's sums where there are experts."""
        added, cache = self.attention(self.attention_norm(x), context, windowed, cache)
        if self.config.post_norms:
            added = self.attention_post_norm(added)
        x = constrain(x + added, "batch", "length", "activation_embed")
        added, stats = self.mlp(self.mlp_norm(x), context.real, context.execution, context.noise)
        if self.config.post_norms:
            added = self.mlp_post_norm(added)
        return constrain(x + added, "batch", "length", "activation_embed"), cache, stats


class Transformer(nnx.Module):
    """A decoder with an optional projection head for embeddings.

    Args:
      config: Resolved architecture (`TransformerConfig.resolve`).
      key: Seed of the initial weights.
      projection_dim: Width of the linear embedding head; None for none.
      lora: Adapters; other weights are the same with and without them.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        key: PRNGKeyArray,
        projection_dim: int | None = None,
        lora: LoRAConfig = NO_ADAPTERS,
    ):
        self.config = config
        embedding_key, layers_key, head_key, projection_key = jax.random.split(key, 4)
        table = (config.vocab_size, config.embed_dim)
        std = config.embed_dim**-0.5  # logits of unit variance
        embedding_std = std if config.tie_embeddings or config.scale_embedding else 1.0
        self.embedding = nnx.Param(
            embedding_std * jax.random.normal(embedding_key, table, jnp.float32), axes=("vocab", "embed")
        )
        layer_keys = jax.random.split(layers_key, config.num_layers)

        def block(layer_key: PRNGKeyArray) -> Block:
            block = Block(config, key=layer_key)
            add_adapters(block, config, lora, key=layer_key)
            return block

        # One block with stacked weights; a list of blocks after `split_layers`.
        self.layers: Any = jax.vmap(block)(layer_keys)
        self.final_norm = RMSNorm(config, config.embed_dim)
        if not config.tie_embeddings:
            self.head = nnx.Param(std * jax.random.normal(head_key, table, jnp.float32), axes=("vocab", "embed"))
        if projection_dim is not None:
            widths = {"embed": config.embed_dim}, {"projection": projection_dim}
            self.projection = Linear(*widths, key=projection_key, bias=True)

    @property
    def output_table(self) -> nnx.Param:
        """The table that turns hidden states into logits, [vocab, embed]."""
        return self.embedding if self.config.tie_embeddings else self.head

    @property
    def is_split(self) -> bool:
        """Whether each layer has its own arrays; see `split_layers`."""
        return isinstance(self.layers, nnx.List)

    def mask(
        self, segment_ids: Int[Array, "batch length"], positions: Int[Array, "batch length"], *, causal: bool
    ) -> AttentionMask:
        """The mask of packed rows, with this model's sliding window if it applies to the pass."""
        window = self.config.sliding_window if causal or self.config.window_bidirectional else None
        return AttentionMask.of_rows(segment_ids, positions, causal=causal, window=window)

    def output_weights(self, dtype: jnp.dtype) -> Float[Array, "vocab embed"]:
        """The gathered output table, in `dtype`."""
        return gathered(self.output_table, dtype)[...].astype(dtype)

    def logits(
        self, hidden: Float[Array, "... embed"], weights: Float[Array, "vocab embed"]
    ) -> Float[Array, "... vocab"]:
        """Logits of the next token, at least float32; `weights` are the model's `output_weights`."""
        flat, cap = hidden.reshape(-1, hidden.shape[-1]), self.config.logit_soft_cap
        out = jnp.einsum("td,vd->tv", flat, weights, preferred_element_type=wide(flat))
        out = out.reshape(*hidden.shape[:-1], -1)
        return out if cap is None else cap * jnp.tanh(out / cap)

    def output_layer(self, dtype: jnp.dtype) -> Callable[[Float[Array, "... embed"]], Float[Array, "... vocab"]]:
        """The function from hidden states to logits, with its weights gathered once."""
        return functools.partial(self.logits, weights=self.output_weights(dtype))

    def embed(self, tokens: Int[Array, "batch length"], dtype: jnp.dtype) -> Float[Array, "batch length embed"]:
        """Embedded tokens, in `dtype`."""
        # Looked up before rounding, so that a token's gradient is summed in float32.
        x = gathered(self.embedding, dtype)[...][tokens].astype(dtype)
        if self.config.scale_embedding:
            x = x * jnp.asarray(self.config.embed_dim**0.5, dtype)
        return constrain(x, "batch", "length", "activation_embed")

    def __call__(
        self, tokens: Int[Array, "batch length"], mask: AttentionMask, execution: Execution = PLAIN
    ) -> tuple[Float[Array, "batch length embed"], RouterStats | None]:
        """`hidden` of the embedded tokens."""
        return self.hidden(self.embed(tokens, execution.dtype), mask, execution)

    def hidden(
        self,
        x: Float[Array, "batch length embed"],
        mask: AttentionMask,
        execution: Execution = PLAIN,
        noise: Noise | None = None,
    ) -> tuple[Float[Array, "batch length embed"], RouterStats | None]:
        """Hidden states, after the final norm, of embedded tokens, and the routers' sums if there are experts.

        The mask's query positions are the tokens' rotary positions. `noise`, in training, is their `token_noise`.
        """

        def step(x, layer, context, windowed):
            layer = gathered(layer, execution.dtype)

            def apply(rows):
                x, _, stats = layer(*rows, windowed)
                return x, stats

            pieces = num_chunks(len(x), execution.layer_rows)
            out, stats = map_chunks(apply, (checkpoint_name(x, LAYER_INPUT), context), pieces)
            return out.reshape(x.shape), _summed(stats)

        layers: Any = list(self.layers) if self.is_split else self.layers
        x, stats = self._scan(rematerialized(step, execution.remat), x, layers, mask, execution, noise)
        if self.is_split:
            stats = jax.tree.map(lambda *per_layer: jnp.stack(per_layer), *stats)
        return self.final_norm(x), _summed(stats)

    def with_cache(
        self, tokens: Int[Array, "batch length"], mask: AttentionMask, cache: Cache, execution: Execution
    ) -> tuple[Float[Array, "batch length embed"], Cache]:
        """Hidden states, after the final norm, of tokens that attend to `cache`, and the cache with them written in."""

        def step(x, layer_and_cache, context, windowed):
            layer, cache = layer_and_cache
            x, cache, _ = layer(x, context, windowed, cache)
            return x, cache

        layers: Any = list(zip(self.layers, cache, strict=True)) if self.is_split else (self.layers, cache)
        x, cache = self._scan(step, self.embed(tokens, execution.dtype), layers, mask, execution)
        return self.final_norm(x), cache

    def _scan(
        self, step, x: Array, layers: Any, mask: AttentionMask, execution: Execution, noise: Noise | None = None
    ) -> tuple[Array, Any]:
        """Takes `x` through `step(x, layer, context, windowed)`; other results are stacked or listed like `layers`."""
        segments = mask.query_segments
        real = jnp.ones(x.shape[:2], bool) if segments is None else segments > 0
        context = Context(mask, real, *rotations(mask.query_positions, self.config), noise, execution)
        windows = self.config.layer_windows
        if isinstance(layers, list):
            outs = []
            for index, (layer, windowed) in enumerate(zip(layers, windows, strict=True)):
                x, out = step(x, layer, context.of_layer(index), windowed)
                outs.append(out)
            return x, outs

        def one(x, each):
            layer, index, flag = each
            return step(x, layer, context.of_layer(index), windows[0] if flag is None else flag)

        indices = None if noise is None else jnp.arange(len(windows))
        flags = None if len(set(windows)) == 1 else jnp.array(windows)
        return jax.lax.scan(one, x, (layers, indices, flags))


def _summed(stats: RouterStats | None) -> RouterStats | None:
    """Sums over the first dim, if there are experts."""
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), stats)


def abstract_model(
    config: TransformerConfig, projection_dim: int | None = None, lora: LoRAConfig = NO_ADAPTERS
) -> Transformer:
    """The model with shapes in place of arrays."""
    return jax.eval_shape(lambda: Transformer(config, key=jax.random.key(0), projection_dim=projection_dim, lora=lora))


def abstract_params(model: Transformer) -> Params:
    """Nested dict of the shapes of a model's parameters."""
    return nnx.to_pure_dict(nnx.state(model))


def param_axes(model: Transformer) -> Params:
    """The nested dict of each parameter's logical axes; those of stacked parameters start with `layers`."""

    def axes(param: nnx.Variable):
        names = param.get_metadata()["axes"]
        return ("layers", *names) if param.ndim > len(names) else names

    state = nnx.state(model)
    return nnx.to_pure_dict(jax.tree.map(axes, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)))


def init_params(
    config: TransformerConfig,
    key: PRNGKeyArray,
    projection_dim: int | None = None,
    lora: LoRAConfig = NO_ADAPTERS,
) -> Params:
    """Initial parameters, float32; jit with `out_shardings` to create them on a mesh."""
    return nnx.to_pure_dict(nnx.state(Transformer(config, key=key, projection_dim=projection_dim, lora=lora)))


def split_layers(params: Params) -> Params:
    """Parameters with a list of layers in place of stacked ones; `bind` takes both.

    Layers then run without a scan, in which XLA on CPU copies every layer's weights out of the stack, at a higher cost
    than a decoding step. Compiling takes longer.
    """
    leaves, structure = jax.tree.flatten(params["layers"])
    split = jax.jit(lambda arrays: [jnp.unstack(array) for array in arrays])(leaves)
    layers = [jax.tree.unflatten(structure, layer) for layer in zip(*split, strict=True)]
    return params | {"layers": layers}


def stack_layers(params: Params) -> Params:
    """The inverse of `split_layers`."""
    if not isinstance(params["layers"], list):
        return params
    return params | {"layers": jax.tree.map(lambda *layers: jnp.stack(layers), *params["layers"])}


def bind(model: Transformer, params: Params) -> Transformer:
    """The model with `params` as its weights, for use inside a JAX transform."""
    layers = params["layers"]
    if not isinstance(layers, list):
        return nnx.merge(nnx.graphdef(model), params)
    bound = nnx.merge(nnx.graphdef(model), params | {"layers": layers[0]})
    bound.layers = nnx.List([nnx.merge(nnx.graphdef(model.layers), layer) for layer in layers])
    return bound
