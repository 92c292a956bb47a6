"""Mixture of experts: each token goes to its `experts_per_token` likeliest experts, and none is dropped."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from grit_jax.config import TransformerConfig
from grit_jax.execution import wide
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
        self, x: Float[Array, "batch length embed"], real: Bool[Array, "batch length"]
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
        return _mix(x, chosen, weights, *kernels, activation=self.activation), stats


def _mix(x, chosen, weights, *kernels, activation):
    """The weighted sum of the chosen experts' outputs, each device computing its own experts."""

    def on_device(x, chosen, weights, *kernels):
        # Every group of experts sees the tokens of its whole `expert` axis, and returns each device its own.
        expert_axes, tensor_axes = split_axes("experts"), split_axes("mlp")
        gathered = (jax.lax.all_gather(value, expert_axes, tiled=True) for value in (x, chosen, weights))
        first = jax.lax.axis_index(expert_axes) * kernels[0].shape[0]
        mixed = _local_experts(*gathered, *kernels, activation=activation, first=first)
        return jax.lax.psum_scatter(jax.lax.psum(mixed, tensor_axes), expert_axes, tiled=True)

    if jax.sharding.get_abstract_mesh().empty:
        return _local_experts(x, chosen, weights, *kernels, activation=activation, first=0)
    rows = ("batch", "length", "activation_embed")
    widths = ("experts", "whole", "mlp"), ("experts", "whole", "mlp"), ("experts", "mlp", "whole")
    split = on_devices(on_device, in_axes=(rows, rows, rows, *widths), out_axes=rows)
    return split(x, chosen, weights, *kernels)


def _local_experts(x, chosen, weights, gate, up, down, *, activation, first):
    """Sum over the experts `first ... first + len(gate)`; tokens sent elsewhere add nothing.

    Token copies are sorted by expert, so that each projection is one grouped matrix product.
    """
    num_experts, per_token = gate.shape[0], chosen.shape[-1]
    tokens = x.reshape(-1, x.shape[-1])
    expert = chosen.reshape(-1) - first
    expert = jnp.where((expert >= 0) & (expert < num_experts), expert, num_experts)
    order = jnp.argsort(expert)
    sizes = jnp.bincount(expert, length=num_experts + 1)[:num_experts].astype(jnp.int32)
    grouped = functools.partial(jax.lax.ragged_dot, group_sizes=sizes, preferred_element_type=x.dtype)
    copies = tokens[order // per_token]
    out = grouped(activation(grouped(copies, gate)) * grouped(copies, up), down)
    # Rows after the last group are not written by a grouped product.
    out = jnp.where((jnp.arange(len(order)) < jnp.sum(sizes))[:, None], out, 0)
    out = out[jnp.argsort(order)].reshape(-1, per_token, x.shape[-1])
    return jnp.einsum("tkd,tk->td", out, weights.reshape(-1, per_token).astype(x.dtype)).reshape(x.shape)
