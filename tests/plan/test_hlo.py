import pytest

from grit_jax.plan.hlo import (
    HBM,
    HOST,
    VMEM,
    Array,
    Instruction,
    parse_arrays,
    parse_module,
    replica_groups,
    trip_count,
)
from tests.plan.programs import BODY_OF_WORK, counted_loop, module


def loop_of(limit, step=1, attributes=""):
    loop = f"ROOT %w = (s32[], f32[8]) while(%t), condition=%l_cond, body=%l_body{attributes}"
    parsed = parse_module(module(loop, *counted_loop("l", limit, "", step)))
    return parsed, parsed.entry.root


def groups(attributes, num_devices=8):
    return replica_groups(
        Instruction("c", "all-gather", (), (), "", f", {attributes}, dimensions={{0}}", False), num_devices
    )


@pytest.mark.parametrize(
    "text, num_bytes",
    [
        ("f32[]", 4),
        ("bf16[3,5]{1,0:T(8,128)(2,1)}", 30),
        ("pred[7]", 7),
        ("s4[5]", 3),
        ("f8e4m3fn[6]", 6),
        ("u64[0]", 0),
    ],
)
def test_an_array_has_the_bytes_of_its_elements(text, num_bytes):
    assert parse_arrays(text)[0].num_bytes == num_bytes


def test_a_tuples_leaves_come_in_order_with_their_memory_spaces():
    text = "((bf16[2,8]{1,0:T(8,128)(2,1)S(1)}, f32[4]{0}), s32[]{:T(128)}, /*index=5*/f32[4]{0:S(5)})"
    spaces = (VMEM, HBM, HBM, HOST)
    dims = ((2, 8), (4,), (), (4,))
    dtypes = ("bf16", "f32", "s32", "f32")
    tiled = ((8, 128), (), (), ())
    assert parse_arrays(text) == tuple(map(Array, dtypes, dims, spaces, tiled))


@pytest.mark.parametrize(
    "text, num_bytes",
    [
        ("f32[4,256]{1,0:T(8,128)}", 4 * 8 * 256),
        ("f32[4,256]{0,1:T(8,128)}", 4 * 256 * 128),  # the first dim is innermost
        ("bf16[6,2048,64,64]{3,2,1,0:T(8,128)(2,1)}", 2 * 6 * 2048 * 64 * 128),
        ("s32[300]{0:T(1024)}", 4 * 1024),
        ("f32[4,256]{1,0}", 4 * 4 * 256),
        ("f32[]{:T(128)}", 4),
    ],
)
def test_an_array_is_stored_in_whole_tiles(text, num_bytes):
    assert parse_arrays(text)[0].stored_bytes == num_bytes


def test_attributes_over_several_lines_belong_to_one_instruction():
    text = module(
        """
        %p = f32[8]{0} parameter(0)
        %k = (f32[8]{0}, f32[4]{0}) custom-call(%p, /*index=1*/%p), custom_call_target="kernel", a={METADATA}, x=1
        ROOT %r = f32[8]{0} get-tuple-element(%k), index=0
        """
    ).replace("METADATA", '{\n"xprof_metadata":"{}"\n}')
    entry = parse_module(text).entry
    kernel = entry.instructions["k"]
    assert [instruction.name for instruction in entry] == ["p", "k", "r"]
    assert (kernel.operands, kernel.attribute("custom_call_target"), kernel.attribute("x")) == (
        ("p", "p"),
        "kernel",
        "1",
    )
    assert entry.root.name == "r"
    assert [user.name for user in entry.users["p"]] == ["k"]


def test_a_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        parse_module("stablehlo.add")


@pytest.mark.parametrize("limit, step, trips", [(7, 1, 7), (8, 2, 4), (7, 2, 4)])
def test_trips_are_the_conditions_limit_over_the_bodys_step(limit, step, trips):
    assert trip_count(*loop_of(limit, step)) == trips


def test_trips_that_the_compiler_knows_are_taken():
    attributes = ', backend_config={"known_trip_count":{"n":"5"}}'
    assert trip_count(*loop_of(9, attributes=attributes)) == 5


def test_a_loop_without_a_constant_limit_has_unknown_trips():
    condition, body = counted_loop("l", 4, "")
    condition = condition.replace("%n = s32[] constant(4)", "%n = s32[] get-tuple-element(%s), index=0")
    loop = "ROOT %w = (s32[], f32[8]) while(%t), condition=%l_cond, body=%l_body"
    parsed = parse_module(module(loop, condition, body))
    assert trip_count(parsed, parsed.entry.root) is None


@pytest.mark.parametrize(
    "text, expected",
    [
        ("replica_groups={{0,2},{1,3}}", [(0, 2), (1, 3)]),
        ("replica_groups=[2,4]<=[8]", [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ("replica_groups=mesh['x'=2,'y'=4] {'y'}", [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ("replica_groups=mesh['x'=2,'y'=4] {'x'}", [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ("replica_groups=mesh['x'=2,'y'=4] {'x','y'}", [tuple(range(8))]),
        ("replica_groups=mesh['x'=8] {'x':(2)2}", [(0, 2), (1, 3), (4, 6), (5, 7)]),
        ("replica_groups=mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'x'}", [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ("replica_groups=mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'y'}", [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ("replica_groups={}", [tuple(range(8))]),
        ("channel_id=1", [tuple(range(8))]),
    ],
)
def test_every_way_to_write_replica_groups_gives_the_devices(text, expected):
    assert groups(text) == expected


def test_replica_groups_in_an_unknown_form_are_refused():
    with pytest.raises(ValueError, match="replica groups in an unknown form"):
        groups("replica_groups=rings(4)")


def test_a_computation_of_another_processor_ends_where_it_says_so():
    text = module("ROOT %r = f32[8]{0} call(%p), to_apply=%beside", BODY_OF_WORK.replace("%work", "%beside"))
    text = text.replace("\n}\n\nENTRY", '\n}, execution_thread="sparsecore"\n\nENTRY')
    assert "sparsecore" in text
    assert set(parse_module(text).computations) == {"beside", "main"}
