import pytest

from grit_jax.plan.cost import HBM_EFFICIENCY, KINDS, estimate
from grit_jax.plan.topology import parse_topology
from tests.plan.programs import BODY_OF_WORK, CYCLES, LINK, V5E, cost, counted_loop, cycles, module

WORK = f"f32[8,8] fusion(%p), kind=kOutput, calls=%work, {cycles(3000)}"
SECONDS = 3000 / CYCLES  # 2 microseconds
PARAMETER = "%p = f32[8] parameter(0)"


def permute(num_bytes):
    """The start of a permute, which takes num_bytes / LINK seconds."""
    shape = f"f32[{num_bytes // 4}]"
    return f"""
        %sent = {shape} parameter(1)
        %start = ({shape}, {shape}, u32[], u32[]) collective-permute-start(%sent), source_target_pairs={{{{0,1}}}}
    """


DONE = "%done = f32[8] collective-permute-done(%start)"
HALF, DOUBLE = int(SECONDS * LINK / 2), int(SECONDS * LINK * 2)  # bytes that a link carries in half and twice the work


def test_instructions_take_their_estimated_cycles():
    total = cost(f"{PARAMETER}\n%a = {WORK}\nROOT %b = {WORK}", BODY_OF_WORK)
    assert total.total_seconds == total.seconds["products"] == pytest.approx(2 * SECONDS)
    assert total.seconds["exposed"] == 0


def test_trips_of_nested_loops_multiply():
    inner = counted_loop("inner", 3, f"%a = {WORK}")
    dot = f"%d = f32[8,8] dot(%p, %p), lhs_contracting_dims={{}}, rhs_contracting_dims={{}}, {cycles(0)}"
    loop = "%w = (s32[], f32[8]) while(%s), condition=%inner_cond, body=%inner_body"
    outer = counted_loop("outer", 5, f"{loop}\n%b = {WORK}\n{dot}")
    entry = "ROOT %w = (s32[], f32[8]) while(%t), condition=%outer_cond, body=%outer_body"
    total = cost(entry, BODY_OF_WORK, *inner, *outer)
    assert total.seconds["products"] == pytest.approx(5 * (3 + 1) * SECONDS)
    assert total.matmul_flops == 5 * (3 + 1 + 1) * 2 * 64
    assert total.unknown_loops == 0


def test_a_loop_of_unknown_trips_is_counted_once_and_told():
    condition, body = counted_loop("l", 4, f"%a = {WORK}")
    condition = condition.replace("constant(4)", "get-tuple-element(%s), index=0")
    total = cost("ROOT %w = (s32[], f32[8]) while(%t), condition=%l_cond, body=%l_body", BODY_OF_WORK, condition, body)
    assert total.seconds["products"] == pytest.approx(SECONDS)
    assert total.unknown_loops == 1


def test_a_conditional_takes_its_longest_branch():
    def branch(name, count):
        work = f"f32[8,8] dot(%p, %p), lhs_contracting_dims={{}}, rhs_contracting_dims={{}}, {cycles(count)}"
        return f"%{name} (p: f32[8]) -> f32[8] {{\n  {PARAMETER}\n  ROOT %n = {work}\n}}"

    entry = f"{PARAMETER}\nROOT %c = f32[8] conditional(%p, %p, %p), branch_computations={{%small, %large}}"
    total = cost(entry, branch("small", 10), branch("large", 3000))
    assert total.total_seconds == pytest.approx(SECONDS)


@pytest.mark.parametrize("num_bytes, exposed", [(HALF, 0), (DOUBLE, SECONDS)])
def test_a_transfer_hides_behind_the_work_between_its_start_and_its_end(num_bytes, exposed):
    total = cost(f"{PARAMETER}{permute(num_bytes)}\n%a = {WORK}\nROOT {DONE}", BODY_OF_WORK)
    assert total.seconds["exposed"] == pytest.approx(exposed, abs=1e-12)
    assert total.total_seconds == pytest.approx(SECONDS + exposed)
    assert total.ici_seconds == pytest.approx(num_bytes / LINK)
    (row,) = total.transfers
    assert (row.opcode, row.network, row.overlapped, row.count) == ("collective-permute", "ici", True, 1)


def test_work_after_the_end_hides_nothing():
    total = cost(f"{PARAMETER}{permute(HALF)}\n{DONE}\nROOT %a = {WORK}", BODY_OF_WORK)
    assert total.seconds["exposed"] == pytest.approx(SECONDS / 2)


