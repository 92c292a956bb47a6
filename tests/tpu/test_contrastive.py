"""The contrastive loss as the TPU compiler makes it, for chips that need not be there."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from grit_jax.config import MeshConfig
from grit_jax.losses.contrastive import TILE, contrastive_loss
from grit_jax.parallel.sharding import make_mesh, partition_spec


def compile_for_tpu(monkeypatch, topology, negatives, num_queries, num_passages, embed):
    """Loss and gradient of split inputs, compiled for a v5p topology, one shard of the batch per chip."""
    pytest.importorskip("libtpu", reason="libtpu, which compiles for TPUs, is not installed")
    from jax.experimental import topologies

    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    chips = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh(MeshConfig(), chips)

    def split(shape, dtype, axis="batch"):
        sharding = NamedSharding(mesh, partition_spec((axis, *["activation_embed"] * (len(shape) - 1))))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def loss(query, passage, weights, ids):
        return contrastive_loss(
            query, passage, temperature=0.02, query_weights=weights, passage_ids=ids, negatives=negatives
        )

    query, passage = (split((count, embed), jnp.float32) for count in (num_queries, num_passages))
    weights, ids = split((num_queries,), jnp.float32, "length"), split((num_passages,), jnp.int32, "length")
    with jax.set_mesh(mesh):
        step = jax.jit(
            jax.value_and_grad(loss, argnums=(0, 1)), out_shardings=(None, (query.sharding, passage.sharding))
        )
        return step.lower(query, passage, weights, ids).compile()


@pytest.mark.parametrize("negatives", ["dense", "gathered", "ring"])
def test_similarities_and_their_gradients_are_products_in_true_float32(monkeypatch, negatives):
    text = compile_for_tpu(monkeypatch, "v5p:2x2x1", negatives, 512, 1024, 256).as_text()
    found = re.findall(r" (?:convolution|dot)\(.*", text)
    assert len(found) >= 3  # scores, the queries' gradient and the passages'
    assert all("operand_precision={highest,highest}" in product for product in found)


@pytest.mark.long
@pytest.mark.parametrize("negatives", ["gathered", "ring"])
def test_the_batch_of_a_pod_needs_a_few_tiles_and_blocks_on_each_of_64_chips(monkeypatch, negatives):
    num_queries, num_passages, embed = 65_536, 131_072, 4096
    compiled = compile_for_tpu(monkeypatch, "v5p:4x4x4", negatives, num_queries, num_passages, embed)
    scores, block = 4 * num_queries // 64 * TILE, 4 * num_passages // 64 * embed
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * scores + 6 * block
    sizes = {tuple(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]", compiled.as_text())}
    own = num_queries // 64
    assert (own, TILE) in sizes
    assert not any({own, num_passages} <= set(shape) or num_passages in shape for shape in sizes)
