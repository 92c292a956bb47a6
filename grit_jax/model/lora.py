"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685) beside the matrices of a model's layers.

An adapter is a part of its `Linear`: every pass that goes through the matrix goes through it, stacked over the layers
as the matrix is, and its parameters carry the matrix's own logical axes. `add_adapters` puts adapters into a block; the
names in `lora.target_modules` are those of the family's table (`Family.modules`). Its parameters are the leaves `a` and
`b` of a `lora` in the parameters' tree, so that patterns such as `*.lora.*` mean all of them.

Dropout draws no random numbers in order: a mask is a hash of seed, step, text, position, layer, module and feature
(`token_noise`, `mixed`), so that rows, chunks, devices and rematerialisation cannot change it.
"""

from __future__ import annotations

import difflib
import functools
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt32

from grit_jax.config import ALL_LINEAR, LoRAConfig, TransformerConfig
from grit_jax.errors import InputError
from grit_jax.families import FAMILIES

# The bits of each token from which its dropout masks are made.
Noise = UInt32[Array, "*pieces batch length"]

NO_ADAPTERS = LoRAConfig()
ADAPTERS = "*.lora.*"  # pattern of the paths of adapters' parameters


class LoRA(nnx.Module):
    """The addition `scale * dropout(x) A B` to a matrix product, initialised as by PEFT: A uniform, B zero.

    Args:
      kernel: The matrix, [*in_dims, *out_dims].
      num_in_dims: Number of its input dims.
      settings: Rank, scale and dropout.
      key: Seed of A.
      name: The module's name, which makes its dropout masks its own.
    """

    def __init__(self, kernel: nnx.Param, num_in_dims: int, settings: LoRAConfig, *, key: PRNGKeyArray, name: str):
        assert settings.r
        axes, in_dims, out_dims = kernel.get_metadata()["axes"], kernel.shape[:num_in_dims], kernel.shape[num_in_dims:]
        bound = math.prod(in_dims) ** -0.5
        values = jax.random.uniform(key, (*in_dims, settings.r), jnp.float32, -bound, bound)
        self.a = nnx.Param(values, axes=(*axes[:num_in_dims], "rank"))
        self.b = nnx.Param(jnp.zeros((settings.r, *out_dims), jnp.float32), axes=("rank", *axes[num_in_dims:]))
        self.scale, self.dropout, self.salt = settings.scale, settings.dropout, zlib.crc32(name.encode())

    def __call__(
        self, x: Float[Array, "tokens fan_in"], noise: UInt32[Array, " tokens"] | None
    ) -> Float[Array, "tokens fan_out"]:
        """The addition, in the dtype of `x`; `noise` is that of the tokens in this layer, None for no dropout."""
        if noise is not None and self.dropout:
            x = dropped(x, mixed(noise, np.uint32(self.salt)), self.dropout)
        a, b = (param[...].astype(x.dtype) for param in (self.a, self.b))
        return self.scale * ((x @ a.reshape(-1, a.shape[-1])) @ b.reshape(b.shape[0], -1))


def mixed(bits: UInt32[Array, "..."], value: Any) -> UInt32[Array, "..."]:
    """Bits that depend on all of `bits` and on whole numbers: the finaliser of MurmurHash3 (Appleby, 2011)."""
    bits = (bits ^ jnp.asarray(value, jnp.uint32)) + np.uint32(0x9E3779B9)
    bits = (bits ^ (bits >> 16)) * np.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * np.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)


def token_noise(
    tokens: Int[Array, "batch length"],
    segment_ids: Int[Array, "batch length"],
    positions: Int[Array, "batch length"],
    *,
    seed: int,
    step: Int[Array, ""],
) -> UInt32[Array, "batch length"]:
    """A hash of seed, step, text and position for each token, wherever its text is. A text is known by its tokens."""
    unsigned = functools.partial(jnp.asarray, dtype=jnp.uint32)
    of_tokens = mixed(mixed(unsigned(tokens), 0), positions)
    sums = jax.vmap(functools.partial(jax.ops.segment_sum, num_segments=tokens.shape[1] + 1))(of_tokens, segment_ids)
    texts = jnp.take_along_axis(sums, segment_ids, axis=1)
    return mixed(mixed(texts, mixed(unsigned(step), np.uint32(seed))), positions)


def dropped(
    x: Float[Array, "tokens width"], noise: UInt32[Array, " tokens"], rate: float
) -> Float[Array, "tokens width"]:
    """`x` with a share `rate` of its values 0, and the others divided by `1 - rate`."""
    bits = mixed(noise[:, None], jnp.arange(x.shape[1], dtype=jnp.uint32))
    return jnp.where(bits >= np.uint32(rate * 2**32), x / (1 - rate), 0)


def adapted_modules(config: TransformerConfig, settings: LoRAConfig) -> dict[str, tuple[str, ...]]:
    """Paths in a layer of the modules that get an adapter, by name; empty without `lora.r`.

    Raises:
      InputError: The family has no such module, or it is one of experts.
    """
    if settings.r is None:
        return {}
    family = FAMILIES[config.family]
    modules = family.modules
    if settings.target_modules == ALL_LINEAR:
        return modules
    others = {row.module for row in family.tensors if row.path[:2] == ("layers", "mlp")} - modules.keys()
    for name in settings.target_modules:
        if name in others:
            raise InputError(
                f"lora.target_modules: {name} of {config.family} belongs to its experts, which get no adapters; "
                f"there are {', '.join(modules)}"
            )
        if name not in modules:
            close = difflib.get_close_matches(name, modules, n=1, cutoff=0)[0]
            raise InputError(
                f"lora.target_modules: {config.family} has no module {name!r}; did you mean {close!r}? "
                f"There are {', '.join(modules)}"
            )
    return {name: path for name, path in modules.items() if name in settings.target_modules}


def merged(params: Any, config: TransformerConfig, settings: LoRAConfig) -> Any:
    """Parameters of the model without adapters that computes the same: their products are added to the matrices.

    The sum is made in float32, layer by layer, and rounded to the matrix's dtype.
    """
    layers = jax.tree.map(lambda leaf: leaf, params["layers"])  # a copy of the dicts, not of the arrays
    for path in adapted_modules(config, settings).values():
        linear = functools.reduce(dict.__getitem__, path, layers)
        lora, kernel = linear.pop("lora"), linear["kernel"]
        add = jax.jit(_with_product, static_argnames="scale", out_shardings=kernel.sharding)
        linear["kernel"] = add(kernel, lora["a"], lora["b"], scale=settings.scale)
    return params | {"layers": layers}


def _with_product(kernel: Array, a: Array, b: Array, *, scale: float) -> Array:
    def one(layer):
        kernel, a, b = layer
        wide_a, wide_b = (part.astype(jnp.float32) for part in (a, b))
        product = jnp.tensordot(wide_a, wide_b, axes=1, precision=jax.lax.Precision.HIGHEST)
        return (kernel.astype(jnp.float32) + scale * product).astype(kernel.dtype)

    return jax.lax.map(one, (kernel, a, b))


def add_adapters(block: nnx.Module, config: TransformerConfig, settings: LoRAConfig, *, key: PRNGKeyArray) -> None:
    """Puts an adapter beside each matrix of `lora.target_modules` in a block.

    Raises:
      InputError: As `adapted_modules`, or the rank is above that of a matrix.
    """
    for name, path in adapted_modules(config, settings).items():
        linear: Any = functools.reduce(getattr, path, block)
        sides = linear.kernel.shape[: linear.num_in_dims], linear.kernel.shape[linear.num_in_dims :]
        fan_in, fan_out = map(math.prod, sides)
        assert settings.r
        if settings.r > min(fan_in, fan_out):
            raise InputError(
                f"lora.r={settings.r} is above the rank of {name}, a matrix of {fan_in} x {fan_out}; lower it to "
                f"{min(fan_in, fan_out)}, or leave {name} out of lora.target_modules"
            )
        own_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        linear.lora = LoRA(linear.kernel, linear.num_in_dims, settings, key=own_key, name=name)
