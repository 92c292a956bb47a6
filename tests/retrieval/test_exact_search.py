import jax
import ml_dtypes
import numpy as np
import pytest

from grit_jax.retrieval import exact_search


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int8])
@pytest.mark.parametrize("at_once", [8, 16384])
def test_the_best_are_those_of_all_scores_and_equal_ones_come_by_number(devices, dtype, at_once, monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:devices])
    monkeypatch.setattr(exact_search, "_PASSAGES_AT_ONCE", at_once)
    generator = np.random.default_rng(devices)
    # Small whole numbers: products are exact, and many are equal.
    passages, queries = (generator.integers(-2, 3, (size, 6)).astype(np.float32) for size in (203, 20))
    scales = generator.choice([0.5, 1, 2], 203).astype(np.float32) if dtype == np.int8 else None
    searchable = exact_search.Searchable(passages.astype(dtype), scales)
    products = queries @ passages.T * (1 if scales is None else scales)
    for k in (7, 500):
        scores, numbers = searchable.top_k(queries, k)
        expected = np.argsort(-products, axis=1, kind="stable")[:, :k]
        assert np.array_equal(numbers, expected)
        assert np.array_equal(scores, np.take_along_axis(products, expected, axis=1))
    assert np.array_equal(searchable.scores(queries[:5]), products[:5])
    exact_search._best.clear_cache()  # it was compiled for `at_once`


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int8])
def test_products_are_float32_of_what_is_stored(dtype):
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((300, 64)) * (40 if dtype == np.int8 else 1)
    vectors, queries = vectors.astype(dtype), generator.standard_normal((9, 64)).astype(np.float32)
    scales = generator.random(300, np.float32) if dtype == np.int8 else None
    exact = queries.astype(np.float64) @ vectors.astype(np.float64).T * (1 if scales is None else scales)
    scores, numbers = exact_search.Searchable(vectors, scales).top_k(queries, 300)
    assert np.allclose(scores, np.take_along_axis(exact, numbers, axis=1), rtol=1e-5, atol=1e-6 * np.abs(exact).max())
    assert np.all(np.diff(scores, axis=1) <= 0)
    assert np.array_equal(np.sort(numbers, axis=1), np.tile(np.arange(300), (9, 1)))
