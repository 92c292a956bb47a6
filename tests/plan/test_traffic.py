import pytest

from grit_jax.plan.hlo import HBM, VMEM, parse_module
from grit_jax.plan.traffic import only_moves, traffic
from tests.plan.programs import module

# A layer of a stack [4, 256] f32, of 1024 bytes.
SLICED = """
    %sliced (stack: f32[4,256], i: s32[]) -> f32[256] {
      %stack = f32[4,256] parameter(0)
      %i = s32[] parameter(1)
      %zero = s32[] constant(0)
      %layer = f32[1,256] dynamic-slice(%stack, %i, %zero), dynamic_slice_sizes={1,256}
      ROOT %flat = f32[256] bitcast(%layer)
    }
"""
UPDATED = """
    %updated (stack: f32[4,256], layer: f32[1,256], i: s32[]) -> f32[4,256] {
      %stack = f32[4,256] parameter(0)
      %layer = f32[1,256] parameter(1)
      %i = s32[] parameter(2)
      %zero = s32[] constant(0)
      ROOT %new = f32[4,256] dynamic-update-slice(%stack, %layer, %i, %zero)
    }
"""
SUM = """
    %sum (x: f32[4,256], y: f32[4,256]) -> f32[4,256] {
      %x = f32[4,256] parameter(0)
      %y = f32[4,256]{1,0:T(8,128)S(1)} parameter(1)
      ROOT %z = f32[4,256] add(%x, %y)
    }
"""
NESTED = """
    %nested (stack: f32[4,256], i: s32[]) -> f32[256] {
      %stack = f32[4,256] parameter(0)
      %i = s32[] parameter(1)
      ROOT %layer = f32[256] fusion(%stack, %i), kind=kLoop, calls=%sliced
    }
"""
STACK, LAYER, INDEX = 4096, 1024, 4


def parsed(instruction, *others):
    entry = f"""
        %stack = f32[4,256] parameter(0)
        %layer = f32[1,256] parameter(1)
        %i = s32[] parameter(2)
        %near = f32[4,256]{{1,0:T(8,128)S(1)}} parameter(3)
        ROOT %r = {instruction}
    """
    return parse_module(module(entry, *others))


def touched(instruction, *others, space=HBM):
    program = parsed(instruction, *others)
    return traffic(program, program.entry, program.entry.root, space)


@pytest.mark.parametrize(
    "instruction, others, expected",
    [
        ("f32[4,256] add(%stack, %stack)", (), 3 * STACK),
        ("f32[4,256] fusion(%stack, %near), kind=kLoop, calls=%sum", (SUM,), 2 * STACK),
        ("f32[256] fusion(%stack, %i), kind=kLoop, calls=%sliced", (SLICED,), 2 * LAYER),
        ("f32[256] fusion(%stack, %i), kind=kLoop, calls=%nested", (NESTED, SLICED), 2 * LAYER),
        ("f32[4,256] fusion(%stack, %layer, %i), kind=kLoop, calls=%updated", (UPDATED,), 2 * LAYER),
        ("f32[1,256] dynamic-slice(%stack, %i, %i)", (), 2 * LAYER),
        ("f32[4,256] dynamic-update-slice(%stack, %layer, %i, %i)", (), 2 * LAYER),
        ("f32[4,256] bitcast(%stack)", (), 0),
        ('f32[4,256] custom-call(), custom_call_target="AllocateBuffer"', (), 0),
    ],
    ids=["whole", "vmem", "slice", "nested", "update", "bare slice", "bare update", "bitcast", "marker"],
)
def test_traffic_is_what_an_instruction_touches_in_hbm(instruction, others, expected):
    index = INDEX if "%i)" in instruction and others else 0  # a fusion's index is an operand that it reads whole
    assert abs(touched(instruction, *others) - expected) <= index


def test_a_prefetch_reads_hbm_and_an_eviction_writes_it_once():
    near, far = "f32[4,256]{1,0:T(8,128)S(1)}", "f32[4,256]{1,0:T(8,128)}"
    assert touched(f"({near}, {far}, u32[]{{:S(2)}}) copy-start(%stack)") == STACK
    assert touched(f"({far}, {near}, u32[]{{:S(2)}}) copy-start(%near)") == STACK
    layer = "f32[1,256]{1,0:T(8,128)S(1)}"
    assert touched(f"(({far}), {layer}, s32[]{{:S(2)}}) slice-start(%stack)") == LAYER


def test_an_array_counts_as_the_tiles_that_hold_it():
    rows, row = "f32[4,256]{1,0:T(8,128)}", "f32[4,1]{1,0:T(8,128)}"
    assert touched(f"{rows} negate(%stack)") == STACK + 2 * STACK  # 8 rows, of which 4 are in use
    sliced = SLICED.replace("f32[1,256] dynamic", f"{row} dynamic").replace("f32[256] bitcast", f"{row} bitcast")
    # A column is read as the whole column of tiles.
    assert touched(f"{row} fusion(%stack, %i), kind=kLoop, calls=%sliced", sliced) == pytest.approx(
        2 * 4 * 8 * 128, abs=INDEX
    )


def test_each_memory_has_its_own_traffic():
    instruction = "f32[4,256] fusion(%stack, %near), kind=kLoop, calls=%sum"
    assert [touched(instruction, SUM, space=space) for space in (HBM, VMEM)] == [2 * STACK, 2 * STACK]


@pytest.mark.parametrize(
    "instruction, others, moves",
    [
        ("f32[256] fusion(%stack, %i), kind=kLoop, calls=%nested", (NESTED, SLICED), True),
        ("f32[4,256] fusion(%stack, %layer, %i), kind=kLoop, calls=%updated", (UPDATED,), True),
        ("f32[256,4] transpose(%stack), dimensions={1,0}", (), True),
        ("f32[4,256] fusion(%stack, %near), kind=kLoop, calls=%sum", (SUM,), False),
        ("bf16[4,256] convert(%stack)", (), False),
    ],
)
def test_slices_updates_and_transposes_only_move(instruction, others, moves):
    program = parsed(instruction, *others)
    assert only_moves(program, program.entry.root) == moves
