import jax.numpy as jnp
import numpy as np
import pytest

from grit_jax.train.health import ALIGNMENT, GRAM, SAMPLE, health_figures, health_parts


def unit(rng, *shape):
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def figures(vectors):
    return health_figures(vectors @ vectors.T)


def test_figures_equal_their_definitions():
    x = unit(np.random.default_rng(0), 40, 12)
    x[:, 0] += 0.5
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    found = figures(x)
    squared = np.sum((x[:, None] - x[None]) ** 2, axis=-1)[~np.eye(40, dtype=bool)]
    assert found["embedding/uniformity"] == pytest.approx(np.log(np.mean(np.exp(-2 * squared))), abs=1e-5)
    assert found["embedding/mean_cosine"] == pytest.approx(np.mean(1 - squared / 2), abs=1e-5)
    values = np.linalg.eigvalsh(np.cov(x.T))
    shares = values / values.sum()
    assert found["embedding/effective_rank"] == pytest.approx(np.exp(-np.sum(shares * np.log(shares))), rel=1e-4)


def test_collapsed_vectors_have_rank_one_and_no_spread():
    rng = np.random.default_rng(1)
    line = np.array([[np.cos(angle), np.sin(angle), 0.0] for angle in 1e-3 * rng.normal(size=50)], np.float64)
    found = health_figures(line @ line.T)
    assert found["embedding/effective_rank"] < 1.1
    assert found["embedding/mean_cosine"] > 0.999
    assert found["embedding/uniformity"] > -0.001


def test_spread_vectors_use_every_dim():
    found = figures(unit(np.random.default_rng(2), 256, 8))
    assert found["embedding/effective_rank"] > 7.5
    assert found["embedding/uniformity"] < -2.5


def test_the_step_measures_positives_alone_and_a_sample_of_them():
    rng = np.random.default_rng(3)
    query, passage = unit(rng, SAMPLE + 8, 6), unit(rng, 2 * (SAMPLE + 8), 6)
    passage[::2] = query
    parts = health_parts(jnp.array(query), 3 * jnp.array(passage))  # vectors that are not normalised count as if
    assert parts[ALIGNMENT] == pytest.approx(0, abs=1e-5)
    assert np.allclose(parts[GRAM], query[:SAMPLE] @ query[:SAMPLE].T, atol=1e-5)


def test_a_single_vector_and_one_that_is_not_finite_break_nothing():
    assert health_figures(np.ones((1, 1))) == {}
    assert np.isnan(health_figures(np.full((3, 3), np.nan))["embedding/mean_cosine"])
