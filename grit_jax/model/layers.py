"""Layers of the decoder. Each parameter names its shape, initialiser and logical axes where it is made."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from grit_jax.config import TransformerConfig
from grit_jax.sharding import constrain


class Linear(nnx.Module):
    """A matrix product from the last dims of the input to new ones, weights float32, computed in the input's type.

    `in_dims` and `out_dims` give each dim's logical axis and size, in order. Weights start
    normal with variance `scale**2 / fan_in`.
    """

    def __init__(
        self,
        in_dims: Mapping[str, int],
        out_dims: Mapping[str, int],
        *,
        key: PRNGKeyArray,
        scale: float = 1.0,
        bias: bool = False,
    ):
        self.num_in_dims = len(in_dims)
        shape = (*in_dims.values(), *out_dims.values())
        std = scale / math.sqrt(math.prod(in_dims.values()))
        self.kernel = nnx.Param(std * jax.random.normal(key, shape, jnp.float32), axes=(*in_dims, *out_dims))
        self.bias = nnx.Param(jnp.zeros(tuple(out_dims.values()), jnp.float32), axes=tuple(out_dims)) if bias else None

    def __call__(self, x: Float[Array, "*in_dims"]) -> Float[Array, "*out_dims"]:
        """Replaces the last dims of `x` by the output dims."""
        kernel = self.kernel[...].astype(x.dtype)
        out_shape = (*x.shape[: x.ndim - self.num_in_dims], *kernel.shape[self.num_in_dims :])
        fan_in = math.prod(kernel.shape[: self.num_in_dims])
        # One plain matrix product over all tokens: weight gradients that contract over two dims run slower.
        out = (x.reshape(-1, fan_in) @ kernel.reshape(fan_in, -1)).reshape(out_shape)
        return out if self.bias is None else out + self.bias[...].astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation over the last dim, in float32."""

    def __init__(self, dim: int, *, epsilon: float):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(dim, jnp.float32), axes=("embed",))

    def __call__(self, x: Float[Array, "... embed"]) -> Float[Array, "... embed"]:
        """Normalises and scales; the result has the type of `x`."""
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        return (wide * self.scale[...]).astype(x.dtype)


class GatedMLP(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: TransformerConfig, *, key: PRNGKeyArray, out_scale: float):
        gate_key, up_key, down_key = jax.random.split(key, 3)
        embed, mlp = {"embed": config.embed_dim}, {"mlp": config.mlp_dim}
        self.gate = Linear(embed, mlp, key=gate_key)
        self.up = Linear(embed, mlp, key=up_key)
        self.down = Linear(mlp, embed, key=down_key, scale=out_scale)

    def __call__(self, x: Float[Array, "batch length embed"]) -> Float[Array, "batch length embed"]:
        """What the MLP adds to the residual stream."""
        hidden = constrain(jax.nn.silu(self.gate(x)) * self.up(x), "batch", "length", "activation_mlp")
        return self.down(hidden)


Rotation = tuple[Float[Array, "batch length half"], Float[Array, "batch length half"]]


def rotation(positions: Int[Array, "batch length"], *, head_dim: int, theta: float) -> Rotation:
    """Cosines and sines of the rotary embedding (Su et al., arXiv 2104.09864), float32."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[:, :, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "batch length heads head_dim"], by: Rotation) -> Float[Array, "batch length heads head_dim"]:
    """Rotates each pair (i, i + head_dim/2) of every head, in float32: the layout of Hugging Face weights."""
    cos, sin = (part[:, :, None, :] for part in by)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
