import pytest

from grit_jax.plan.collectives import slice_transfer, transfer
from grit_jax.plan.hlo import parse_module
from grit_jax.plan.topology import parse_topology
from tests.plan.programs import LINK, V5E, module

PAIRS = "source_target_pairs={{0,1},{1,0}}"
MEBIBYTE = 1 << 20


def price(opcode, shape="bf16[524288]", attributes="replica_groups=[2,4]<=[8]", topology=V5E):
    parsed = parse_module(module(f"%p = {shape} parameter(0)\nROOT %c = {shape} {opcode}(%p), {attributes}"))
    return transfer(parsed.entry, parsed.entry.root, topology)


@pytest.mark.parametrize(
    "opcode, num_bytes, carried",
    [
        ("all-gather", 4 * MEBIBYTE, 3 * MEBIBYTE),
        ("all-gather-start", 4 * MEBIBYTE, 3 * MEBIBYTE),
        ("reduce-scatter", MEBIBYTE, 0.75 * MEBIBYTE),
        ("all-reduce", MEBIBYTE, 1.5 * MEBIBYTE),
        ("all-to-all", MEBIBYTE, 0.75 / 4 * MEBIBYTE),
    ],
)
def test_a_group_of_four_carries_three_quarters_along_one_axis(opcode, num_bytes, carried):
    moved = price(opcode)
    assert (moved.opcode, moved.network, moved.num_bytes) == (opcode.removesuffix("-start"), "ici", num_bytes)
    assert moved.seconds == pytest.approx(carried / LINK)


# What XLA:TPU writes beside a collective.
STRATEGIES = {
    "one ring": '"debug":"\\nStrategyRing{colors:1 phases:1 cores:{4}}\\nType: 1D phase_count: 1',
    "two axes": '"strategy":"StrategyND","debug":"\\nStrategyND{colors:2 phases:2 num_dims:2 dim_sizes:4,4}',
    "three axes": '"emitter":"3DAllGatherOnMajorDim","debug":"',
    "sparse cores": ",".join(f'"ring_dim":"ICI_RING_DIM_{axis}_TORUS"' for axis in "XYXY"),
    "nothing": "",
}


@pytest.mark.parametrize(
    "topology, size, strategy, links",
    [
        ("v5p-128", 64, "three axes", 6),
        ("v5p-128", 16, "three axes", 6),
        ("v5p-128", 64, "two axes", 4),
        ("v5p-128", 64, "sparse cores", 4),
        ("v5p-128", 64, "one ring", 2),
        ("v5p-128", 64, "nothing", 6),
        ("v5p-128", 16, "nothing", 4),
        ("v5p-128", 4, "nothing", 2),
        ("v5p-32", 16, "nothing", 3),  # 2 x 2 x 4: no axis is a ring
        ("v5e-256", 256, "two axes", 4),
        ("v5e-128", 128, "two axes", 3),  # 8 x 16: only the whole pod's side is a ring
        ("v6e-64", 64, "nothing", 2),
    ],
)
def test_a_collective_uses_the_links_along_the_axes_that_the_program_names(topology, size, strategy, links):
    topology = parse_topology(topology)
    groups = f"replica_groups=[{topology.num_chips // size},{size}]<=[{topology.num_chips}]"
    moved = price("reduce-scatter", attributes=f"{groups}, {STRATEGIES[strategy]}", topology=topology)
    assert moved.seconds == pytest.approx(MEBIBYTE * (size - 1) / size / (links * topology.chip.ici_bandwidth))


def test_a_permute_uses_one_link_in_one_direction():
    assert price("collective-permute-start", attributes=PAIRS).seconds == pytest.approx(MEBIBYTE / LINK)


def test_a_group_of_one_moves_nothing():
    assert price("all-reduce", attributes="replica_groups=[8,1]<=[8]").seconds == 0


def test_a_reduction_that_is_sliced_at_once_is_a_reduce_scatter():
    entry = """
        %p = bf16[524288] parameter(0)
        %i = s32[] parameter(1)
        %c = (bf16[524288], bf16[524288]) all-reduce(%p, %p), replica_groups=[2,4]<=[8]
        %first = bf16[524288] get-tuple-element(%c), index=0
        %part = bf16[131072] dynamic-slice(%first, %i)
        %second = bf16[524288] get-tuple-element(%c), index=1
        ROOT %other = bf16[131072] dynamic-slice(%second, %i)
    """
    for text, kind in (
        (entry, "reduce-scatter"),
        (entry.replace("dynamic-slice(%second, %i)", "add(%second)"), "all-reduce"),
    ):
        parsed = parse_module(module(text))
        assert transfer(parsed.entry, parsed.entry.instructions["c"], V5E).opcode == kind


@pytest.mark.parametrize(
    "kind, passes",
    [("ALL_REDUCE", 1.5), ("REDUCE_SCATTER", 0.75), ("ALL_TO_ALL", 0.75), ("ALL_GATHER", 3), ("ONE_TO_ONE", 1)],
)
def test_slices_exchange_over_the_data_centre_network(kind, passes):
    topology = parse_topology("v5e-8", slices=4)
    attributes = f'frontend_attributes={{_xla_megascale_transfer_type="{kind}"}}'
    entry = f"""
        %p = bf16[524288] parameter(0)
        %t = token[] after-all()
        ROOT %s = (bf16[524288], u32[], token[]) send(%p, %t), {attributes}
    """
    parsed = parse_module(module(entry))
    moved = slice_transfer(parsed.entry, parsed.entry.root, topology)
    assert (moved.opcode, moved.network) == (kind.lower().replace("_", "-"), "dcn")
    assert moved.seconds == pytest.approx(passes * MEBIBYTE / topology.chip.dcn_bandwidth)
