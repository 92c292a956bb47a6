import jax
import numpy as np
import pytest

from grit_jax import search


@pytest.mark.parametrize("devices", [1, 8])
def test_the_best_are_those_of_all_scores_and_equal_ones_come_by_number(devices, monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:devices])
    generator = np.random.default_rng(devices)
    # Small whole numbers: products are exact, and many are equal.
    passages, queries = (generator.integers(-2, 3, (size, 6)).astype(np.float32) for size in (203, 20))
    searchable = search.Searchable(passages)
    for k in (7, 500):
        scores, numbers = searchable.top_k(queries, k)
        expected = np.argsort(-(queries @ passages.T), axis=1, kind="stable")[:, :k]
        assert np.array_equal(numbers, expected)
        assert np.array_equal(scores, np.take_along_axis(queries @ passages.T, expected, axis=1))
    assert np.array_equal(searchable.scores(queries[:5]), queries[:5] @ passages.T)
