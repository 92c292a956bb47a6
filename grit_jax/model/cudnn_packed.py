"""Attention of packed rows by cuDNN, told where each text begins and how long it is.

cuDNN then reads no mask, writes no gradient of one, and computes nothing across texts. It is reached through a private
function of JAX, so its limits are checked here and not left to its messages.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grit_jax.data.batch import max_segments
from grit_jax.errors import InputError

_HEAD_DIMS = range(8, 257, 8)
_NONE = -1  # in place of the offset and the length of a text that a row does not have


def text_spans(
    segment_ids: Int[Array, "rows length"], most: int
) -> tuple[Int[Array, "rows texts"], Int[Array, "rows texts"]]:
    """Where each of at most `most` texts of a row begins, and its length, in tokens; -1 for a text that is not there.

    Texts are numbered from 1 and consecutive; 0 is padding.
    """
    length = segment_ids.shape[1]
    inside = segment_ids[:, None, :] == jnp.arange(1, most + 1)[:, None]
    lengths = jnp.sum(inside, axis=-1, dtype=jnp.int32)
    offsets = jnp.min(jnp.where(inside, jnp.arange(length, dtype=jnp.int32), length), axis=-1)
    there = lengths > 0
    return jnp.where(there, offsets, _NONE), jnp.where(there, lengths, _NONE)


def cudnn_packed_attention(
    query: Float[Array, "rows length heads head_dim"],
    key: Float[Array, "rows length kv_heads head_dim"],
    value: Float[Array, "rows length kv_heads head_dim"],
    segment_ids: Int[Array, "rows length"],
    *,
    scale: float,
    causal: bool,
) -> Float[Array, "rows length heads head_dim"]:
    """Attention of packed texts, each to itself; padding gets 0.

    Takes at most `max_segments(length)` texts a row, as the streams pack them: rows with more become NaN.

    Raises:
      InputError: cuDNN does not take heads of this width, activations of this dtype, or this many tokens at once.
    """
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    _check(query)
    length, heads = query.shape[1:3]
    most = max(2, max_segments(length))  # a bound of 1 means rows of one text, without offsets
    offsets, lengths = text_spans(segment_ids, most)
    offsets = jnp.pad(offsets, ((0, 0), (0, 1)), constant_values=_NONE)
    real = (segment_ids > 0)[..., None, None]
    # cuDNN neither reads nor writes padding. Cut off here on both sides, what its memory held reaches no gradient.
    # JAX takes the keys' offsets in units of the query's heads, so that keys and values must have as many.
    query, key, value = (
        jnp.where(real, jnp.repeat(x, heads // x.shape[2], axis=2), jnp.zeros((), x.dtype)) for x in (query, key, value)
    )
    out = dot_product_attention(
        query, key, value,
        q_seqlen=lengths, kv_seqlen=lengths, q_offsets=offsets, kv_offsets=offsets,
        scale=scale, mask_type=MaskType.PADDING_CAUSAL if causal else MaskType.PADDING,
    )  # fmt: skip
    out = jnp.where(real, out, jnp.zeros((), out.dtype))
    return jnp.where(jnp.max(segment_ids, axis=1)[:, None, None, None] <= most, out, jnp.nan)


def _check(query: Array) -> None:
    """Refuses what cuDNN does not take."""
    rows, length, heads, head_dim = query.shape
    if head_dim not in _HEAD_DIMS:
        raise InputError(
            f"model.attention_kernel=cudnn_packed takes heads whose width is a multiple of 8 up to 256, "
            f"not model.architecture.head_dim={head_dim}; set it to dense"
        )
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        raise InputError(
            f"model.attention_kernel=cudnn_packed takes activations in bfloat16, not {query.dtype}; "
            "set model.compute_dtype=bfloat16"
        )
    if query.size > jnp.iinfo(jnp.int32).max:
        raise InputError(
            f"model.attention_kernel=cudnn_packed counts numbers in int32, but {rows} rows of {length} tokens with "
            f"{heads} heads of {head_dim} are {query.size}; lower model.layer_rows"
        )
