"""The mixture of experts against a loop over tokens."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from grit_jax.config import MeshConfig, TransformerConfig
from grit_jax.errors import InputError
from grit_jax.losses.balance import balance_loss
from grit_jax.model.moe import ExpertMLP
from grit_jax.parallel import sharding
from grit_jax.parallel.execution import PLAIN
from tests.packing import relative_error

CONFIG = TransformerConfig(
    family="mixtral", embed_dim=16, mlp_dim=24, num_layers=1, num_experts=4, experts_per_token=2
).resolve(64)
X = jax.random.normal(jax.random.key(1), (4, 6, 16))
REAL = jnp.arange(6) < jnp.array([6, 4, 1, 0])[:, None]


def by_hand(mlp, x):
    """One token, float64: its choices, probabilities and output."""
    x = np.asarray(x, np.float64)
    router, gate, up, down = (np.asarray(w[...], np.float64) for w in (mlp.router.kernel, mlp.gate, mlp.up, mlp.down))
    probabilities = np.exp(x @ router)
    probabilities /= probabilities.sum()
    chosen = np.argsort(-probabilities)[: mlp.experts_per_token]
    weights = probabilities[chosen] / probabilities[chosen].sum()
    out = 0
    for expert, weight in zip(chosen, weights, strict=True):
        gated = x @ gate[expert]
        out += weight * (gated / (1 + np.exp(-gated)) * (x @ up[expert])) @ down[expert]
    return chosen, probabilities, out


@pytest.mark.parametrize(("mesh", "per_token"), [(None, 1), (MeshConfig(1, 2, 2, 2), 3)])
def test_megablox_equals_ragged_dot(mesh, per_token):
    """Forward and gradient, with padding, by the interpreted kernel."""
    config = dataclasses.replace(CONFIG, embed_dim=128, mlp_dim=256, experts_per_token=per_token)
    graph, params = nnx.split(ExpertMLP(config, key=jax.random.key(0), out_scale=1.0))
    x, weights = jax.random.normal(jax.random.key(1), (2, 8, 128, 128))
    real = jnp.arange(128) < jnp.array([128, 40, 1, 0, 7, 128, 90, 3])[:, None]

    def outcome(kernel):
        execution = dataclasses.replace(PLAIN, experts=kernel, interpret=True)

        def loss(params, x):
            out, stats = nnx.merge(graph, params)(x, real, execution)
            return jnp.sum(out * weights) + balance_loss(*stats), out

        with contextlib.nullcontext() if mesh is None else jax.set_mesh(sharding.make_mesh(mesh)):
            gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)
        return jax.tree.leaves((gradients, out))

    for ours, expected in zip(outcome("megablox"), outcome("ragged_dot"), strict=True):
        assert np.any(expected)
        assert relative_error(ours, expected) < 1e-5


def test_megablox_names_the_length_it_cannot_take():
    mlp = ExpertMLP(CONFIG, key=jax.random.key(0), out_scale=1.0)
    with pytest.raises(InputError, match="48 tokens for experts: megablox needs a multiple of 128"):
        mlp(X, REAL, dataclasses.replace(PLAIN, experts="megablox"))


@pytest.mark.parametrize("per_token", [1, 2, 4])
def test_experts_and_sums_are_those_of_a_loop_over_the_real_tokens(per_token):
    mlp = ExpertMLP(dataclasses.replace(CONFIG, experts_per_token=per_token), key=jax.random.key(0), out_scale=1.0)
    out, stats = jax.jit(mlp)(X, REAL)
    choices, probabilities = np.zeros((per_token, 4)), np.zeros(4)
    for row, column in np.argwhere(REAL):
        chosen, probability, expected = by_hand(mlp, X[row, column])
        assert relative_error(out[row, column], expected) < 1e-5
        choices[np.arange(per_token), chosen] += 1
        probabilities += probability
    assert np.array_equal(stats.choices, choices)
    assert relative_error(stats.probabilities, probabilities) < 1e-5
    assert stats.tokens == np.count_nonzero(REAL)
    assert np.all(np.asarray(out)[~np.asarray(REAL)] == 0)
    share, mean = choices / np.count_nonzero(REAL), probabilities / np.count_nonzero(REAL)
    assert relative_error(balance_loss(*stats), 4 * np.sum(share * mean)) < 1e-5


def test_balance_is_least_when_tokens_are_spread_evenly():
    even, all_in_one = jnp.full(4, 2.0), jnp.array([8.0, 0, 0, 0])
    assert np.isclose(balance_loss(even[None], even, jnp.float32(8)), 1)
    assert np.isclose(balance_loss(all_in_one[None], all_in_one, jnp.float32(8)), 4)


def test_no_token_is_dropped_when_all_choose_the_same_experts():
    mlp = ExpertMLP(CONFIG, key=jax.random.key(0), out_scale=1.0)
    x = jnp.broadcast_to(X[0, 0], X.shape)
    mesh = sharding.make_mesh(MeshConfig(1, 1, 2, 4))
    with jax.set_mesh(mesh):
        out, _ = jax.jit(mlp)(x, jnp.ones(x.shape[:2], bool))
    expected = by_hand(mlp, X[0, 0])[2]
    assert relative_error(out, np.broadcast_to(expected, X.shape)) < 1e-5
