import pytest

from grit_jax.plan.cost import HOST_BANDWIDTH, KERNEL_EFFICIENCY, estimate
from grit_jax.plan.topology import parse_topology
from tests.plan.programs import CYCLES, LINK, LOOP_BODY_OF_WORK, V5E, cost, counted_loop, cycles, module

WORK = f"f32[8] fusion(%p), kind=kLoop, calls=%work, {cycles(3000)}"
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
    total = cost(f"{PARAMETER}\n%a = {WORK}\nROOT %b = {WORK}", LOOP_BODY_OF_WORK)
    assert total.total_seconds == total.compute_seconds == pytest.approx(2 * SECONDS)
    assert total.exposed_seconds == 0


def test_trips_of_nested_loops_multiply():
    inner = counted_loop("inner", 3, f"%a = {WORK}")
    dot = "%d = f32[8,8] dot(%p, %p), lhs_contracting_dims={}, rhs_contracting_dims={}"
    loop = "%w = (s32[], f32[8]) while(%s), condition=%inner_cond, body=%inner_body"
    outer = counted_loop("outer", 5, f"{loop}\n%b = {WORK}\n{dot}")
    entry = "ROOT %w = (s32[], f32[8]) while(%t), condition=%outer_cond, body=%outer_body"
    total = cost(entry, LOOP_BODY_OF_WORK, *inner, *outer)
    assert total.compute_seconds == pytest.approx(5 * (3 + 1) * SECONDS)
    assert total.matmul_flops == 5 * 2 * 64
    assert total.unknown_loops == 0


def test_a_loop_of_unknown_trips_is_counted_once_and_told():
    condition, body = counted_loop("l", 4, f"%a = {WORK}")
    condition = condition.replace("constant(4)", "get-tuple-element(%s), index=0")
    total = cost(
        "ROOT %w = (s32[], f32[8]) while(%t), condition=%l_cond, body=%l_body", LOOP_BODY_OF_WORK, condition, body
    )
    assert total.compute_seconds == pytest.approx(SECONDS)
    assert total.unknown_loops == 1


def test_a_conditional_takes_its_longest_branch():
    def branch(name, count):
        return f"%{name} (p: f32[8]) -> f32[8] {{\n  {PARAMETER}\n  ROOT %n = f32[8] negate(%p), {cycles(count)}\n}}"

    entry = f"{PARAMETER}\nROOT %c = f32[8] conditional(%p, %p, %p), branch_computations={{%small, %large}}"
    total = cost(entry, branch("small", 10), branch("large", 3000))
    assert total.total_seconds == pytest.approx(SECONDS)


@pytest.mark.parametrize("num_bytes, exposed", [(HALF, 0), (DOUBLE, SECONDS)])
def test_a_transfer_hides_behind_the_work_between_its_start_and_its_end(num_bytes, exposed):
    total = cost(f"{PARAMETER}{permute(num_bytes)}\n%a = {WORK}\nROOT {DONE}", LOOP_BODY_OF_WORK)
    assert total.exposed_seconds == pytest.approx(exposed, abs=1e-12)
    assert total.total_seconds == pytest.approx(SECONDS + exposed)
    assert total.ici_seconds == pytest.approx(num_bytes / LINK)
    (row,) = total.collectives
    assert (row.opcode, row.network, row.overlapped, row.count) == ("collective-permute", "ici", True, 1)


def test_work_after_the_end_hides_nothing():
    total = cost(f"{PARAMETER}{permute(HALF)}\n{DONE}\nROOT %a = {WORK}", LOOP_BODY_OF_WORK)
    assert total.exposed_seconds == pytest.approx(SECONDS / 2)


def test_transfers_on_one_network_follow_one_another():
    both = permute(HALF) + permute(HALF).replace("%sent", "%more").replace("%start", "%again")
    total = cost(f"{PARAMETER}{both}\n{DONE}\nROOT %last = f32[8] collective-permute-done(%again)")
    assert total.exposed_seconds == pytest.approx(SECONDS)


def test_a_collective_without_start_and_end_is_exposed():
    entry = f"{PARAMETER}\n%a = {WORK}\nROOT %c = f32[8] all-reduce(%p), replica_groups=[1,8]<=[8]"
    total = cost(entry, LOOP_BODY_OF_WORK)
    assert total.exposed_seconds == pytest.approx(2 * 32 * 7 / 8 / (4 * LINK))
    (row,) = total.collectives
    assert not row.overlapped
    assert row.exposed_seconds == pytest.approx(row.seconds)


def test_a_transfer_that_the_next_iteration_awaits_hides_behind_the_iteration():
    entry = "ROOT %w = (s32[], f32[8]) while(%t), condition=%l_cond, body=%l_body"
    for num_bytes, exposed in ((HALF, 0), (DOUBLE, SECONDS)):
        loop = counted_loop("l", 10, f"%old = f32[8] collective-permute-done(%p)\n%a = {WORK}\n{permute(num_bytes)}")
        total = cost(entry, LOOP_BODY_OF_WORK, *loop)
        assert total.exposed_seconds == pytest.approx(10 * exposed, abs=1e-12)
        assert total.collectives[0].count == 10


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
GATHER = 4 * 8 * DOUBLE * 7 / 8 / (4 * LINK)


