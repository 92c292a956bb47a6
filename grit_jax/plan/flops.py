"""FLOPs of a compiled program's matrix products and of the Pallas kernels that this package uses."""

from __future__ import annotations

import functools
import math
import re

import numpy as np

from grit_jax.plan.hlo import Array, Computation, Instruction, Module


def matmul_flops(module: Module, computation: Computation, instruction: Instruction) -> int:
    """FLOPs of the matrix products in one instruction, fusions included; loops count nothing here."""
    if instruction.opcode == "dot":
        return _dot_flops(instruction, computation)
    if instruction.opcode == "convolution":
        return _convolution_flops(instruction, computation)
    if instruction.opcode in ("fusion", "async-start"):
        called = module.called(instruction)
        return sum(matmul_flops(module, called, inner) for inner in called)
    return 0


def _dot_flops(dot: Instruction, computation: Computation) -> int:
    left = computation.operands(dot)[0].arrays[0]
    contracted = math.prod(left.dims[dim] for dim in dot.dims_attribute("lhs_contracting_dims"))
    return 2 * dot.arrays[0].size * contracted


def _convolution_flops(convolution: Instruction, computation: Computation) -> int:
    """XLA:TPU writes every matrix product as a convolution, some with a window that mostly covers padding.

    Such a window stands for a batch dim or for a product's outer dim, so only its positions inside the input multiply.
    """
    labels = re.search(r"\bdim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes)
    if labels is None:
        raise ValueError(f"convolution {convolution.name} has no dim_labels")
    left, kernel = (operand.arrays[0].dims for operand in computation.operands(convolution))
    out = convolution.arrays[0].dims
    window = re.search(r"\bwindow=\{([^}]*)\}", convolution.attributes)
    fields = dict(field.split("=") for field in window[1].split()) if window else {}
    products = out[labels[3].index("b")] * out[labels[3].index("f")] * kernel[labels[2].index("i")]
    for dim in range(sum(label.isdigit() for label in labels[2])):
        label = str(dim)
        products *= _inside(
            left[labels[1].index(label)],
            kernel[labels[2].index(label)],
            out[labels[3].index(label)],
            stride=_window_value(fields, "stride", dim),
            padding=int(fields["pad"].split("x")[dim].split("_")[0]) if "pad" in fields else 0,
            input_dilation=_window_value(fields, "lhs_dilate", dim),
            kernel_dilation=_window_value(fields, "rhs_dilate", dim),
        )
    return 2 * products


def _window_value(fields: dict[str, str], key: str, dim: int) -> int:
    return int(fields[key].split("x")[dim]) if key in fields else 1


@functools.lru_cache(maxsize=1024)
def _inside(
    size: int, kernel: int, out: int, *, stride: int, padding: int, input_dilation: int, kernel_dilation: int
) -> int:
    """Number of pairs of an output and a kernel position on an element of the input, in one spatial dim."""
    positions = stride * np.arange(out)[:, None] - padding + kernel_dilation * np.arange(kernel)
    inside = (positions >= 0) & (positions <= (size - 1) * input_dilation) & (positions % input_dilation == 0)
    return int(np.count_nonzero(inside))


def is_kernel(instruction: Instruction) -> bool:
    """Whether an instruction is a Pallas kernel, whose time the compiler does not know."""
    return instruction.opcode == "custom-call" and instruction.attribute("custom_call_target") == "tpu_custom_call"


def is_attention(kernel: Instruction) -> bool:
    """Whether a Pallas kernel is one of splash attention's."""
    return "splash" in kernel.name


def is_grouped(kernel: Instruction) -> bool:
    """Whether a Pallas kernel is one of megablox's, or of those that XLA:TPU makes of `ragged_dot`."""
    return bool(re.match(r"t?gmm|ragged", kernel.name))


def kernel_flops(kernel: Instruction, computation: Computation) -> int | None:
    """FLOPs of a Pallas kernel's matrix products; None if unknown.

    Splash attention's follow from its shapes. Other kernels carry their `pallas_call(cost_estimate=...)`; those of
    megablox and of the kernels that XLA:TPU makes of `ragged_dot` follow from the shapes.
    """
    arrays = [operand.arrays[0] for operand in computation.operands(kernel)]
    if is_attention(kernel):
        return _splash_flops(kernel, arrays)
    whole_numbers = all(re.match("pred|[su]", array.dtype) for array in (*arrays, *kernel.arrays))
    return 0 if whole_numbers else kernel.config("flops")


def head_dim(kernel: Instruction, computation: Computation) -> int:
    """Width of a head of splash attention's kernel."""
    query, _ = _query_and_key([operand.arrays[0] for operand in computation.operands(kernel)])
    return query.dims[-1]


def grouped_sizes(kernel: Instruction, computation: Computation, flops: int) -> tuple[int, int]:
    """Rows and groups of a grouped product: every row with one group's [width, out] kernel, or its gradient."""
    arrays = [array for each in (*computation.operands(kernel), kernel) for array in each.arrays]
    groups, width, out = next(array.dims for array in arrays if re.match("b?f", array.dtype) and len(array.dims) == 3)
    return flops // (2 * width * out), groups


# Products of [length, head_dim] with [head_dim, length], or of that size, per visible pair of blocks: scores and values
# forward; scores, its gradient and one or two of dq, dk, dv backward (the fused backward makes all three).
_SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4, "fused": 5}


def _splash_flops(kernel: Instruction, arrays: list[Array]) -> int:
    """Every block of scores that the mask does not hide entirely counts in full.

    The text lacks the mask. An operand holds its table of blocks, which a window makes narrower. If the mask is
    computed from positions, these are another operand, besides the two of segment ids; such a mask with a whole table
    is assumed causal.
    """
    query, key = _query_and_key(arrays)
    phase = re.search(r"_(fwd|dq|dkv)", kernel.name)
    if phase is None:
        raise ValueError(f"unknown splash attention kernel {kernel.name}")
    name = phase[1]
    if name == "dkv" and sum(array.size >= key.size and len(array.dims) >= 3 for array in kernel.arrays) == 3:
        name = "fused"
    suffix = "" if phase[1] == "fwd" else f"_{phase[1]}"
    block_q, block_kv = (
        _block_size(kernel, f"block_{side}{suffix}", array.dims[-2]) for side, array in (("q", query), ("kv", key))
    )
    rows, columns = -(-query.dims[-2] // block_q), -(-key.dims[-2] // block_kv)
    blocks = min((math.prod(array.dims[-2:]) for array in arrays if array.dtype == "s8"), default=rows * columns)
    has_positions = sum(array.dtype == "s32" for array in arrays) % 2 == 1
    if has_positions and blocks == rows * columns:
        blocks = sum(min(columns, -(-(row + 1) * block_q // block_kv)) for row in range(rows))
    batch_and_heads = math.prod(query.dims[:-2])
    return _SPLASH_PRODUCTS[name] * 2 * batch_and_heads * blocks * block_q * block_kv * query.dims[-1]


def _query_and_key(arrays: list[Array]) -> list[Array]:
    return [array for array in arrays if re.match("b?f", array.dtype) and len(array.dims) >= 3][:2]


def _block_size(kernel: Instruction, key: str, length: int) -> int:
    """A block size from a splash kernel's metadata; the whole length if it is missing."""
    found = re.search(rf'\\"{key}\\": (\d+)', kernel.attributes)
    return int(found[1]) if found else length
