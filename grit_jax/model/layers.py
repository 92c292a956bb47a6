"""Layers of the decoder. A parameter's shape, initialiser and logical axes stand where it is created."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from grit_jax.config import RopeScaling, TransformerConfig
from grit_jax.model.lora import LoRA, Noise
from grit_jax.parallel.execution import Execution, wide
from grit_jax.parallel.sharding import constrain, gather


class Linear(nnx.Module):
    """A matrix product over the last dims of the input, with float32 weights, computed in the input's dtype.

    `in_dims` and `out_dims` map each dim's logical axis to its size. Initial weights are normal with
    variance `scale**2 / fan_in`. `lora` is the adapter beside the matrix, if it gets one (`add_adapters`).
    """

    lora: LoRA | None = None

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

    def __call__(self, x: Float[Array, "*in_dims"], noise: Noise | None = None) -> Float[Array, "*out_dims"]:
        """Replaces the last dims of `x` by the output dims; `noise` is for the dropout of an adapter's input."""
        kernel = self.kernel[...].astype(x.dtype)
        out_shape = (*x.shape[: x.ndim - self.num_in_dims], *kernel.shape[self.num_in_dims :])
        fan_in = math.prod(kernel.shape[: self.num_in_dims])
        # One plain matrix product over all tokens: weight gradients that contract over two dims are slower.
        flat = x.reshape(-1, fan_in)
        out = flat @ kernel.reshape(fan_in, -1)
        if self.lora is not None:
            out = out + self.lora(flat, None if noise is None else noise.reshape(-1))
        out = out.reshape(out_shape)
        if self.bias is None:
            return out
        # Added in float32, so that its gradient, a sum over all tokens, is float32 too.
        return (out.astype(wide(x)) + self.bias[...]).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation over the last dim, of size `dim`, in float32, with a learned scale.

    The stored scale has `config.norm_offset` subtracted.
    """

    def __init__(self, config: TransformerConfig, dim: int):
        self.epsilon, self.offset = config.norm_epsilon, config.norm_offset
        self.scale = nnx.Param(jnp.full(dim, 1.0 - self.offset, jnp.float32), axes=("norm",))

    def __call__(self, x: Float[Array, "... embed"]) -> Float[Array, "... embed"]:
        """Normalises and scales; the result has the dtype of `x`."""
        full = x.astype(wide(x))
        full = full * jax.lax.rsqrt(jnp.mean(jnp.square(full), axis=-1, keepdims=True) + self.epsilon)
        return (full * (self.offset + self.scale[...])).astype(x.dtype)


def activation(config: TransformerConfig) -> Callable[[Array], Array]:
    """The nonlinearity of the gated MLP."""
    return {"silu": jax.nn.silu, "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}[config.activation]


class GatedMLP(nnx.Module):
    """down(activation(gate(x)) * up(x))."""

    def __init__(self, config: TransformerConfig, *, key: PRNGKeyArray, out_scale: float):
        gate_key, up_key, down_key = jax.random.split(key, 3)
        embed, mlp = {"embed": config.embed_dim}, {"mlp": config.mlp_dim}
        self.activation = activation(config)
        self.gate = Linear(embed, mlp, key=gate_key)
        self.up = Linear(embed, mlp, key=up_key)
        self.down = Linear(mlp, embed, key=down_key, scale=out_scale)

    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        real: Bool[Array, "batch length"],
        execution: Execution,
        noise: Noise | None = None,
    ) -> tuple[Float[Array, "batch length embed"], None]:
        """The addition to the residual stream; None in place of `ExpertMLP`'s router sums."""
        del real, execution  # for experts only
        hidden = self.activation(self.gate(x, noise)) * self.up(x, noise)
        return self.down(constrain(hidden, "batch", "length", "activation_mlp"), noise), None


def gathered(module: Any, dtype: jnp.dtype) -> Any:
    """A module with its parameters gathered from all devices.

    Pieces travel in `dtype`, in which they are used. The result has the parameters' own dtype, in which gradients are
    summed over uses and devices.
    """

    def whole(param: nnx.Variable):
        return param.replace(gather(param[...], param.get_metadata()["axes"], dtype))

    return jax.tree.map(whole, module, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


Rotation = tuple[Float[Array, "*pieces batch length half"], Float[Array, "*pieces batch length half"]]


def rotation(
    positions: Int[Array, "batch length"], *, head_dim: int, theta: float, scaling: RopeScaling | None
) -> Rotation:
    """Cosines and sines of the rotary embedding (Su et al., arXiv 2104.09864), float32."""
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    if scaling is not None:
        # Share of the unscaled frequency: none under `linear`; under `llama3` all for high frequencies, with a ramp.
        kept: np.ndarray | float = 0.0
        if scaling.kind == "llama3":
            low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
            turns = scaling.original_length * frequencies / (2 * math.pi)
            kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        frequencies = kept * frequencies + (1 - kept) * frequencies / scaling.factor
    angles = positions[:, :, None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "batch length heads head_dim"], by: Rotation) -> Float[Array, "batch length heads head_dim"]:
    """Rotates each pair (i, i + head_dim/2) of every head, in float32: the layout of Hugging Face weights."""
    cos, sin = (part[:, :, None, :] for part in by)
    first, second = jnp.split(x.astype(wide(x)), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
