"""Mixture of experts: each token goes to its `experts_per_token` likeliest experts; no token is dropped."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.pallas.ops.tpu.megablox import ops as megablox
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from grit_jax.config import TransformerConfig
from grit_jax.errors import InputError
from grit_jax.model.layers import Linear, activation
from grit_jax.model.lora import Noise
from grit_jax.parallel.execution import PLAIN, Execution, wide
from grit_jax.parallel.sharding import on_devices, split_axes


class RouterStats(NamedTuple):
    """Sums over tokens for the balance loss; they add up over layers, chunks and devices.

    Attributes:
      choices: float32 [experts_per_token, experts]; number of tokens whose k-th choice is the expert.
      probabilities: float32 [experts]; sum of the router's probabilities.
      tokens: float32 scalar; number of tokens.
    """

    choices: Array
    probabilities: Array
    tokens: Array


class ExpertMLP(nnx.Module):
    """`num_experts` gated MLPs, and the router that weights them (Mixtral, arXiv 2401.04088)."""

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
        noise: Noise | None = None,
    ) -> tuple[Float[Array, "batch length embed"], RouterStats]:
        """What the experts add to the residual stream, and the router's sums over the `real` tokens.

        Padding goes to no expert. The router computes in float32, like its softmax.
        """
        del noise  # experts have no adapters
        with jax.default_matmul_precision("highest"):
            logits = self.router(x.astype(wide(x)))
        probabilities, num_experts = jax.nn.softmax(logits), logits.shape[-1]
        # The chosen experts' probabilities over their sum; with a single choice the gradient is exactly 0.
        largest, chosen = jax.lax.top_k(logits, self.experts_per_token)
        weights = jax.nn.softmax(largest)
        one_hot = jax.nn.one_hot(chosen, num_experts, dtype=jnp.float32)
        stats = RouterStats(
            choices=jnp.einsum("blke,bl->ke", one_hot, real.astype(jnp.float32)),
            probabilities=jnp.einsum("ble,bl->e", probabilities, real.astype(jnp.float32)),
            tokens=jnp.sum(real, dtype=jnp.float32),
        )
        chosen = jnp.where(real[..., None], chosen, num_experts)
        kernels = (self.gate[...], self.up[...], self.down[...])
        kernels = tuple(kernel.astype(x.dtype) for kernel in kernels)
        return self._mix(x, chosen, weights, kernels, execution), stats

    def _mix(self, x, chosen, weights, kernels, execution):
        """The weighted sum of the chosen experts' outputs; copies of tokens go to the devices that hold the experts."""

        def on_device(wide_x, chosen, weights, *kernels):
            multiply = functools.partial(_multiply, *kernels, activation=self.activation, execution=execution)
            mixed = _dispatched(multiply, wide_x.astype(x.dtype), chosen, weights, num_local=len(kernels[0]))
            return jax.lax.psum(mixed.astype(wide_x.dtype), split_axes("mlp")).astype(x.dtype)

        rows = ("batch", "length", "activation_embed")
        widths = ("experts", "whole", "mlp"), ("experts", "whole", "mlp"), ("experts", "mlp", "whole")
        mix = on_devices(on_device, in_axes=(rows, rows, rows, *widths), out_axes=rows)
        # Tokens enter in float32, so that their gradient, like the output, is summed over the devices in float32.
        return mix(x.astype(wide(x)), chosen, weights, *kernels)


class _SortOrder(NamedTuple):
    """The order of sorted rows: copies of tokens, one for each of a token's choices.

    Attributes:
      order: int32 [sorted]; the copy in each row, where copy `t * per_token + k` is the k-th of token t.
      row: int32 [tokens, per_token]; the row of each copy, `sorted` for copies without one.
    """

    order: Array
    row: Array


def _sort_order(group: Int[Array, "tokens per_token"], num_groups: int) -> tuple[_SortOrder, Int[Array, " num_groups"]]:
    """The order of copies sorted by group, and the groups' sizes; copies outside the groups have no row."""
    sizes = jnp.bincount(group.reshape(-1), length=num_groups + 1)[:num_groups].astype(jnp.int32)
    order = jnp.argsort(group.reshape(-1))
    row = jnp.argsort(order).astype(jnp.int32)
    return _SortOrder(order, jnp.where(row < jnp.sum(sizes), row, len(order)).reshape(group.shape)), sizes


def _dispatched(multiply, x, chosen, weights, *, num_local: int):
    """The weighted sum of `multiply(rows sorted by expert, sizes)`, on devices that hold `num_local` experts each."""
    axes, per_token = split_axes("experts"), chosen.shape[-1]
    tokens = x.reshape(-1, x.shape[-1])
    shards = jax.lax.axis_size(axes)
    by_device, sizes = _sort_order(chosen.reshape(-1, per_token), shards * num_local)
    rows = _sort(tokens, by_device)
    if shards > 1:
        # How many of every device's copies go to each expert, [device, expert], and from which device to which.
        sizes = jax.lax.all_gather(sizes, axes).reshape(shards, shards, num_local)
        counts, here = jnp.sum(sizes, axis=2), jax.lax.axis_index(axes)
        # No token goes to the same expert twice, so no device gets more than this.
        size = shards * len(tokens) * min(per_token, num_local)
        received = _all_to_all(rows, counts, (len(rows), size), axes)
        block = jnp.searchsorted(jnp.cumsum(sizes[:, here]), jnp.arange(size), side="right")
        local = jnp.where(block < shards * num_local, block % num_local, num_local)
        by_expert, sizes = _sort_order(local[:, None], num_local)
        out = _sum_copies(multiply(_sort(received, by_expert), sizes), by_expert)
        rows = _all_to_all(out, counts.T, (size, len(rows)), axes)
    else:
        rows = multiply(rows, sizes)
    weights = _sort(weights.reshape(-1, 1), by_device._replace(row=by_device.row.reshape(-1, 1)))
    # Weighted in float32: a weight's gradient is a sum over the whole width.
    return _sum_copies((rows * weights).astype(x.dtype), by_device).reshape(x.shape)


