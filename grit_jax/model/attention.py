"""Attention masks, and attention through one of several kernels."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jaxtyping import Array, Bool, Float, Int

from grit_jax.errors import InputError
from grit_jax.model.blockwise import blockwise_attention
from grit_jax.model.cudnn_packed import cudnn_packed_attention
from grit_jax.parallel.execution import ATTENTION, PLAIN, Execution, wide
from grit_jax.parallel.sharding import on_devices


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """Which keys a query sees.

    A key is visible if it belongs to the query's segment and, under `causal`, does not come later and is less than
    `window` positions back. A bidirectional query sees keys up to `window` positions away on both sides.

    For one row with segments 1 1 1 2 2 0 (0 is padding), `x` marks visible keys:

        causal  x . . . . .      bidirectional  x x x . . .
                x x . . . .                     x x x . . .
                x x x . . .                     x x x . . .
                . . . x . .                     . . . x x .
                . . . x x .                     . . . x x .
                . . . . . x                     . . . . . x

    Attributes:
      query_positions: int32 [batch, length]; position of each query in its text.
      key_positions: int32 [batch or 1, keys]; position of each key in its text.
      query_segments: int32 [batch, length], or None when a row is one text.
      key_segments: int32 [batch, keys], or None.
      causal: Whether later keys are hidden.
      window: Keys that a causal query sees, itself included, or the farthest key of a bidirectional one; None for all.
      packed: Whether rows of consecutive texts attend to themselves: then distances within a text equal distances
        within the row, on which kernels rely.
    """

    query_positions: Int[Array, "*pieces batch length"]
    key_positions: Int[Array, "*pieces #batch keys"]
    query_segments: Int[Array, "*pieces batch length"] | None
    key_segments: Int[Array, "*pieces batch keys"] | None
    causal: bool = dataclasses.field(metadata={"static": True})
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    packed: bool = dataclasses.field(default=False, metadata={"static": True})

    @classmethod
    def of_rows(
        cls,
        segment_ids: Int[Array, "batch length"],
        positions: Int[Array, "batch length"],
        *,
        causal: bool,
        window: int | None,
    ) -> AttentionMask:
        """Mask of packed rows attending to themselves."""
        return cls(positions, positions, segment_ids, segment_ids, causal, window, packed=True)

    def materialize(self) -> Bool[Array, "batch length keys"]:
        """The dense mask, True where a key is visible. Padding sees padding, so no row is empty."""
        query, key = self.query_positions[:, :, None], self.key_positions[:, None, :]
        visible = jnp.ones((), bool)
        if self.query_segments is not None and self.key_segments is not None:
            visible = self.query_segments[:, :, None] == self.key_segments[:, None, :]
        if self.causal:
            visible &= key <= query
        if self.window is not None:
            visible &= (query - key < self.window) if self.causal else (abs(query - key) <= self.window)
        return jnp.broadcast_to(visible, jnp.broadcast_shapes(query.shape, key.shape))


def attention(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads head_dim"],
    mask: AttentionMask,
    *,
    scale: float,
    soft_cap: float | None,
    execution: Execution = PLAIN,
) -> Float[Array, "batch length heads head_dim"]:
    """Grouped-query attention; query head `n` reads key/value head `n // (heads // kv_heads)`.

    Scores are `scale` times the products of queries and keys, bounded by `soft_cap` with tanh if it is given. Softmax
    is float32. All kernels agree up to rounding.

    Raises:
      InputError: The kernel does not support the arguments.
    """
    if not mask.packed or execution.attention == "dense":
        return _dense(query, key, value, mask, scale=scale, soft_cap=soft_cap)
    if execution.attention == "splash":
        return _splash(query, key, value, mask, scale=scale, soft_cap=soft_cap, execution=execution)
    if execution.attention == "blockwise":
        return _blockwise(query, key, value, mask, scale=scale, soft_cap=soft_cap)
    if execution.attention == "cudnn_packed":
        return _cudnn_packed(query, key, value, mask, scale=scale, soft_cap=soft_cap)
    return _cudnn(query, key, value, mask, scale=scale, soft_cap=soft_cap)


def _dense(query: Array, key: Array, value: Array, mask: AttentionMask, *, scale, soft_cap) -> Array:
    """The reference: all scores at once, under any mask.

    The heads of a group are folded into the query dim: each key/value head is one batched matrix product.
    """
    batch, length, num_heads, head_dim = query.shape
    num_kv_heads, num_keys = key.shape[2], key.shape[1]
    group = num_heads // num_kv_heads
    query = query.reshape(batch, length, num_kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    query = (query * scale).reshape(batch, num_kv_heads, group * length, head_dim)
    scores = jnp.einsum("bkth,bskh->bkts", query, key, preferred_element_type=wide(query))
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = scores.reshape(batch, num_kv_heads, group, length, num_keys)
    scores = jnp.where(mask.materialize()[:, None, None], scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    weights = weights.reshape(batch, num_kv_heads, group * length, num_keys)
    out = jnp.einsum("bkts,bskh->bkth", weights, value)
    out = out.reshape(batch, num_kv_heads, group, length, head_dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, length, num_heads, head_dim)


def _splash(query: Array, key: Array, value: Array, mask: AttentionMask, *, scale, soft_cap, execution) -> Array:
    """JAX's splash attention for TPU, which skips blocks hidden by causality or the window."""
    length = query.shape[1]
    if length % execution.row_unit:
        raise InputError(
            f"rows of {length} tokens: splash attention needs a multiple of {execution.row_unit}; "
            "choose data.*_max_length accordingly, or model.attention_kernel=dense"
        )

    def on_device(query, key, value, segments):
        kernel = splash_attention_kernel.make_splash_mha(
            splash_attention_mask.MultiHeadMask([_splash_mask(mask, length)] * query.shape[2]),
            head_shards=1,
            q_seq_shards=1,
            block_sizes=_block_sizes(length),
            attn_logits_soft_cap=soft_cap,
            residual_checkpoint_name=ATTENTION,
            interpret=execution.interpret,
        )
        heads_first = (x.swapaxes(1, 2) for x in (query * scale, key, value))
        segment_ids = splash_attention_kernel.SegmentIds(segments, segments)
        return jax.vmap(kernel)(*heads_first, segment_ids).swapaxes(1, 2)

    return _split(on_device, query, key, value, mask)