def test_transfers_on_one_network_follow_one_another():
    both = permute(HALF) + permute(HALF).replace("%sent", "%more").replace("%start", "%again")
    total = cost(f"{PARAMETER}{both}\n{DONE}\nROOT %last = f32[8] collective-permute-done(%again)")
    assert total.seconds["exposed"] == pytest.approx(SECONDS)


def test_a_collective_without_start_and_end_is_exposed():
    entry = f"{PARAMETER}\n%a = {WORK}\nROOT %c = f32[8] all-reduce(%p), replica_groups=[1,8]<=[8]"
    total = cost(entry, BODY_OF_WORK)
    assert total.seconds["exposed"] == pytest.approx(2 * 32 * 7 / 8 / (2 * LINK))
    (row,) = total.transfers
    assert not row.overlapped
    assert row.exposed_seconds == pytest.approx(row.seconds)


def test_a_transfer_that_the_next_iteration_awaits_hides_behind_the_iteration():
    entry = "ROOT %w = (s32[], f32[8]) while(%t), condition=%l_cond, body=%l_body"
    for num_bytes, exposed in ((HALF, 0), (DOUBLE, SECONDS)):
        loop = counted_loop("l", 10, f"%old = f32[8] collective-permute-done(%p)\n%a = {WORK}\n{permute(num_bytes)}")
        total = cost(entry, BODY_OF_WORK, *loop)
        assert total.seconds["exposed"] == pytest.approx(10 * exposed, abs=1e-12)
        assert total.transfers[0].count == 10


def spread(role):
    """The inside of a fusion that starts, carries on or ends the collective of channel 7."""
    end = f', custom_call_target="{role}"' if role else ""
    opcode = "custom-call" if role else "add"
    return f"""
        %spread{role} (p: f32[{DOUBLE}]) -> f32[{DOUBLE}] {{
          %p = f32[{DOUBLE}] parameter(0)
          %c = f32[{8 * DOUBLE}] all-gather(%p), channel_id=7, replica_groups=[1,8]<=[8]
          ROOT %r = f32[{DOUBLE}] {opcode}(%c){end}
        }}
    """


START, CARRY, END = (
    f"%{name} = f32[8] fusion(%p), kind=kCustom, calls=%spread{role}"
    for name, role in (("s", "AsyncCollectiveStart"), ("c", ""), ("e", "AsyncCollectiveDone"))
)
SPREAD = [spread(role) for role in ("AsyncCollectiveStart", "", "AsyncCollectiveDone")]
GATHER = 4 * 8 * DOUBLE * 7 / 8 / (2 * LINK)


def test_a_collective_spread_over_fusions_hides_behind_those_that_carry_it_on():
    entry = f"{PARAMETER}\n{START}\n{CARRY}, {cycles(1500)}\n%a = {WORK}\nROOT {END}"
    total = cost(entry, BODY_OF_WORK, *SPREAD)
    assert total.seconds["exposed"] == pytest.approx(GATHER - SECONDS / 2)
    assert (total.seconds["products"], total.seconds["vector"]) == (pytest.approx(SECONDS), pytest.approx(SECONDS / 2))
    assert [(row.opcode, row.count, row.overlapped) for row in total.transfers] == [("all-gather", 1, True)]


def test_fusions_in_a_nested_loop_carry_on_what_was_started_outside():
    entry = f"{PARAMETER}\n{START}\n%w = (s32[], f32[8]) while(%t), condition=%l_cond, body=%l_body\nROOT {END}"
    total = cost(entry, *SPREAD, *counted_loop("l", 5, f"{CARRY}, {cycles(1500)}"))
    assert total.seconds["exposed"] == pytest.approx(GATHER - 5 * SECONDS / 2)
    assert total.transfers[0].count == 1


def test_a_collective_inside_one_fusion_hides_behind_that_fusions_work_alone():
    entry = f"{PARAMETER}\n%a = {WORK}\nROOT {CARRY}, {cycles(1500)}"
    total = cost(entry, BODY_OF_WORK, spread(""))
    assert total.seconds["exposed"] == pytest.approx(GATHER - SECONDS / 2)
    assert not total.transfers[0].overlapped


def test_slices_wait_for_the_data_centre_network_and_not_for_the_links():
    topology = parse_topology("v5e-8", slices=2)
    handler = '_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="r"'
    attributes = f'frontend_attributes={{{handler},_xla_megascale_transfer_type="ALL_REDUCE"}}'
    entry = f"""
        %p = f32[8192] parameter(0)
        %t = token[] after-all()
        %s = (f32[8192], u32[], token[]) send(%p, %t), {attributes}
        %r = (f32[8192], u32[], token[]) recv(%t), {attributes}
        %a = {WORK}
        %sd = token[] send-done(%s)
        %rd = (f32[8192], token[]) recv-done(%r)
        ROOT %b = {WORK}
    """
    total = cost(entry, BODY_OF_WORK, topology=topology)
    seconds = 4 * 8192 / topology.chip.dcn_bandwidth
    assert (total.dcn_seconds, total.ici_seconds) == (pytest.approx(seconds), 0)
    assert total.seconds["exposed"] == pytest.approx(seconds - SECONDS)


