import math

import pytest

from grit_jax.plan.hlo import parse_module
from grit_jax.plan.kernels import PRODUCT_EFFICIENCY, SCORE_OPERATIONS, kernel_work
from grit_jax.plan.topology import parse_topology
from tests.plan.programs import module

V5E, V5P, V6E = (parse_topology(name).chip for name in ("v5e-8", "v5p-8", "v6e-8"))
WIDTH, OUT = 4096, 14336


def attention(head_dim, chip):
    entry = f"""
        %q = bf16[8,2048,{head_dim}] parameter(0)
        ROOT %splash_mha_fwd.1 = bf16[8,2048,{head_dim}] custom-call(%q, %q), custom_call_target="tpu_custom_call"
    """
    parsed = parse_module(module(entry))
    return kernel_work(parsed.entry.root, parsed.entry, chip, 1.0)


def grouped(rows, groups, fill=1.0, name="gmm", out=None):
    """A product of sorted rows with the kernels of their groups."""
    config = f'backend_config={{"cost_estimate":{{"flops":"{2 * rows * WIDTH * OUT}"}}}}'
    entry = f"""
        %rows = bf16[{rows},{WIDTH}] parameter(0)
        %kernels = bf16[{groups},{WIDTH},{OUT}] parameter(1)
        ROOT %{name}.1 = {out or f"bf16[{rows},{OUT}]"} custom-call(%rows, %kernels), {config}
    """
    parsed = parse_module(module(entry))
    return kernel_work(parsed.entry.root, parsed.entry, V5P, fill)


def test_attention_takes_its_products_and_then_the_vector_work_on_their_scores():
    work, scores = attention(128, V5E), 8 * 2048 * 2048
    products = 2 * 2 * scores * 128
    assert (work.kind, work.flops) == ("attention", products)
    vector = 2 * scores * SCORE_OPERATIONS / (4 * 8 * 128 * 1.5e9)
    assert work.seconds == pytest.approx(products / 197e12 + vector)


@pytest.mark.parametrize("chip, head_dim, filled", [(V5P, 128, 1), (V5P, 64, 1 / 2), (V6E, 128, 1 / 2), (V6E, 256, 1)])
def test_a_head_narrower_than_a_matrix_unit_fills_a_part_of_it(chip, head_dim, filled):
    work = attention(head_dim, chip)
    vector = work.flops / (2 * head_dim) * SCORE_OPERATIONS / chip.vector_operations
    assert work.seconds - vector == pytest.approx(work.flops / chip.peak_flops / filled)


@pytest.mark.parametrize("rows, tile", [(8192, 512), (8448, 256), (8320, 128)])
def test_a_grouped_product_computes_the_tile_at_each_boundary_twice(rows, tile):
    work = grouped(rows, 8)
    assert work.kind == "experts"
    assert work.flops == pytest.approx(2 * (rows + 7 * tile) * WIDTH * OUT)
    assert work.seconds == pytest.approx(work.flops / (V5P.peak_flops * PRODUCT_EFFICIENCY))


@pytest.mark.parametrize("fill", [1.0, 0.5, 0.1])
def test_a_grouped_product_computes_the_tiles_that_hold_tokens(fill):
    tiles = math.ceil(16 * fill) + 7
    assert grouped(8192, 8, fill).flops == pytest.approx(2 * 512 * tiles * WIDTH * OUT)


def test_the_gradient_of_the_kernels_counts_the_same_rows():
    gradient = grouped(8192, 8, name="tgmm", out=f"bf16[8,{WIDTH},{OUT}]")
    assert gradient.flops == grouped(8192, 8).flops
