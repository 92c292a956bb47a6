import numpy as np
import pytest
import pytrec_eval
import scipy.stats
import sklearn.metrics

from grit_jax.evaluation.retrieval import Collection, Ranking, outcome
from grit_jax.evaluation.scores import average_precision, pass_at_k, spearman, v_measure

SEEDS = range(20)


@pytest.mark.parametrize("seed", SEEDS)
def test_retrieval_figures_are_those_of_trec_eval_with_graded_gains_and_ties(seed):
    generator = np.random.default_rng(seed)
    names = sorted((f"d{number}" for number in generator.choice(10**4, 150, replace=False)), reverse=True)
    levels = generator.choice([3, 1000])  # few levels give many ties
    scores = (generator.integers(0, levels, (12, 150)) / levels).astype(np.float32)
    judgements = {
        f"q{query}": {str(name): int(generator.integers(-1, 4)) for name in generator.choice(names, 9, replace=False)}
        for query in range(12)
    }
    judgements["q0"] = {names[0]: 0}  # nothing relevant
    judgements["q1"] |= {"not in the corpus": 2}
    run = {f"q{query}": dict(zip(names, map(float, scores[query]), strict=True)) for query in range(12)}
    measures = {"ndcg_cut.10", "recall.10,100", "recip_rank"}
    theirs = pytrec_eval.RelevanceEvaluator(judgements, measures).evaluate(run)

    best = np.argsort(-scores, axis=1, kind="stable")[:, :100]  # equal ones by index: the larger id first
    ranking = Ranking(np.take_along_axis(scores, best, axis=1), best)
    ours = outcome(ranking, Collection({}, dict.fromkeys(names, ""), judgements))
    assert np.allclose(ours.examples, [theirs[query]["ndcg_cut_10"] for query in judgements], atol=1e-12)
    for k in (10, 100):
        expected = np.mean([theirs[query][f"recall_{k}"] for query in judgements])
        assert np.isclose(ours.scores[f"recall_at_{k}"], expected, atol=1e-12)
    ranks = [theirs[query]["recip_rank"] for query in judgements]
    assert np.isclose(ours.scores["mrr_at_10"], np.mean([rank if rank >= 0.1 else 0 for rank in ranks]), atol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_spearman_and_average_precision_are_those_of_their_libraries(seed):
    generator = np.random.default_rng(seed)
    a, b = generator.integers(0, 9, 40), generator.normal(size=40)
    assert np.isclose(spearman(a, b), scipy.stats.spearmanr(a, b).statistic, atol=1e-12)
    relevant, scores = generator.random(30) < 0.3, generator.integers(0, 6, 30) / 5
    relevant[0] = True
    theirs = sklearn.metrics.average_precision_score(relevant, scores)
    assert np.isclose(average_precision(relevant, scores), theirs, atol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_v_measure_is_scikit_learns(seed):
    generator = np.random.default_rng(seed)
    labels, clusters = generator.integers(0, generator.integers(1, 6, 2), (40, 2)).T
    assert np.isclose(v_measure(labels, clusters), sklearn.metrics.v_measure_score(labels, clusters), atol=1e-9)


def test_a_constant_correlates_with_nothing():
    assert spearman(np.ones(5), np.arange(5)) == 0


def test_pass_at_k_is_the_share_of_draws_with_a_correct_one():
    generator = np.random.default_rng(0)
    right = np.arange(20) < 3
    drawn = [right[generator.permutation(20)[:5]].any() for _ in range(4000)]
    assert np.isclose(pass_at_k(np.array([3]), 20, 5)[0], np.mean(drawn), atol=0.03)
    assert pass_at_k(np.array([0, 20]), 20, 1).tolist() == [0, 1]
