import numpy as np
import pytest

from grit_jax.evaluation.report import interval
from grit_jax.evaluation.scores import spearman, v_measure
from grit_jax.evaluation.task import Outcome


def test_an_interval_holds_the_score_also_where_draws_are_biased():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 77, 2000)
    clusters = np.where(generator.random(2000) < 0.4, labels, generator.integers(0, 77, 2000))
    outcome = Outcome("x", np.stack([labels, clusters], axis=1), lambda x: v_measure(*x.T))
    low, high = interval(outcome, 0)
    assert low < outcome.score(outcome.examples) < high < low + 0.05


def test_the_interval_of_a_mean_is_as_wide_as_its_standard_error_says():
    generator = np.random.default_rng(0)
    hits = (generator.random(400) < 0.3).astype(float)
    low, high = interval(Outcome("x", hits), 0)
    assert np.isclose((high - low) / 2, 1.96 * hits.std() / 20, rtol=0.1)
    assert np.isclose((high + low) / 2, hits.mean(), atol=0.01)
    assert interval(Outcome("x", hits), 0) == (low, high)
    assert interval(Outcome("x", np.ones(5)), 0) == (1, 1)


@pytest.mark.parametrize("share", [0.9, 0.97, 1.0])
def test_an_interval_ends_where_the_score_does(share):
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 5, 40)
    clusters = np.where(generator.random(40) < share, labels, 5)
    clustering = Outcome("x", np.stack([labels, clusters], axis=1), lambda x: v_measure(*x.T))
    gold = np.arange(6.0)
    noise = generator.normal(size=6) * (1 - share)
    for sign in (1, -1):
        pairs = np.stack([sign * gold + noise, gold], axis=1)
        correlation = Outcome("x", pairs, lambda x: spearman(*x.T), bounds=(-1.0, 1.0))
        for outcome in (clustering, correlation):
            low, high = interval(outcome, 0)
            assert outcome.bounds[0] <= low <= high <= outcome.bounds[1]
