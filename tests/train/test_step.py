"""The laws of the train step, on 8 virtual devices."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from grit_jax.config import (
    Config,
    DataConfig,
    EmbeddingConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    TransformerConfig,
)
from grit_jax.doctor.batches import embedding_batch, generative_batch, random_texts
from grit_jax.model.transformer import abstract_model, init_params, param_axes
from grit_jax.parallel import sharding
from grit_jax.parallel.execution import PLAIN, execution
from grit_jax.train.objectives import trained_objectives
from grit_jax.train.optimizer import learning_rate, make_optimizer
from grit_jax.train.state import abstract_state, new_state, shardings_of
from grit_jax.train.step import TOKEN_LOSSES, JointObjective, make_gradient_norm, make_train_step
from tests.packing import relative_error

LENGTH = 32
TOLERANCE = 1e-5
ARCHITECTURE = TransformerConfig(
    embed_dim=32, mlp_dim=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, tie_embeddings=False
).resolve(64)
BASE = Config(
    model=ModelConfig(architecture=ARCHITECTURE, remat="none", embedding=EmbeddingConfig(projection_dim=16)),
    data=DataConfig(train="unused", embedding_batch=8, generative_batch=16),
    optimizer=OptimizerConfig(name="sgd", learning_rate=0.1, schedule="constant", warmup_steps=0, clip_norm=None),
    train=TrainConfig(embedding_chunks=1, generative_chunks=1),
)
EMBEDDING_TEXTS = random_texts(np.random.default_rng(0), 24)
GENERATIVE_TEXTS = random_texts(np.random.default_rng(1), 16)


def rows_of(count, num_rows, order=None):
    """Deals texts to rows in turn, so that short rows hold two or three and the rest is padding."""
    order = list(range(count)) if order is None else order
    return [order[row::num_rows] for row in range(num_rows)]


def make_batch(embedding_rows=16, generative_rows=16, order=None, length=LENGTH):
    return {
        "embedding": embedding_batch(EMBEDDING_TEXTS, rows_of(24, embedding_rows, order), length, num_queries=8),
        "generative": generative_batch(GENERATIVE_TEXTS, rows_of(16, generative_rows), length),
    }


def with_train(config, **changes):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def with_model(config, **changes):
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))


def one_update(config, batch, *, mesh=MeshConfig(1, 1, 1), num_devices=1):
    """Loss, gradients and updated parameters of one step, on the host."""
    mesh = sharding.make_mesh(mesh, jax.devices()[:num_devices])
    model = abstract_model(config.model.architecture, config.model.embedding.projection_dim)
    optimizer = make_optimizer(config.optimizer, 10, param_axes(model))
    objective = JointObjective(model, trained_objectives(config), execution(config.model, "cpu"))
    with jax.set_mesh(mesh):
        abstract = abstract_state(model, optimizer, mesh)
        placed = shardings_of(abstract)
        init = jax.jit(init_params, static_argnums=(0, 2), out_shardings=placed.params)
        params = init(config.model.architecture, jax.random.key(0), config.model.embedding.projection_dim)
        state = jax.jit(lambda params: new_state(params, optimizer), out_shardings=placed)(params)
        step = make_train_step(objective, optimizer, optax.constant_schedule(0.1), placed)
        before = jax.device_get(state.params)
        state, metrics = step(state, sharding.place_batch(mesh, batch))
        after, metrics = jax.device_get((state.params, metrics))
    # With SGD at rate 0.1 and no clipping the gradient is the step itself.
    gradient = jax.tree.map(lambda new, old: (old - new) / np.float32(0.1), after, before)
    return metrics, gradient, after


def assert_same_update(actual, expected):
    for name in ("loss", "loss/embedding", "loss/generative", "grad_norm"):
        assert relative_error(actual[0][name], expected[0][name]) < TOLERANCE, name
    for tree, reference in zip(actual[1:], expected[1:], strict=True):
        errors = jax.tree.leaves(jax.tree.map(relative_error, tree, reference))
        assert max(errors) < TOLERANCE


@pytest.fixture(scope="module")
def plain():
    return one_update(BASE, make_batch())


EXPERTS = dataclasses.replace(ARCHITECTURE, family="mixtral", num_experts=4)
MIXED = dataclasses.replace(
    with_model(BASE, architecture=EXPERTS), loss=LossConfig(router_weight=0.5, embedding_router_weight=0.25)
)


@pytest.fixture(scope="module")
def mixed():
    return one_update(MIXED, make_batch())


@pytest.mark.parametrize(
    "mesh", [*(pytest.param(mesh, marks=pytest.mark.long) for mesh in [(1, 1, 1, 4), (2, 1, 2, 2)]), (1, 2, 2, 2)]
)
def test_experts_on_any_mesh_give_the_numbers_of_one_device(mixed, mesh):
    num_devices = int(np.prod(mesh))
    update = one_update(MIXED, make_batch(), mesh=MeshConfig(*mesh), num_devices=num_devices)
    assert_same_update(update, mixed)
    for name in ("loss/router", "loss/router_embedding"):
        assert relative_error(update[0][name], mixed[0][name]) < TOLERANCE


def test_the_balance_loss_is_the_whole_batchs_whatever_the_chunks_and_padding(mixed):
    config = with_train(MIXED, embedding_chunks=4, generative_chunks=2)
    for update in (one_update(config, make_batch()), one_update(MIXED, make_batch(32, 24))):
        assert_same_update(update, mixed)
        for name in ("loss/router", "loss/router_embedding"):
            assert relative_error(update[0][name], mixed[0][name]) < TOLERANCE


def test_router_weights_multiply_the_balance_losses_alone(mixed):
    metrics = mixed[0]
    parts = metrics["loss/embedding"] + metrics["loss/generative"]
    balance = 0.5 * metrics["loss/router"] + 0.25 * metrics["loss/router_embedding"]
    assert relative_error(metrics["loss"], parts + balance) < TOLERANCE
    _, gradient, _ = one_update(dataclasses.replace(MIXED, loss=LossConfig(router_weight=0)), make_batch())
    assert np.any(gradient["layers"]["mlp"]["router"]["kernel"] != mixed[1]["layers"]["mlp"]["router"]["kernel"])


def test_chunked_gradients_equal_full_batch_gradients(plain):
    assert_same_update(one_update(with_train(BASE, embedding_chunks=4, generative_chunks=2), make_batch()), plain)


def test_layer_rematerialisation_inside_chunks_changes_nothing(plain):
    config = with_model(with_train(BASE, embedding_chunks=2, generative_chunks=4), remat="full")
    assert_same_update(one_update(config, make_batch()), plain)


@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 4, 2)])
def test_rows_that_go_through_each_layer_in_pieces_change_nothing(plain, mesh):
    config = with_model(BASE, remat="full", layer_rows=2)
    num_devices = int(np.prod(mesh))
    assert_same_update(one_update(config, make_batch(), mesh=MeshConfig(*mesh), num_devices=num_devices), plain)


@pytest.mark.parametrize("mesh", [pytest.param((8, 1, 1), marks=pytest.mark.long), (1, 8, 1), (1, 1, 2), (2, 2, 2)])
def test_every_mesh_gives_the_numbers_of_one_device(plain, mesh):
    config, num_devices = with_train(BASE, embedding_chunks=2, generative_chunks=1), int(np.prod(mesh))
    assert_same_update(one_update(config, make_batch(), mesh=MeshConfig(*mesh), num_devices=num_devices), plain)


@pytest.mark.parametrize("negatives", ["gathered", "ring"])
def test_the_form_of_the_contrastive_loss_changes_nothing(plain, negatives):
    config = dataclasses.replace(BASE, loss=LossConfig(negatives=negatives))
    assert_same_update(one_update(config, make_batch(), mesh=MeshConfig(2, 2, 2), num_devices=8), plain)


def test_packing_and_order_change_nothing(plain):
    shuffled = list(np.random.default_rng(2).permutation(24))
    assert_same_update(one_update(BASE, make_batch(16, 8, order=shuffled, length=48)), plain)


def test_one_text_per_row_gives_the_numbers_of_packed_rows(plain):
    assert_same_update(one_update(BASE, make_batch(24, 16)), plain)


def test_padding_rows_change_nothing(plain):
    assert_same_update(one_update(BASE, make_batch(32, 24)), plain)


def test_no_gradient_flows_between_streams_texts():
    """A token that occurs in one text only, in the generative batch, gets no gradient from the embedding loss."""
    config = with_train(BASE, mode="embedding")
    batch = {"embedding": make_batch()["embedding"]}
    metrics, gradient, _ = one_update(config, batch)
    assert np.all(gradient["head"] == 0)
    assert np.any(gradient["embedding"] != 0)
    # The norm of one objective's gradient is that of a step with its stream alone.
    measure = make_gradient_norm(JointObjective(abstract_model(ARCHITECTURE, 16), trained_objectives(BASE), PLAIN))
    norm = measure(init_params(ARCHITECTURE, jax.random.key(0), 16), {}, batch)
    assert relative_error(norm, metrics["grad_norm"]) < TOLERANCE


def test_loss_weights_multiply_their_streams(plain):
    config = dataclasses.replace(BASE, loss=dataclasses.replace(BASE.loss, embedding_weight=0.5, generative_weight=3.0))
    metrics, _, _ = one_update(config, make_batch())
    expected = 0.5 * plain[0]["loss/embedding"] + 3 * plain[0]["loss/generative"]
    assert relative_error(metrics["loss"], expected) < TOLERANCE
    assert relative_error(metrics["loss/ratio"], plain[0]["loss/ratio"]) < TOLERANCE


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2)])
def test_the_losses_of_the_tokens_sum_to_the_loss_on_any_mesh(plain, mesh):
    config = dataclasses.replace(BASE, loss=dataclasses.replace(BASE.loss, generative_weight=3.0))
    metrics, _, _ = one_update(config, make_batch(), mesh=MeshConfig(*mesh), num_devices=int(np.prod(mesh)))
    for found in (metrics, plain[0]):
        losses, weights = found[f"{TOKEN_LOSSES}generative"]
        assert relative_error(losses.sum(), plain[0]["loss/generative"]) < TOLERANCE
        assert np.array_equal(weights, make_batch()["generative"].loss_weights)
        assert relative_error(losses, plain[0][f"{TOKEN_LOSSES}generative"][0]) < TOLERANCE


def test_tokens_count_what_is_not_padding(plain):
    assert plain[0]["tokens"] == sum(len(text) for text in EMBEDDING_TEXTS + GENERATIVE_TEXTS)
    pairs = sum(len(text) ** 2 for text in EMBEDDING_TEXTS) + sum(
        len(text) * (len(text) + 1) // 2 for text in GENERATIVE_TEXTS
    )
    assert plain[0]["attention_pairs"] == pairs


def test_the_step_compiles_once_per_row_count():
    mesh = sharding.make_mesh(MeshConfig(2, 1, 1), jax.devices()[:2])
    model = abstract_model(ARCHITECTURE, 16)
    optimizer = make_optimizer(BASE.optimizer, 10, param_axes(model))
    with jax.set_mesh(mesh):
        placed = shardings_of(abstract_state(model, optimizer, mesh))
        params = jax.jit(lambda: init_params(ARCHITECTURE, jax.random.key(0), 16), out_shardings=placed.params)()
        state = jax.jit(lambda params: new_state(params, optimizer), out_shardings=placed)(params)
        objective = JointObjective(model, trained_objectives(BASE), PLAIN)
        step = make_train_step(objective, optimizer, optax.constant_schedule(0.1), placed)
        for rows in (16, 16, 24, 16, 24):
            state, _ = step(state, sharding.place_batch(mesh, make_batch(rows, 16)))
    assert step._cache_size() == 2


def test_an_update_that_is_not_finite_is_skipped():
    """Parameters and moments stay, the step number goes on, and the next rate is that of the update left out."""
    mesh = sharding.make_mesh(MeshConfig(2, 1, 1), jax.devices()[:2])
    model = abstract_model(ARCHITECTURE, 16)
    settings = OptimizerConfig(learning_rate=1.0, warmup_steps=8)
    optimizer, rate = make_optimizer(settings, 10, param_axes(model)), learning_rate(settings, 10)
    good = make_batch()
    generative = good["generative"]
    bad = good | {"generative": generative._replace(loss_weights=generative.loss_weights * np.nan)}
    with jax.set_mesh(mesh):
        placed = shardings_of(abstract_state(model, optimizer, mesh))
        params = jax.jit(lambda: init_params(ARCHITECTURE, jax.random.key(0), 16), out_shardings=placed.params)()
        state = jax.jit(lambda params: new_state(params, optimizer), out_shardings=placed)(params)
        step = make_train_step(JointObjective(model, trained_objectives(BASE), PLAIN), optimizer, rate, placed)
        state, first = step(state, sharding.place_batch(mesh, good))
        before = jax.device_get(state)
        state, skipped = step(state, sharding.place_batch(mesh, bad))
        after = jax.device_get(state)
        state, last = step(state, sharding.place_batch(mesh, good))
    assert (first["skipped"], skipped["skipped"], last["skipped"]) == (0, 1, 0)
    assert np.isnan(skipped["loss"])
    assert after.step == before.step + 1 == 2
    same = jax.tree.map(np.array_equal, (before.params, before.opt_state), (after.params, after.opt_state))
    assert jax.tree.all(same)
    assert np.allclose([first["learning_rate"], skipped["learning_rate"], last["learning_rate"]], [0, 0.125, 0.125])
    moved = jax.tree.map(np.array_equal, after.params, jax.device_get(state.params))
    assert not jax.tree.all(moved)


def test_an_update_that_is_not_finite_is_skipped_where_loss_and_gradient_are_finite():
    """Adam without an epsilon divides by 0 where a gradient is 0: at tokens that the batch does not hold."""
    mesh = sharding.make_mesh(MeshConfig(2, 1, 1), jax.devices()[:2])
    model = abstract_model(ARCHITECTURE, 16)
    settings = OptimizerConfig(schedule="constant", warmup_steps=0, epsilon=0.0)
    optimizer, rate = make_optimizer(settings, 10, param_axes(model)), learning_rate(settings, 10)
    with jax.set_mesh(mesh):
        placed = shardings_of(abstract_state(model, optimizer, mesh))
        params = jax.jit(lambda: init_params(ARCHITECTURE, jax.random.key(0), 16), out_shardings=placed.params)()
        state = jax.jit(lambda params: new_state(params, optimizer), out_shardings=placed)(params)
        before = jax.device_get(state)
        step = make_train_step(JointObjective(model, trained_objectives(BASE), PLAIN), optimizer, rate, placed)
        state, metrics = step(state, sharding.place_batch(mesh, make_batch()))
    assert np.isfinite([metrics["loss"], metrics["grad_norm"]]).all()
    assert metrics["skipped"] == 1
    same = jax.tree.map(np.array_equal, (before.params, before.opt_state), (state.params, state.opt_state))
    assert jax.tree.all(same)
