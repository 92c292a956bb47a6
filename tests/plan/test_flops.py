import pytest

from grit_jax.plan.flops import kernel_flops, matmul_flops
from grit_jax.plan.hlo import parse_module
from tests.plan.programs import module


def flops_of(entry, *others):
    parsed = parse_module(module(entry, *others))
    return sum(matmul_flops(parsed, parsed.entry, instruction) for instruction in parsed.entry)


def kernel_of(entry):
    parsed = parse_module(module(entry))
    return kernel_flops(parsed.entry.root, parsed.entry)


def splash(name, outputs, *, table="s8[1,4,4]", has_positions=False, metadata):
    """A splash kernel of 8 query heads of 128 over 2048 positions with segments."""
    pairs = ", ".join(f'\\"{key}\\": {size}' for key, size in metadata.items())
    positions = ", %ids" if has_positions else ""
    return f"""%table = {table} parameter(0)
        %q = bf16[8,2048,128] parameter(1)
        %k = bf16[2,2048,128] parameter(2)
        %ids = s32[2048,128] parameter(3)
        ROOT %{name}.1 = ({outputs}) custom-call(%table, %q, %k, %k, %ids, %ids{positions}), a={{{pairs}}}"""


FORWARD = "f32[512,128], bf16[8,2048,128]"
BLOCKS = {"block_q": 512, "block_kv": 512}
PRODUCT = 2 * 8 * 2048 * 2048 * 128  # every query with every key


def test_a_dot_counts_two_per_output_and_contracted_element():
    dot = """
        %a = f32[3,4,5] parameter(0)
        %b = f32[3,5,6] parameter(1)
        ROOT %c = f32[3,4,6] dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_contracting_dims={1}
    """
    assert flops_of(dot) == 2 * 3 * 4 * 5 * 6


def test_a_convolution_without_a_window_is_a_matrix_product():
    product = """
        %a = bf16[4,5] parameter(0)
        %b = bf16[5,6] parameter(1)
        ROOT %c = bf16[4,6] convolution(%a, %b), dim_labels=bf_io->bf
    """
    assert flops_of(product) == 2 * 4 * 5 * 6


def test_a_window_over_padding_counts_only_its_places_inside():
    # 16 outer positions of the kernel as a window of 16 over one element padded by 15: each output meets one element.
    product = """
        %a = bf16[1024,2,256,1] parameter(0)
        %b = bf16[16,128,2,256] parameter(1)
        ROOT %c = bf16[1024,16,128,1] convolution(%a, %b), window={WINDOW}, dim_labels=b1f0_0o1i->b0f1
    """.replace("WINDOW", "size=16x2 pad=15_15x0_0 rhs_reversal=1x0")
    assert flops_of(product) == 2 * 1024 * (16 * 128) * (2 * 256)


def test_strides_and_dilations_move_the_places():
    # Outputs 0..2 start at inputs 0, 2, 4 of 5; the second kernel element, 2 further, leaves the input once.
    convolution = """
        %a = f32[1,1,5] parameter(0)
        %b = f32[1,1,2] parameter(1)
        ROOT %c = f32[1,1,3] convolution(%a, %b), window={WINDOW}, dim_labels=bf0_io0->bf0
    """.replace("WINDOW", "size=2 stride=2 pad=0_2 rhs_dilate=2")
    assert flops_of(convolution) == 2 * 5


def test_products_inside_nested_fusions_count():
    inner = """
        %inner (a: f32[4,5], b: f32[5,6]) -> f32[4,6] {
          %a = f32[4,5] parameter(0)
          %b = f32[5,6] parameter(1)
          ROOT %c = f32[4,6] dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
        }
    """
    outer = """
        %outer (a: f32[4,5], b: f32[5,6]) -> f32[4,6] {
          %a = f32[4,5] parameter(0)
          %b = f32[5,6] parameter(1)
          ROOT %c = f32[4,6] fusion(%a, %b), kind=kOutput, calls=%inner
        }
    """
    entry = """
        %a = f32[4,5] parameter(0)
        %b = f32[5,6] parameter(1)
        ROOT %c = f32[4,6] fusion(%a, %b), kind=kOutput, calls=%outer
    """
    assert flops_of(entry, inner, outer) == 240


def test_splash_forward_without_a_mask_is_two_products_over_all_keys():
    assert kernel_of(splash("splash_mha_fwd_segmented", FORWARD, metadata=BLOCKS)) == 2 * PRODUCT


def test_splash_with_a_causal_mask_computes_the_blocks_on_and_below_the_diagonal():
    assert kernel_of(splash("splash_mha_fwd", FORWARD, has_positions=True, metadata=BLOCKS)) == 2 * PRODUCT * 10 / 16


def test_a_window_that_shortens_the_grid_shortens_the_work():
    kernel = splash("splash_mha_fwd", FORWARD, table="s8[1,4,2]", has_positions=True, metadata=BLOCKS)
    assert kernel_of(kernel) == 2 * PRODUCT * 8 / 16


@pytest.mark.parametrize(
    "name, outputs, products",
    [
        ("dq", "bf16[8,2048,128]", 3),
        ("dkv", "f32[512,128], f32[512,128], bf16[2,2048,128], bf16[2,2048,128]", 4),
        ("dkv", "f32[512,128], bf16[4,8,2048,128], bf16[2,2048,128], bf16[2,2048,128]", 5),
    ],
)
def test_splash_backward_has_three_products_for_dq_four_for_dkv_five_when_fused(name, outputs, products):
    blocks = {f"block_q_{name}": 512, f"block_kv_{name}": 512}
    kernel = splash(f"splash_mha_{name}_segmented", outputs, metadata=blocks)
    assert kernel_of(kernel) == products * PRODUCT


def test_other_kernels_have_what_their_author_estimated():
    kernel = """
        %x = bf16[64,32] parameter(0)
        ROOT %gmm = bf16[64,16] custom-call(%x), custom_call_target="tpu_custom_call", backend_config={"flops":"65536"}
    """
    assert kernel_of(kernel) == 65536
    assert kernel_of(kernel.replace('"flops"', '"other"')) is None


def test_a_kernel_on_whole_numbers_has_no_products():
    kernel = """
        %x = s32[8] parameter(0)
        ROOT %metadata = (s32[9], s32[15]) custom-call(%x), custom_call_target="tpu_custom_call"
    """
    assert kernel_of(kernel) == 0
