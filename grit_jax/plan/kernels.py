"""How long the Pallas kernels of a program compute, which the compiler does not know.

Every constant here is fixed with published runs (docs/planning.md), so it is no prediction of those.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from grit_jax.model.moe import row_tile
from grit_jax.parallel.chips import Chip
from grit_jax.plan.flops import grouped_sizes, head_dim, is_attention, is_grouped, kernel_flops
from grit_jax.plan.hlo import Computation, Instruction

# Operations of the vector units for each score and product of attention: scaling, mask, exponential, sums, casts. They
# do not overlap with the products. Fixed with a run of attention almost alone: MaxText's Llama3.1-8B of 4M tokens and
# heads of 256 computes at 81 % of a v5p's peak, its fused backward pass with five products.
SCORE_OPERATIONS = 3.75
# Share of the peak that products in a kernel reach on whole tiles: what is left of the published step of MaxText's
# dropless Mixtral-8x7B for its experts, after all other work.
PRODUCT_EFFICIENCY = 0.8

KernelKind = Literal["attention", "experts", "kernels"]


@dataclass(frozen=True)
class KernelWork:
    """What one run of a kernel computes.

    Args:
      kind: Attention, grouped products of experts, or another kernel.
      flops: FLOPs of its matrix products; None if unknown.
      seconds: Time that they take; reading and writing HBM may take longer.
    """

    kind: KernelKind
    flops: float | None
    seconds: float


def kernel_work(kernel: Instruction, computation: Computation, chip: Chip, expert_fill: float) -> KernelWork:
    """The work of a Pallas kernel.

    Args:
      kernel: The kernel's instruction.
      computation: The computation that holds it.
      chip: The chip that it runs on.
      expert_fill: Share of the rows of grouped products that hold tokens.
    """
    flops = kernel_flops(kernel, computation)
    if is_attention(kernel):
        assert flops is not None
        return KernelWork("attention", flops, _attention_seconds(flops, head_dim(kernel, computation), chip))
    if is_grouped(kernel) and flops is not None:
        rows, groups = grouped_sizes(kernel, computation, flops)
        flops *= _executed_rows(rows, groups, expert_fill) / rows
        return KernelWork("experts", flops, flops / (chip.peak_flops * PRODUCT_EFFICIENCY))
    return KernelWork("kernels", flops, (flops or 0) / (chip.peak_flops * PRODUCT_EFFICIENCY))


def _attention_seconds(flops: float, width: int, chip: Chip) -> float:
    """The products, which fill the matrix units as far as a head is wide, and then the vector work on their scores."""
    filled = min(1.0, width / chip.mxu_size)
    scores = flops / (2 * width)
    return flops / (chip.peak_flops * filled) + scores * SCORE_OPERATIONS / chip.vector_operations


def _executed_rows(rows: int, groups: int, fill: float) -> float:
    """Rows that a grouped product computes: whole tiles of the filled ones, and one tile again at each boundary."""
    tile = row_tile(rows)
    return math.ceil(rows * fill / tile) * tile + (groups - 1) * tile
