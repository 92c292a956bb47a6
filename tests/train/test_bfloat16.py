"""A train step whose activations are bfloat16: what must not be lost is added up in float32."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec

from grit_jax.config import MeshConfig
from grit_jax.model.transformer import abstract_model, param_axes
from grit_jax.parallel import sharding
from grit_jax.parallel.execution import Execution
from grit_jax.train.objectives import trained_objectives
from grit_jax.train.optimizer import make_optimizer
from grit_jax.train.state import abstract_state, shardings_of
from grit_jax.train.step import JointObjective, make_train_step
from tests.packing import relative_error
from tests.train.narrow_sums import FEW, narrow_sums
from tests.train.test_step import ARCHITECTURE, BASE, EXPERTS, MIXED, make_batch, one_update, with_model, with_train

LENGTH, EMBED = 128, ARCHITECTURE.embed_dim

ARCHITECTURES = {
    # What the families without experts differ in, all of it at once.
    "dense": dataclasses.replace(
        ARCHITECTURE, qkv_bias=True, qk_norm=True, post_norms=True, scale_embedding=True, norm_offset=1.0,
        activation="gelu_tanh", attention_soft_cap=50.0, logit_soft_cap=30.0, sliding_window=16,
        windowed_layers=(True, False), local_rope_theta=1e3, tie_embeddings=True,
    ),
    "experts": EXPERTS,
}  # fmt: skip

CPU_KERNELS = {"attention": "blockwise", "experts": "ragged_dot"}
TPU_KERNELS = {"attention": "splash", "experts": "megablox"}


def step_of(architecture, execution):
    """The jaxpr of a train step of both streams in chunks, whose rows go through each layer in pieces."""
    negatives = "ring" if architecture.num_experts else "gathered"
    base = MIXED if architecture.num_experts else BASE
    base = dataclasses.replace(base, loss=dataclasses.replace(base.loss, negatives=negatives))
    config = with_train(with_model(base, architecture=architecture), embedding_chunks=2, generative_chunks=2)
    mesh = sharding.make_mesh(MeshConfig(1, 2, 2, 2))
    model = abstract_model(architecture, config.model.embedding.projection_dim)
    optimizer = make_optimizer(config.optimizer, 10, param_axes(model))
    objective = JointObjective(model, trained_objectives(config), execution)
    with jax.set_mesh(mesh):
        state = abstract_state(model, optimizer, mesh)
        step = make_train_step(objective, optimizer, optax.constant_schedule(0.1), shardings_of(state))
        return step.trace(state, sharding.abstract_batch(mesh, make_batch(length=LENGTH))).jaxpr.jaxpr


def is_residual_stream(kind, shape):
    """A layer adds two terms to the residual stream, and its backward pass two to the stream's gradient."""
    return kind == "carry" and len(shape) == 3 and shape[1:] == (LENGTH, EMBED)


@pytest.mark.parametrize("kernels", [CPU_KERNELS, TPU_KERNELS], ids=["cpu", "tpu"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_sum_over_tokens_chunks_or_devices_is_made_in_bfloat16(name, kernels):
    execution = Execution(jnp.dtype("bfloat16"), **kernels, remat="full", layer_rows=1)
    head_dim = 128 if kernels == TPU_KERNELS else 8
    jaxpr = step_of(dataclasses.replace(ARCHITECTURES[name], head_dim=head_dim), execution)
    sums = {(kind, shape, where) for kind, shape, where in narrow_sums(jaxpr) if not is_residual_stream(kind, shape)}
    assert not sums


def test_the_search_for_sums_finds_every_kind_of_them():
    few, many = jnp.ones((FEW, FEW), jnp.bfloat16), jnp.ones((FEW, 8), jnp.bfloat16)
    mesh = sharding.make_mesh(MeshConfig())

    def over_devices(reduce):
        return jax.shard_map(reduce, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)

    functions = {
        "reduce_sum": lambda: jax.lax.reduce_sum_p.bind(many, axes=(1,), out_sharding=None),
        "cumsum": lambda: jax.lax.cumsum(many, axis=1),
        "scatter-add": lambda: many.at[0, jnp.zeros(FEW, int)].add(1),
        "add": lambda: few + few + few + few + few,
        "carry": lambda: jax.lax.fori_loop(0, FEW, lambda _, x: x + 1, few),
        "psum": lambda: over_devices(lambda x: jax.lax.psum(x, "fsdp"))(few),
        "reduce_scatter": lambda: over_devices(lambda x: jax.lax.psum_scatter(x, "fsdp"))(many.T),
    }
    for kind, function in functions.items():
        assert {found for found, *_ in narrow_sums(jax.make_jaxpr(function)().jaxpr)} == {kind}
    for function in (
        lambda: jax.lax.reduce_sum_p.bind(few, axes=(1,), out_sharding=None),
        lambda: jnp.sum(many, axis=1),
        lambda: many.at[0, jnp.arange(FEW)].add(1, unique_indices=True),
        lambda: few + few + few + few,
        lambda: many @ many.T,
    ):
        assert not list(narrow_sums(jax.make_jaxpr(function)().jaxpr))


# A number in bfloat16 is off by at most 2^-9 of itself, and what a step computes is rounded a few times. The largest
# errors seen were 0.2 % of a loss, the contrastive one at temperature 0.02, and 1.3 % of a parameter's gradient.
LOSS, GRADIENT = 0.005, 0.02

BIASED = with_model(BASE, architecture=dataclasses.replace(ARCHITECTURE, qkv_bias=True), layer_rows=2)


def assert_close(actual, expected):
    for name in ("loss", "loss/embedding", "loss/generative", "grad_norm"):
        assert relative_error(actual[0][name], expected[0][name]) < LOSS, name
    errors = jax.tree_util.tree_leaves_with_path(jax.tree.map(relative_error, actual[1], expected[1]))
    assert not [(jax.tree_util.keystr(path), error) for path, error in errors if error > GRADIENT]


@pytest.mark.parametrize(
    ("config", "meshes"),
    [
        pytest.param(BIASED, [(1, 8, 1), (2, 2, 2)], id="dense", marks=pytest.mark.long),
        pytest.param(MIXED, [(1, 2, 2, 2)], id="experts"),
    ],
)
def test_a_bfloat16_step_gives_the_numbers_of_float32_on_every_mesh(config, meshes):
    narrow = with_model(config, compute_dtype="bfloat16")
    in_float32, alone = one_update(config, make_batch()), one_update(narrow, make_batch())
    assert_close(alone, in_float32)
    for mesh in meshes:
        update = one_update(narrow, make_batch(), mesh=MeshConfig(*mesh), num_devices=8)
        assert_close(update, in_float32)
        assert_close(update, alone)
