"""Fingerprints of models, by which one recognises weights wherever they are stored."""

from __future__ import annotations

import functools
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np

from grit_jax.config import EmbeddingConfig, LoRAConfig, TransformerConfig
from grit_jax.model.lora import NO_ADAPTERS
from grit_jax.model.transformer import Params, stack_layers
from grit_jax.text.tokenizer import Tokenizer


def fingerprint(
    params: Params,
    architecture: TransformerConfig,
    embedding: EmbeddingConfig,
    tokenizer: Tokenizer,
    lora: LoRAConfig = NO_ADAPTERS,
    *,
    rounded: bool = False,
) -> str:
    """Identifies weights, shape, settings and tokenizer: equal for equal ones on devices of one type.

    Args:
      params: The weights, on a mesh.
      architecture: Resolved shape.
      embedding: How the model makes vectors.
      tokenizer: Its tokenizer.
      lora: Its adapters.
      rounded: Whether to compare weights in bfloat16. The fingerprint is then equal on devices of every type, and for
        weights that differ by less.
    """
    sums = [int(leaf) for leaf in jax.tree.leaves(jax.device_get(_checksums(params, rounded=rounded)))]
    about = [
        repr(architecture),
        repr(embedding),
        tokenizer.fingerprint,
        *([] if lora.r is None else [lora.scale]),
        *sums,
    ]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]


@functools.partial(jax.jit, static_argnames="rounded")
def _checksums(params: Params, *, rounded: bool) -> Params:
    """A number for each parameter that changes with any bit and the order of its values."""

    def checksum(x):
        x = x.astype(jnp.bfloat16) if rounded else x
        bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
        index = sum(
            jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim) * np.uint32(factor)
            for dim, factor in enumerate((0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F)[: x.ndim])
        )
        mixed = (bits ^ (index + np.uint32(1))) * np.uint32(0x2545F491)
        return jnp.sum(mixed ^ (mixed >> 15), dtype=jnp.uint32)

    return jax.tree.map(checksum, stack_layers(params))
