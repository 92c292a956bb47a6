"""Mixture of experts: each token goes to its `experts_per_token` likeliest experts, and none is dropped."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.pallas.ops.tpu.megablox import ops as megablox
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from grit_jax.config import InputError, TransformerConfig
from grit_jax.execution import PLAIN, Execution, wide
from grit_jax.model.layers import Linear, activation
from grit_jax.sharding import on_devices, split_axes


class RouterStats(NamedTuple):
    """Sums over tokens that the balance loss is made of; they add up over layers, chunks and devices.

    Attributes:
      choices: float32 [experts_per_token, experts]; tokens whose k-th choice is the expert.
      probabilities: float32 [experts]; sum of the router's probabilities.
      tokens: float32 scalar; number of tokens.
    """

    choices: Array
    probabilities: Array
    tokens: Array


class ExpertMLP(nnx.Module):
    """Gated MLPs, `num_experts` of them, and the router that weighs them (Mixtral, arXiv 2401.04088)."""

    def __init__(self, config: TransformerConfig, *, key: PRNGKeyArray, out_scale: float):
        router_key, gate_key, up_key, down_key = jax.random.split(key, 4)
        self.experts_per_token = config.experts_per_token
        self.activation = activation(config)
        self.router = Linear({"whole": config.embed_dim}, {"router": config.num_experts}, key=router_key)

        def experts(key: PRNGKeyArray, scale: float = 1.0, **dims: int) -> nnx.Param:
            shape = (config.num_experts, *dims.values())
            std = scale * shape[1] ** -0.5
            return nnx.Param(std * jax.random.normal(key, shape, jnp.float32), axes=("experts", *dims))

        self.gate = experts(gate_key, expert_embed=config.embed_dim, mlp=config.mlp_dim)
        self.up = experts(up_key, expert_embed=config.embed_dim, mlp=config.mlp_dim)
        self.down = experts(down_key, out_scale, mlp=config.mlp_dim, expert_embed=config.embed_dim)

    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        real: Bool[Array, "batch length"],
        execution: Execution = PLAIN,
    ) -> tuple[Float[Array, "batch length embed"], RouterStats]:
        """What the experts add to the residual stream, and the router's sums over the `real` tokens.

        Padding is sent to no expert. The router computes in float32, like its softmax.
        """
        with jax.default_matmul_precision("highest"):
            probabilities = jax.nn.softmax(self.router(x.astype(wide(x))))
        weights, chosen = jax.lax.top_k(probabilities, self.experts_per_token)
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        num_experts = probabilities.shape[-1]
        one_hot = jax.nn.one_hot(chosen, num_experts, dtype=jnp.float32)
        stats = RouterStats(
            choices=jnp.einsum("blke,bl->ke", one_hot, real.astype(jnp.float32)),
            probabilities=jnp.einsum("ble,bl->e", probabilities, real.astype(jnp.float32)),
            tokens=jnp.sum(real, dtype=jnp.float32),
        )
        chosen = jnp.where(real[..., None], chosen, num_experts)
        kernels = (self.gate[...], self.up[...], self.down[...])
        kernels = tuple(kernel.astype(x.dtype) for kernel in kernels)
        experts = functools.partial(_local_experts, activation=self.activation, execution=execution)
        return _mix(experts, x, chosen, weights.astype(x.dtype), *kernels), stats


def _mix(experts, x, chosen, weights, *kernels):
    """The weighted sum of the chosen experts' outputs, each device computing its own experts."""

    def on_device(x, chosen, weights, *kernels):
        # Every group of experts sees the tokens of its whole `expert` axis, and returns each device its own.
        expert_axes, tensor_axes = split_axes("experts"), split_axes("mlp")
        x, chosen, weights = (jax.lax.all_gather(value, expert_axes, tiled=True) for value in (x, chosen, weights))
        first = jax.lax.axis_index(expert_axes) * len(kernels[0])
        mixed = experts(x, chosen - first, weights, *kernels)
        return jax.lax.psum_scatter(jax.lax.psum(mixed, tensor_axes), expert_axes, tiled=True)

    if jax.sharding.get_abstract_mesh().empty:
        return experts(x, chosen, weights, *kernels)
    rows = ("batch", "length", "activation_embed")
    widths = ("experts", "whole", "mlp"), ("experts", "whole", "mlp"), ("experts", "mlp", "whole")
    split = on_devices(on_device, in_axes=(rows, rows, rows, *widths), out_axes=rows)
    return split(x, chosen, weights, *kernels)