def test_copies_to_the_hosts_memory_use_its_bus_and_overlap():
    stack, layer = "f32[4,8192]{1,0:S(5)}", "f32[1,8192]{1,0}"
    entry = f"""
        %p = {layer} parameter(0)
        %stack = {stack} parameter(1)
        %i = s32[] parameter(2)
        %c = (({stack}, {layer}, s32[], s32[]), {stack}, u32[]) dynamic-update-slice-start(%stack, %p, %i, %i)
        %a = {WORK}
        %d = {stack} dynamic-update-slice-done(%c)
        ROOT %t = ({stack}, {layer}) tuple(%d, %p)
    """
    total = cost(entry, BODY_OF_WORK)
    assert [(row.opcode, row.network, row.count) for row in total.transfers] == [("copy", "host", 1)]
    assert total.host_seconds == pytest.approx(4 * 8192 / V5E.chip.host_bandwidth)
    assert total.seconds["exposed"] == pytest.approx(4 * 8192 / V5E.chip.host_bandwidth - SECONDS)
    assert total.hbm_bytes == 4 * 8192 + (8 + 64) * 4  # the layer, and what the work reads and writes


def test_an_unknown_kernel_takes_its_traffic_and_is_told():
    entry = 'ROOT %mine = bf16[8192] custom-call(%p), custom_call_target="tpu_custom_call"'
    total = cost(f"%p = bf16[8192] parameter(0)\n{entry}")
    assert total.unknown_kernels == ("mine",)
    assert total.hbm_seconds == pytest.approx(2 * 2 * 8192 / V5E.chip.hbm_bandwidth)
    assert total.seconds["kernels"] == total.total_seconds == pytest.approx(total.hbm_seconds / HBM_EFFICIENCY)


# Elementwise work, and a copy: 8 MiB of HBM read and as much written.
LARGE = "f32[2048,1024]"
NEGATION = f"""
    %negation (x: {LARGE}) -> {LARGE} {{
      %x = {LARGE} parameter(0)
      ROOT %y = {LARGE} negate(%x)
    }}
"""
GATHERED = """
    %gathered (x: f32[2048,1024], i: s32[2048]) -> f32[2048,1024] {
      %x = f32[2048,1024] parameter(0)
      %i = s32[2048] parameter(1)
      ROOT %y = f32[2048,1024] gather(%x, %i), offset_dims={1}
    }
"""
MEMORY = 2 * 4 * 2048 * 1024 / (HBM_EFFICIENCY * V5E.chip.hbm_bandwidth)


def kind_and_seconds(instruction, *others):
    """The only kind of work in a program of one instruction, and its seconds."""
    entry = f"%p = {LARGE} parameter(0)\n%i = s32[2048] parameter(1)\n%n = {LARGE}{{1,0:S(1)}} parameter(2)"
    total = cost(f"{entry}\nROOT %r = {instruction}", *others)
    ((kind, seconds),) = [item for item in total.seconds.items() if item[1]]
    assert seconds == total.total_seconds
    return kind, seconds


@pytest.mark.parametrize(
    "instruction, body, kind",
    [
        (f"{LARGE} fusion(%p), kind=kLoop, calls=%negation", NEGATION, "vector"),
        (f"{LARGE} fusion(%p), kind=kLoop, calls=%negation", NEGATION.replace("negate", "copy"), "copies"),
        (f"{LARGE} copy(%p)", "", "copies"),
    ],
    ids=["fusion", "fused copy", "copy"],
)
def test_vector_work_and_copies_take_their_traffic_however_long_the_compiler_says(instruction, body, kind):
    slow, fast = int(10 * MEMORY * CYCLES), int(MEMORY * CYCLES / 2)
    assert kind_and_seconds(f"{instruction}, {cycles(slow)}", body) == (kind, pytest.approx(MEMORY))
    assert kind_and_seconds(f"{instruction}, {cycles(fast)}", body) == (kind, pytest.approx(MEMORY / 2, rel=1e-4))


def test_what_depends_on_the_data_where_it_reads_takes_the_compilers_cycles():
    slow = int(10 * MEMORY * CYCLES)
    gather = f"{LARGE} fusion(%p, %i), kind=kLoop, calls=%gathered, {cycles(slow)}"
    assert kind_and_seconds(gather, GATHERED) == ("copies", pytest.approx(10 * MEMORY, rel=1e-4))


