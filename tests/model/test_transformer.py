import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grit_jax.config import TransformerConfig
from grit_jax.doctor.batches import lay_out, random_texts
from grit_jax.model.transformer import abstract_model, abstract_params, bind, init_params, param_axes
from grit_jax.parallel.execution import PLAIN
from tests.packing import relative_error

CONFIG = TransformerConfig(embed_dim=32, mlp_dim=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8).resolve(64)
WINDOW = TransformerConfig(
    embed_dim=32, mlp_dim=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, sliding_window=3
).resolve(64)


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(0))


def hidden_states(config, params, tokens, segment_ids, positions, *, causal, remat="none"):
    model = bind(abstract_model(config), params)
    mask = model.mask(jnp.asarray(segment_ids), jnp.asarray(positions), causal=causal)
    return model(jnp.asarray(tokens), mask, dataclasses.replace(PLAIN, remat=remat))[0]


def influence(config, params, *, causal, length=10):
    """[query, key]: how much the hidden state at `query` moves with the input at `key`."""
    tokens = np.arange(1, length + 1)[None]  # each token occurs once: its table row is that position's input
    positions = np.arange(length)[None]

    def hidden(table):
        weights = params | {"embedding": table}
        return hidden_states(config, weights, tokens, np.ones_like(tokens), positions, causal=causal)[0]

    jacobian = jax.jit(jax.jacrev(hidden))(params["embedding"])[:, :, 1 : length + 1]
    return np.abs(np.asarray(jacobian)).max(axis=(1, 3))


@pytest.mark.parametrize("config", [CONFIG, WINDOW], ids=["full", "window"])
def test_causal_states_ignore_later_tokens(params, config):
    assert np.all(np.triu(influence(config, params, causal=True), 1) == 0)


def test_a_causal_window_hides_earlier_tokens(params):
    reach = 2 * (WINDOW.sliding_window - 1)  # each of two layers looks back window - 1 tokens
    seen = influence(WINDOW, params, causal=True)
    assert np.all(np.tril(seen, -reach - 1) == 0)
    assert np.all(np.diag(seen, -reach) > 0)


@pytest.mark.parametrize("config", [CONFIG, WINDOW], ids=["full", "window"])
def test_bidirectional_states_see_every_token_sliding_window_or_not(params, config):
    assert np.all(influence(config, params, causal=False) > 0)


@pytest.mark.parametrize("causal", [True, False])
def test_packing_order_and_row_mates_do_not_change_hidden_states(params, causal):
    texts = random_texts(np.random.default_rng(0), 6)
    states = {}
    for rows in ([[0, 1], [2, 3], [4, 5]], [[5, 2], [4, 0], [3, 1]], [[0, 3], [2], [1]]):
        order, lengths, packing, filled = lay_out(texts, rows, 32)
        hidden = hidden_states(CONFIG, params, *filled[:3], causal=causal)
        for text, length, row, offset in zip(order.tolist(), lengths, packing.row, packing.offset, strict=True):
            state = hidden[row, offset : offset + length]
            assert relative_error(state, states.setdefault(text, state)) < 1e-5


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_rematerialisation_changes_nothing(params, remat):
    rows = lay_out(random_texts(np.random.default_rng(1), 2), [[0, 1]], 32).rows

    def gradient(remat):
        def loss(params):
            states = hidden_states(CONFIG, params, *rows[:3], causal=True, remat=remat)
            return jnp.sum(jnp.sin(states))

        return jax.jit(jax.grad(loss))

    plain, again = gradient("none"), gradient(remat)
    # The policies must really differ, or this test compares a program with itself.
    assert plain.lower(params).as_text() != again.lower(params).as_text()
    errors = jax.tree.map(relative_error, again(params), plain(params))
    assert max(jax.tree.leaves(errors)) < 1e-5


def test_the_gradient_of_a_frequent_token_adds_up_in_float32(params):
    tokens = np.random.default_rng(2).choice(64, (4, 4096), p=[0.5, 0.25, *np.full(62, 0.25 / 62)])
    change = jnp.asarray(np.random.default_rng(3).normal(0.5, 1.0, (*tokens.shape, 32)), jnp.bfloat16)

    def embedded(table):
        return bind(abstract_model(CONFIG), params | {"embedding": table}).embed(jnp.asarray(tokens), change.dtype)

    gradient = jax.vjp(embedded, params["embedding"])[1](change)[0]
    expected = np.zeros((64, 32))
    np.add.at(expected, tokens, np.asarray(change, np.float64))
    errors = [relative_error(*rows) for rows in zip(gradient, expected, strict=True)]
    assert max(errors) < 1e-5


def test_seven_billion_abstract_parameters_build_in_under_a_second_without_memory():
    config = TransformerConfig(
        embed_dim=4096, mlp_dim=14336, num_layers=32, num_heads=32, num_kv_heads=8, tie_embeddings=False
    ).resolve(32000)
    started = time.process_time()
    shapes = jax.tree.leaves(abstract_params(abstract_model(config)))
    assert time.process_time() - started < 1
    assert sum(np.prod(shape.shape) for shape in shapes) == 7_241_732_096
    assert all(isinstance(shape, jax.ShapeDtypeStruct) for shape in shapes)


def test_every_parameter_has_one_logical_axis_per_dim():
    model = abstract_model(CONFIG, projection_dim=8)
    matches = jax.tree.map(lambda shape, axes: len(shape.shape) == len(axes), abstract_params(model), param_axes(model))
    assert all(jax.tree.leaves(matches))