class _Places(NamedTuple):
    """Where the copies of tokens are when they are sorted by expert: a token has a copy for each of its choices.

    Attributes:
      order: int32 [sorted]; the copy at each place, where copy `t * per_token + k` is the k-th of token t.
      place: int32 [tokens, per_token]; the place of each copy, `sorted` where it has none.
    """

    order: Array
    place: Array


def _local_experts(x, chosen, weights, gate, up, down, *, activation, execution):
    """Sum over the experts at hand, which `chosen` counts from 0; other choices add nothing.

    Token copies are sorted by expert, so that each projection is one grouped matrix product.
    """
    num_experts, per_token = len(gate), chosen.shape[-1]
    tokens = x.reshape(-1, x.shape[-1])
    expert = jnp.where((chosen >= 0) & (chosen < num_experts), chosen, num_experts).reshape(-1)
    sizes = jnp.bincount(expert, length=num_experts + 1)[:num_experts].astype(jnp.int32)
    # A token's choices differ, so that no more than one of its copies goes to each expert.
    most = len(tokens) * min(per_token, num_experts)
    order = jnp.argsort(expert)
    place = jnp.argsort(order).astype(jnp.int32)
    places = _Places(order[:most], jnp.where(place < jnp.sum(sizes), place, most).reshape(-1, per_token))
    multiply = functools.partial(_grouped_product, sizes=sizes, execution=execution)
    copies = _sort(tokens, places)
    out = multiply(activation(multiply(copies, gate)) * multiply(copies, up), down)
    weights = _sort(weights.reshape(-1, 1), places._replace(place=places.place.reshape(-1, 1)))
    return _sum_copies(out * weights, places).reshape(x.shape)


def _grouped_product(
    rows: Float[Array, "sorted width"], kernels: Float[Array, "expert width out"], *, sizes: Array, execution: Execution
) -> Float[Array, "sorted out"]:
    """Each expert's rows times its kernel: the first `sizes[0]` rows are those of the first expert, and so on.

    What comes after the last expert's rows is anything.
    """
    if execution.experts == "ragged_dot":
        return jax.lax.ragged_dot(rows, kernels, sizes, preferred_element_type=rows.dtype)
    if len(rows) % execution.row_unit:
        raise InputError(
            f"{len(rows)} tokens for experts: megablox needs a multiple of {execution.row_unit}; "
            "choose such data.*_max_length, or model.expert_kernel=ragged_dot"
        )
    return megablox.gmm(rows, kernels, sizes, rows.dtype, _megablox_tiles, interpret=execution.interpret)


def _megablox_tiles(rows: int, contracted: int, out: int) -> tuple[int, int, int]:
    """Tiles of a grouped product: the largest that divide the rows, and widths that fit a TPU core's vector memory."""
    return next(tile for tile in (512, 256, 128) if rows % tile == 0), min(contracted, 1024), min(out, 1024)


# Sorting and summing are each other's transposes. Said so here, both are gathers in the backward pass as well, where
# JAX would make scatters, which TPUs do one row after the other.


@jax.custom_vjp
def _sort(tokens: Float[Array, "tokens width"], places: _Places) -> Float[Array, "sorted width"]:
    """The copies of tokens in the order of their experts."""
    return tokens[places.order // places.place.shape[1]]


@jax.custom_vjp
def _sum_copies(copies: Float[Array, "sorted width"], places: _Places) -> Float[Array, "tokens width"]:
    """The sum of each token's sorted copies, those without a place left out."""
    return jnp.sum(copies.at[places.place].get(mode="fill", fill_value=0), axis=1)


_sort.defvjp(
    lambda tokens, places: (_sort(tokens, places), places), lambda places, change: (_sum_copies(change, places), None)
)
_sum_copies.defvjp(
    lambda copies, places: (_sum_copies(copies, places), places), lambda places, change: (_sort(change, places), None)
)
