"""Types that the model computes in."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp


def compute_dtype(name: Literal["auto", "float32", "bfloat16"]) -> jnp.dtype:
    """The type of activations: `auto` is float32 on CPU, where bfloat16 is slow, and bfloat16 elsewhere."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def wide(x: jax.Array) -> jnp.dtype:
    """The type of what needs range and precision in a model whose activations are `x`: float32, or float64 for that."""
    return jnp.promote_types(x.dtype, jnp.float32)
