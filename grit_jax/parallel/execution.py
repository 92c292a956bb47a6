"""How the model computes: dtypes, kernels and rematerialisation.

Apart from the order of sums, only dtypes change the numbers.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from grit_jax.config import AttentionKernel, ExpertKernel, ModelConfig, Remat
from grit_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Execution:
    """Settings of one call of the model.

    Attributes:
      dtype: Dtype of the activations.
      attention: Kernel for packed rows; with a KV cache attention is always dense.
      experts: Kernel for the experts' grouped matrix products.
      remat: What a layer recomputes in the backward pass.
      layer_rows: Most rows that pass through a layer at once; None for all.
      interpret: Whether to interpret Pallas kernels, which runs them on any device, slowly.
    """

    dtype: jnp.dtype
    attention: AttentionKernel = "dense"
    experts: ExpertKernel = "ragged_dot"
    remat: Remat = "none"
    layer_rows: int | None = None
    interpret: bool = False

    @property
    def row_unit(self) -> int:
        """The length of packed rows is a multiple of this."""
        return 128 if self.attention == "splash" or self.experts == "megablox" else 1


# The reference: every other setting gives the same numbers, up to the rounding of its dtype.
PLAIN = Execution(jnp.dtype("float32"))

# Kernels that run on a single platform.
_PLATFORMS = {"splash": "tpu", "megablox": "tpu", "cudnn": "gpu", "cudnn_packed": "gpu"}

# Names of values in a layer that may be saved for the backward pass.
LAYER_INPUT, ATTENTION = "layer_input", "attention"


def rematerialized(layer: Callable, remat: Remat) -> Callable:
    """`layer`, saving for the backward pass what `remat` says; arguments that are Python bools stay static."""
    if remat == "none":
        return layer
    policies = jax.checkpoint_policies
    policy = {
        "full": policies.nothing_saveable,
        "dots": policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(ATTENTION)
        ),
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[LAYER_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }[remat]

    def checkpointed(*args):
        static = tuple(i for i, arg in enumerate(args) if isinstance(arg, bool))
        return jax.checkpoint(layer, policy=policy, static_argnums=static)(*args)

    return checkpointed


def map_chunks(function: Callable[[Any], Any], rows: Any, num_chunks: int) -> Any:
    """Applies `function` to `num_chunks` chunks of a tree of rows, one after another, and stacks the results.

    If there are several chunks, the backward pass recomputes each: memory depends on the chunk, while the gradient is
    the whole batch's.
    """
    if num_chunks == 1:
        return jax.tree.map(lambda x: x[None], function(rows))
    chunks = jax.tree.map(lambda x: x.reshape(num_chunks, x.shape[0] // num_chunks, *x.shape[1:]), rows)
    return jax.lax.map(jax.checkpoint(function), chunks)


def num_chunks(size: int, limit: int | None) -> int:
    """The smallest number of equal chunks of at most `limit` that divides `size`; 1 without a limit."""
    fewest = -(-size // limit) if limit else 1
    return next(number for number in range(fewest, size + 1) if size % number == 0)


def execution(config: ModelConfig, platform: str) -> Execution:
    """The execution settings of a run on a platform: `tpu`, `gpu` or `cpu`.

    Raises:
      InputError: A kernel is for another platform, or for newer devices or another JAX.
    """
    for key in ("attention_kernel", "expert_kernel"):
        needed = _PLATFORMS.get(kernel := getattr(config, key), platform)
        if needed != platform:
            raise InputError(f"model.{key}={kernel} needs {needed} devices, but these are {platform}; set it to auto")
    if config.attention_kernel == "cudnn_packed":
        _check_cudnn_packed()
    experts: ExpertKernel = "megablox" if platform == "tpu" else "ragged_dot"
    return Execution(
        dtype=compute_dtype(config.compute_dtype, platform),
        attention=_attention(platform) if config.attention_kernel == "auto" else config.attention_kernel,
        experts=experts if config.expert_kernel == "auto" else config.expert_kernel,
        remat=config.remat,
        layer_rows=config.layer_rows,
    )


def _attention(platform: str) -> AttentionKernel:
    """A platform's attention kernel; cuDNN's needs GPUs of compute capability 8 (Ampere) or newer."""
    if platform == "gpu" and _compute_capability() < 8:
        return "dense"
    kernels: dict[str, AttentionKernel] = {"tpu": "splash", "gpu": "cudnn", "cpu": "blockwise"}
    return kernels[platform]


def _compute_capability() -> float:
    """The least of this process's GPUs."""
    return min(float(device.compute_capability) for device in jax.local_devices(backend="gpu"))


def _check_cudnn_packed() -> None:
    """Refuses GPUs before Hopper, and a JAX whose private entrance to cuDNN takes no offsets."""
    if (capability := _compute_capability()) < 9:
        raise InputError(
            f"model.attention_kernel=cudnn_packed needs GPUs of compute capability 9.0 (Hopper) or newer, "
            f"but one has {capability}; set it to auto"
        )
    try:
        from jax._src.cudnn.fused_attention_stablehlo import dot_product_attention

        offsets = {"q_offsets", "kv_offsets"} <= inspect.signature(dot_product_attention).parameters.keys()
    except ImportError:
        offsets = False
    if not offsets:
        raise InputError(
            f"model.attention_kernel=cudnn_packed: jax {jax.__version__} has no attention by cuDNN that takes offsets; "
            "set it to cudnn, or install another jax"
        )


def compute_dtype(name: Literal["auto", "float32", "bfloat16"], platform: str) -> jnp.dtype:
    """The dtype of activations: `auto` is float32 on CPU, where bfloat16 is slow, and bfloat16 elsewhere."""
    if name == "auto":
        name = "float32" if platform == "cpu" else "bfloat16"
    return jnp.dtype(name)


def wide(x: jax.Array) -> jnp.dtype:
    """The dtype for values that need more range and precision than activations `x`: float32, or float64 for float64."""
    return jnp.promote_types(x.dtype, jnp.float32)