def test_a_collective_spread_over_fusions_hides_behind_those_that_carry_it_on():
    entry = f"{PARAMETER}\n{START}\n{CARRY}, {cycles(3000)}\n%a = {WORK}\nROOT {END}"
    total = cost(entry, LOOP_BODY_OF_WORK, *SPREAD)
    assert total.exposed_seconds == pytest.approx(GATHER - SECONDS)
    assert total.compute_seconds == pytest.approx(2 * SECONDS)
    assert [(row.opcode, row.count, row.overlapped) for row in total.collectives] == [("all-gather", 1, True)]


def test_fusions_in_a_nested_loop_carry_on_what_was_started_outside():
    entry = f"{PARAMETER}\n{START}\n%w = (s32[], f32[8]) while(%t), condition=%l_cond, body=%l_body\nROOT {END}"
    total = cost(entry, *SPREAD, *counted_loop("l", 5, f"{CARRY}, {cycles(3000)}"))
    assert total.exposed_seconds == pytest.approx(GATHER - 5 * SECONDS)
    assert total.collectives[0].count == 1


def test_a_collective_inside_one_fusion_hides_behind_that_fusions_work_alone():
    entry = f"{PARAMETER}\n%a = {WORK}\nROOT {CARRY}, {cycles(3000)}"
    total = cost(entry, LOOP_BODY_OF_WORK, spread(""))
    assert total.exposed_seconds == pytest.approx(GATHER - SECONDS)
    assert not total.collectives[0].overlapped


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
    total = cost(entry, LOOP_BODY_OF_WORK, topology=topology)
    seconds = 4 * 8192 / topology.chip.dcn_bandwidth
    assert (total.dcn_seconds, total.ici_seconds) == (pytest.approx(seconds), 0)
    assert total.exposed_seconds == pytest.approx(seconds - SECONDS)


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
    total = cost(entry, LOOP_BODY_OF_WORK)
    assert [(row.opcode, row.network, row.count) for row in total.collectives] == [("copy", "host", 1)]
    assert total.host_seconds == pytest.approx(4 * 8192 / HOST_BANDWIDTH)
    assert total.exposed_seconds == pytest.approx(4 * 8192 / HOST_BANDWIDTH - SECONDS)
    assert total.hbm_bytes == 4 * 8192 + 2 * 8 * 4  # the layer, and what the work reads and writes


def test_attention_takes_its_products_at_the_assumed_efficiency():
    entry = """
        %q = bf16[8,2048,128]{2,1,0:S(1)} parameter(0)
        ROOT %splash_mha_fwd.1 = bf16[8,2048,128]{2,1,0:S(1)} custom-call(%q, %q), custom_call_target="tpu_custom_call"
    """
    total = cost(entry)
    flops = 2 * 2 * 8 * 2048 * 2048 * 128
    assert total.kernel_flops == flops
    assert total.attention_seconds == pytest.approx(flops / (V5E.chip.peak_flops * KERNEL_EFFICIENCY))
    assert total.matmul_flops == total.kernel_seconds == 0


def test_an_unknown_kernel_takes_its_traffic_and_is_told():
    entry = 'ROOT %mine = bf16[8192] custom-call(%p), custom_call_target="tpu_custom_call"'
    total = cost(f"%p = bf16[8192] parameter(0)\n{entry}")
    assert total.unknown_kernels == ("mine",)
    assert total.kernel_seconds == total.hbm_seconds == pytest.approx(2 * 2 * 8192 / V5E.chip.hbm_bandwidth)


def test_the_total_is_work_and_what_is_waited_for():
    entry = f"{PARAMETER}{permute(DOUBLE)}\n%a = {WORK}\n{DONE}\nROOT %r = f32[8] all-reduce(%p)"
    total = cost(entry, LOOP_BODY_OF_WORK)
    parts = (total.compute_seconds, total.attention_seconds, total.kernel_seconds, total.exposed_seconds)
    assert total.total_seconds == pytest.approx(sum(parts))
    assert sum(row.exposed_seconds for row in total.collectives) == pytest.approx(total.exposed_seconds)


def test_grouped_products_count_the_rows_that_hold_tokens():
    kernel = (
        'ROOT %gmm.1 = f32[8]{0} custom-call(%p), custom_call_target="tpu_custom_call", '
        'backend_config={"custom_call_config":{"cost_estimate":{"flops":"4000000000"}}}'
    )
    program = module(f"{PARAMETER}\n{kernel}")
    whole, quarter = (estimate(program, V5E, expert_fill=fill) for fill in (1.0, 0.25))
    assert whole.kernel_flops == 4_000_000_000
    assert quarter.kernel_flops == 1_000_000_000
    assert quarter.kernel_seconds == pytest.approx(whole.kernel_seconds / 4)
