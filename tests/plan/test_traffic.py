import pytest

from grit_jax.plan.hlo import parse_module
from grit_jax.plan.traffic import hbm_bytes
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


def traffic(instruction, *others):
    entry = f"""
        %stack = f32[4,256] parameter(0)
        %layer = f32[1,256] parameter(1)
        %i = s32[] parameter(2)
        %near = f32[4,256]{{1,0:T(8,128)S(1)}} parameter(3)
        ROOT %r = {instruction}
    """
    parsed = parse_module(module(entry, *others))
    return hbm_bytes(parsed, parsed.entry, parsed.entry.root)


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
    assert abs(traffic(instruction, *others) - expected) <= index


def test_a_prefetch_reads_hbm_and_an_eviction_writes_it_once():
    near, far = "f32[4,256]{1,0:T(8,128)S(1)}", "f32[4,256]{1,0:T(8,128)}"
    assert traffic(f"({near}, {far}, u32[]{{:S(2)}}) copy-start(%stack)") == STACK
    assert traffic(f"({far}, {near}, u32[]{{:S(2)}}) copy-start(%near)") == STACK
    layer = "f32[1,256]{1,0:T(8,128)S(1)}"
    assert traffic(f"(({far}), {layer}, s32[]{{:S(2)}}) slice-start(%stack)") == LAYER
