import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grit_jax.config import TransformerConfig
from grit_jax.inference.decode import Sampling, decode, empty_state, extend, sample
from grit_jax.model.transformer import abstract_model, bind, init_params, split_layers

SHAPE = {"embed_dim": 32, "mlp_dim": 48, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
PROMPTS = [np.arange(1, 12), np.array([5, 3]), np.array([60, 2, 9, 9, 1])]


def random_params(config):
    """Weights large enough that attention decides the answer."""
    return jax.tree.map(lambda x: 3 * x, init_params(config, jax.random.key(0)))


@functools.partial(jax.jit, static_argnums=0)
def likeliest(model, params, tokens, last):
    bound = bind(model, params)
    mask = bound.mask(jnp.ones_like(tokens), jnp.arange(tokens.shape[1])[None], causal=True)
    return jnp.argmax(bound.output_table[...] @ bound(tokens, mask)[0][0, last])


def full_forward_greedy(model, params, prompt, steps):
    ids = list(prompt)
    for _ in range(steps):
        tokens = jnp.array([ids + [0] * (24 - len(ids))])
        ids.append(int(likeliest(model, params, tokens, len(ids) - 1)))
    return ids[len(prompt) :]


def greedy(rows, logprobs=False):
    zeros = np.zeros(rows, np.float32)
    return Sampling(np.zeros(rows, np.uint32), zeros, zeros + 1, np.bool_(logprobs))


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("window", [None, 4])
def test_cached_decoding_of_a_ragged_batch_equals_full_forward_passes(window, split):
    config = TransformerConfig(**SHAPE, sliding_window=window).resolve(64)
    model, params = abstract_model(config), random_params(config)
    given = split_layers(params) if split else params
    lengths = np.array([len(prompt) for prompt in PROMPTS], np.int32)
    tokens = np.zeros((3, 16), np.int32)
    for row, prompt in enumerate(PROMPTS):
        tokens[row, : len(prompt)] = prompt
    state = empty_state(model, given, rows=3, slots=24, dtype=jnp.dtype("float32"))
    state = extend(model, given, state, tokens, np.zeros(3, np.int32), lengths)
    first, _, state = decode(model, given, state, lengths, greedy(3), steps=4)
    second, _, _ = decode(model, given, state, lengths + 4, greedy(3), steps=4)
    for row, prompt in enumerate(PROMPTS):
        expected = full_forward_greedy(model, params, prompt, 8)
        assert [*first[row].tolist(), *second[row].tolist()] == expected


def draws(top_p, temperature=1.0, count=400):
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    keys = jax.random.split(jax.random.key(0), count)
    return np.asarray(
        sample(
            jnp.repeat(logits, count, 0),
            keys,
            temperature=jnp.full(count, temperature, jnp.float32),
            top_p=jnp.full(count, top_p, jnp.float32),
        )
    )


def test_top_p_draws_from_the_smallest_set_that_holds_it():
    assert set(draws(1.0)) == {0, 1, 2, 3}
    assert set(draws(0.9)) == {0, 1, 2}
    assert set(draws(0.6)) == {0, 1}
    assert set(draws(0.1)) == {0}


def test_draws_follow_the_probabilities_and_temperature_sharpens_them():
    assert abs(np.mean(draws(1.0, count=4000) == 0) - 0.5) < 0.03
    assert np.mean(draws(1.0, temperature=0.1) == 0) > 0.98
    assert set(draws(1.0, temperature=0.0)) == {0}


@pytest.mark.parametrize("top_p", [0.0, 1e-40, 1e-9, 0.01])
@pytest.mark.parametrize("row", [[0.1, 3.0, 0.2, 2.0], [1.0, 1.0, 1.0, 1.0], [-1e30, 0.5, 0.5, -1e30]])
def test_a_nucleus_of_next_to_nothing_holds_the_likeliest_token(top_p, row):
    logits = jnp.tile(jnp.asarray(row, jnp.float32), (50, 1))
    keys = jax.vmap(jax.random.key)(jnp.arange(50))
    hot, cold = (
        sample(logits, keys, temperature=jnp.full(50, temperature), top_p=jnp.full(50, top_p, jnp.float32))
        for temperature in (1.0, 0.0)
    )
    assert jnp.array_equal(hot, cold)
