"""Continuous batching as the TPU compiler makes it, for chips that need not be there."""

import jax
import jax.numpy as jnp
import pytest

from grit_jax.config import MeshConfig, TransformerConfig
from grit_jax.inference.decode import Sampling, decode, empty_state, extend
from grit_jax.model.transformer import abstract_model, abstract_params, param_axes
from grit_jax.parallel.sharding import make_mesh, replicated, shardings

ROWS, SLOTS = 16, 512


@pytest.fixture(scope="module")
def compiled():
    """Reading and writing of a model with the widths of GritLM-7B and two of its layers, over four v5e chips."""
    pytest.importorskip("libtpu", reason="libtpu, which compiles for TPUs, is not installed")
    from jax.experimental import topologies

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
        mesh = make_mesh(MeshConfig(data=1, tensor=4), chips)
        config = TransformerConfig(
            family="mistral", embed_dim=4096, mlp_dim=14336, num_layers=2, num_heads=32, num_kv_heads=8,
            tie_embeddings=False,
        ).resolve(32_000)  # fmt: skip
        model = abstract_model(config)
        shapes = abstract_params(model)

        def placed(shape, sharding):
            return jax.ShapeDtypeStruct(shape.shape, jnp.bfloat16, sharding=sharding)

        params = jax.tree.map(placed, shapes, shardings(mesh, shapes, param_axes(model)))

        def array(dtype, *shape):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(mesh))

        with jax.set_mesh(mesh):
            empty = empty_state.lower(model, params, rows=ROWS, slots=SLOTS, dtype=jnp.dtype("bfloat16")).compile()
            state = jax.tree.map(
                lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
                jax.eval_shape(lambda: empty_state(model, params, rows=ROWS, slots=SLOTS, dtype=jnp.dtype("bfloat16"))),
                empty.output_shardings,
            )
            numbers, floats = array(jnp.int32, ROWS), array(jnp.float32, ROWS)
            sampling = Sampling(array(jnp.uint32, ROWS), floats, floats, array(jnp.bool_))
            read = extend.lower(model, params, state, array(jnp.int32, ROWS, 128), numbers, numbers).compile()
            write = decode.lower(model, params, state, numbers, sampling, steps=8).compile()
    return read, write


@pytest.mark.long
def test_reading_and_writing_change_a_full_batch_in_place_on_every_chip(compiled):
    cache = 2 * 2 * ROWS * SLOTS * 8 * 128 * 2  # layers, keys and values, bfloat16
    for program in compiled:
        memory = program.memory_analysis()
        assert cache // 4 <= memory.alias_size_in_bytes < cache // 2  # a quarter, and the logits
        assert memory.output_size_in_bytes - memory.alias_size_in_bytes < cache // 16