def _multiply(gate, up, down, rows, sizes, *, activation, execution):
    """Each expert's MLP on its rows, as in `_grouped_product`."""
    product = functools.partial(_grouped_product, sizes=sizes, execution=execution)
    return product(activation(product(rows, gate)) * product(rows, up), down)


def _grouped_product(
    rows: Float[Array, "sorted width"], kernels: Float[Array, "expert width out"], *, sizes: Array, execution: Execution
) -> Float[Array, "sorted out"]:
    """Each expert's rows times its kernel; the first `sizes[0]` rows are the first expert's, and so on.

    Rows after the last expert's are arbitrary.
    """
    if execution.experts == "ragged_dot":
        return jax.lax.ragged_dot(rows, kernels, sizes, preferred_element_type=rows.dtype)
    if len(rows) % execution.row_unit:
        raise InputError(
            f"{len(rows)} tokens for experts: megablox needs a multiple of {execution.row_unit}; "
            "choose data.*_max_length accordingly, or model.expert_kernel=ragged_dot"
        )
    return megablox.gmm(rows, kernels, sizes, rows.dtype, _megablox_tiles, interpret=execution.interpret)


def _megablox_tiles(rows: int, contracted: int, out: int) -> tuple[int, int, int]:
    """Tiles of a grouped product, as wide as fits a TPU core's vector memory."""
    return row_tile(rows), min(contracted, 1024), min(out, 1024)


def row_tile(rows: int) -> int:
    """Rows of a tile of a grouped product: the tallest that divides all rows."""
    return next((tile for tile in (512, 256) if rows % tile == 0), 128)


# Sorting and summing are each other's transposes. Saying so makes both of them gathers in the backward pass too, not
# scatters, which TPUs run row by row.


@jax.custom_vjp
def _sort(tokens: Float[Array, "tokens width"], by: _SortOrder) -> Float[Array, "sorted width"]:
    """The copies of tokens in the order of their experts."""
    return tokens[by.order // by.row.shape[1]]


@jax.custom_vjp
def _sum_copies(copies: Float[Array, "sorted width"], by: _SortOrder) -> Float[Array, "tokens width"]:
    """The sum of each token's sorted copies."""
    return jnp.sum(copies.at[by.row].get(mode="fill", fill_value=0), axis=1)


_sort.defvjp(lambda tokens, by: (_sort(tokens, by), by), lambda by, change: (_sum_copies(change, by), None))
_sum_copies.defvjp(lambda copies, by: (_sum_copies(copies, by), by), lambda by, change: (_sort(change, by), None))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _all_to_all(
    rows: Float[Array, "sent width"], counts: Int[Array, "shards shards"], sizes: tuple[int, int], axes: tuple[str, ...]
) -> Float[Array, "received width"]:
    """Sends `counts[i, j]` rows from device i to device j, ordered by receiver; they arrive ordered by sender.

    Args:
      rows: This device's rows.
      counts: The same on every device.
      sizes: Number of `rows`, and most rows that a device receives; the rest of the result is zero.
      axes: The mesh axes of the devices.
    """
    here, size = jax.lax.axis_index(axes), sizes[1]

    def ragged(rows, counts):
        return jax.lax.ragged_all_to_all(
            rows,
            jnp.zeros((size, rows.shape[1]), rows.dtype),
            input_offsets=_starts(counts, axis=1)[here],
            send_sizes=counts[here],
            output_offsets=_starts(counts, axis=0)[here],
            recv_sizes=counts[:, here],
            axis_name=axes,
        )

    def gathered(rows, counts):
        # Only TPUs and GPUs can send pieces of different sizes.
        ends = jnp.cumsum(counts[:, here])
        index = jnp.arange(size)
        source = jnp.searchsorted(ends, index, side="right")
        row = _starts(counts, axis=1)[source, here] + index - _starts(counts, axis=0)[source, here]
        everywhere = jax.lax.all_gather(rows, axes)
        return jnp.where((index < ends[-1])[:, None], everywhere[source, row], 0)

    return jax.lax.platform_dependent(rows, counts, tpu=ragged, default=gathered)


def _starts(counts: Array, *, axis: int) -> Array:
    return jnp.cumsum(counts, axis=axis) - counts


_all_to_all.defvjp(
    lambda rows, counts, sizes, axes: (_all_to_all(rows, counts, sizes, axes), counts),
    lambda sizes, axes, counts, change: (_all_to_all(change, counts.T, sizes[::-1], axes), None),
)
