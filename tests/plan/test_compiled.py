"""The estimate of programs that libtpu compiles here."""

import importlib.util
import re
import sys

import pytest

from grit_jax.plan.cost import estimate
from grit_jax.plan.topology import devices, parse_topology

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")

LAYERS, CHUNKS, ROWS, WIDTH = 3, 2, 1024, 512


@pytest.fixture(scope="module")
def compiled():
    """Value and gradient of a rematerialised stack over chunks of rows, its weights split over 4 chips, as text."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,), devices=devices(parse_topology("v5e-4")))

    def struct(*shape, spec):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    def layer(x, weight):
        x = jax.lax.with_sharding_constraint(jnp.tanh(x @ weight), NamedSharding(mesh, PartitionSpec("fsdp")))
        return x, None

    def loss(weights, chunks):
        def chunk(x):
            return jnp.mean(jax.lax.scan(jax.checkpoint(layer), x, weights)[0].astype(jnp.float32) ** 2)

        return jnp.sum(jax.lax.map(jax.checkpoint(chunk), chunks))

    weights = struct(LAYERS, WIDTH, WIDTH, spec=(None, "fsdp"))
    chunks = struct(CHUNKS, 4 * ROWS, WIDTH, spec=(None, "fsdp"))
    return jax.jit(jax.value_and_grad(loss)).lower(weights, chunks).compile().as_text()


def test_products_of_nested_loops_are_counted_as_often_as_they_run(compiled):
    total = estimate(compiled, parse_topology("v5e-4"))
    product = 2 * ROWS * WIDTH * WIDTH
    # The loss, a chunk's layers again before its backward pass, each layer again inside that, and two for gradients.
    assert total.matmul_flops == pytest.approx(CHUNKS * LAYERS * (1 + 1 + 1 + 2) * product, rel=0.02)
    assert total.unknown_loops == 0


def test_collectives_of_nested_loops_are_counted_as_often_as_they_run(compiled):
    total = estimate(compiled, parse_topology("v5e-4"))
    counted = {}
    for row in total.transfers:
        count, num_bytes = counted.get(row.opcode, (0, 0))
        counted[row.opcode] = (count + row.count, num_bytes + row.num_bytes)
    runs, weight = CHUNKS * LAYERS, 2 * WIDTH * WIDTH
    # Weights are gathered for each of three passes; a gradient is reduced once, and the loss of each chunk.
    assert counted["all-gather"] == (3 * runs, 3 * runs * weight)
    assert counted["all-reduce"] == (runs + CHUNKS, runs * weight + 4 * CHUNKS)
    assert total.dcn_seconds == total.host_seconds == 0


def test_products_are_those_of_an_independent_estimate(compiled, shared):
    spec = importlib.util.spec_from_file_location("hlocost", shared / "tpu" / "hlocost.py")
    hlocost = importlib.util.module_from_spec(spec)
    limit = sys.getrecursionlimit()
    spec.loader.exec_module(hlocost)
    sys.setrecursionlimit(limit)
    total, judged = estimate(compiled, parse_topology("v5e-4")), hlocost.analyze(compiled, "v5e")
    assert total.matmul_flops == pytest.approx(judged["mm_flops"], rel=0.02)
    assert total.seconds["products"] == pytest.approx(judged["mm_s"], rel=0.05)


def test_every_transfer_of_a_compiled_program_has_its_source_line(compiled):
    sources = {row.source for row in estimate(compiled, parse_topology("v5e-4")).transfers}
    assert sources
    assert all(re.fullmatch(r".*test_compiled\.py:\d+", source) for source in sources)