def test_what_the_compiler_gives_no_cycles_takes_its_traffic():
    gather = f"{LARGE} fusion(%p, %i), kind=kCustom, calls=%gathered"
    kind, seconds = kind_and_seconds(gather, GATHERED)
    assert (kind, seconds) == ("copies", pytest.approx(MEMORY, rel=1e-2))  # and the indices


def test_work_mostly_in_vector_memory_takes_the_compilers_cycles():
    slow = cycles(int(10 * MEMORY * CYCLES))
    inside = f"{LARGE}{{1,0:S(1)}} negate(%n), {slow}"
    assert kind_and_seconds(inside) == ("vector", pytest.approx(10 * MEMORY, rel=1e-4))
    outward = f"{LARGE} negate(%n), {slow}"  # as much in HBM
    assert kind_and_seconds(outward) == ("vector", pytest.approx(MEMORY / 2))


def test_a_prefetch_takes_no_time_of_its_own():
    near = f"{LARGE}{{1,0:S(1)}}"
    start = f"%s = ({near}, {LARGE}, u32[]) copy-start(%p)"
    total = cost(f"%p = {LARGE} parameter(0)\n{start}\nROOT %d = {near} copy-done(%s)")
    assert total.total_seconds == 0
    assert total.hbm_bytes == 4 * 2048 * 1024


SPARSE_CORE = f"""
    %offloaded (p: f32[{DOUBLE}], t: token[]) -> f32[{DOUBLE}] {{
      %t = token[] parameter(1)
      %p = f32[{DOUBLE}] parameter(0)
      ROOT %c = f32[{DOUBLE}] all-reduce(%p), channel_id=6, replica_groups=[1,8]<=[8]
    }}, execution_thread="sparsecore"
"""


def test_a_collective_on_another_thread_is_in_the_table_and_hides_behind_work():
    start = (
        f"%s = ((f32[{DOUBLE}], token[]), f32[{DOUBLE}]) call-start(%big, %t), "
        'async_execution_thread="sparsecore", to_apply=%offloaded'
    )
    end = f"ROOT %d = f32[{DOUBLE}] call-done(%s)"
    parameters = f"{PARAMETER}\n%big = f32[{DOUBLE}] parameter(1)\n%t = token[] after-all()"
    total = cost(f"{parameters}\n{start}\n%a = {WORK}\n{end}", BODY_OF_WORK, SPARSE_CORE)
    (row,) = total.transfers
    seconds = 2 * 4 * DOUBLE * 7 / 8 / (2 * LINK)
    assert (row.opcode, row.overlapped, row.num_bytes) == ("all-reduce", True, 4 * DOUBLE)
    assert row.seconds == pytest.approx(seconds)
    assert total.seconds["exposed"] == pytest.approx(seconds - SECONDS)


def test_transfers_of_different_source_lines_are_counted_apart():
    frames = """FileNames
1 "/somewhere/grit_jax/model/layers.py"
2 "/env/lib/site-packages/optax/update.py"

FileLocations
1 {file_name_id=1 function_name_id=1 line=57 end_line=57 column=41 end_column=41}
2 {file_name_id=2 function_name_id=1 line=9 end_line=9 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=1}

"""
    gathers = [
        f'%c{n} = f32[8] all-reduce(%p), replica_groups=[1,8]<=[8], metadata={{op_name="x" stack_frame_id={frame}}}'
        for n, frame in enumerate((1, 1, 2))
    ]
    # The compiler's own collective has no line but that of what it takes.
    program = module("\n".join([PARAMETER, *gathers, "ROOT %own = f32[8] all-reduce(%c2), replica_groups=[1,8]<=[8]"]))
    total = estimate(program.replace("is_scheduled=true\n", f"is_scheduled=true\n\n{frames}", 1), V5E)
    counted = {row.source: row.count for row in total.transfers}
    assert counted == {"grit_jax/model/layers.py:57": 2, "optax/update.py:9": 2}


def test_the_total_is_the_sum_of_its_kinds_and_the_transfers_make_up_what_is_exposed():
    entry = f"{PARAMETER}{permute(DOUBLE)}\n%a = {WORK}\n{DONE}\nROOT %r = f32[8] all-reduce(%p)"
    total = cost(entry, BODY_OF_WORK)
    assert tuple(total.seconds) == KINDS
    assert total.total_seconds == pytest.approx(SECONDS + total.seconds["exposed"])
    assert sum(row.exposed_seconds for row in total.transfers) == pytest.approx(total.seconds["exposed"])