def _split(kernel: Callable[..., Array], query: Array, key: Array, value: Array, mask: AttentionMask) -> Array:
    """Runs a kernel on each device's rows and heads; it takes queries, keys, values and segments."""
    rows, heads = ("batch", "length"), ("batch", "length", "activation_heads", "head_dim")
    split = on_devices(kernel, in_axes=(heads, heads, heads, rows), out_axes=heads)
    return split(query, key, value, mask.query_segments)


def _blockwise(query: Array, key: Array, value: Array, mask: AttentionMask, *, scale, soft_cap) -> Array:
    """Tiles in plain JAX; hidden ones are skipped."""
    kernel = functools.partial(blockwise_attention, causal=mask.causal, window=mask.window, soft_cap=soft_cap)
    return _split(kernel, query * scale, key, value, mask)


def _splash_mask(mask: AttentionMask, length: int) -> splash_attention_mask.Mask:
    """The part of the mask that all rows share; the kernel takes segments separately."""
    shape = (length, length)
    if mask.window is not None:
        sides = (mask.window - 1, 0) if mask.causal else (mask.window, mask.window)
        return splash_attention_mask.LocalMask(shape, sides, 0)
    return splash_attention_mask.CausalMask(shape) if mask.causal else splash_attention_mask.FullMask(shape)


def _block_sizes(length: int) -> splash_attention_kernel.BlockSizes:
    """The largest tiles that divide the length and fit a TPU core's vector memory.

    With 1024 queries, a kernel without a window would take 16.6 MiB of the 16 there.
    """

    def divisor(limit):
        return next(size for size in range(min(limit, length), 0, -128) if length % size == 0)

    queries, keys, compute = divisor(512), divisor(2048), divisor(512)
    return splash_attention_kernel.BlockSizes(
        block_q=queries, block_kv=keys, block_kv_compute=compute,
        block_q_dkv=queries, block_kv_dkv=keys, block_kv_dkv_compute=compute,
        use_fused_bwd_kernel=True,
    )  # fmt: skip


def _cudnn(query: Array, key: Array, value: Array, mask: AttentionMask, *, scale, soft_cap) -> Array:
    """CuDNN's flash attention for NVIDIA GPUs, in bfloat16 or float16; the mask is shared by all heads."""
    if soft_cap is not None:
        raise InputError("model.attention_kernel=cudnn supports no soft cap; use dense for this family")
    visible = mask.materialize()[:, None]
    return jax.nn.dot_product_attention(query, key, value, mask=visible, scale=scale, implementation="cudnn")


def _cudnn_packed(query: Array, key: Array, value: Array, mask: AttentionMask, *, scale, soft_cap) -> Array:
    """The same without a mask: cuDNN is told where texts begin."""
    if soft_cap is not None:
        raise InputError("model.attention_kernel=cudnn_packed supports no soft cap; use dense for this family")
    length = query.shape[1]
    # The farthest key of a text is length - 1 tokens away; a causal query's window counts itself.
    if mask.window is not None and mask.window < length - (0 if mask.causal else 1):
        raise InputError(
            f"model.attention_kernel=cudnn_packed supports no sliding window, and model.architecture.sliding_window="
            f"{mask.window} is less than rows of {length} tokens; use cudnn"
        )
    return _split(functools.partial(cudnn_packed_attention, scale=scale, causal=mask.causal), query, key, value, mask)
