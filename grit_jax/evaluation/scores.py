"""Scores of rankings, similarities, clusters and programs; each equals that of the library named with it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

BOOTSTRAP_DRAWS, _COVERAGE = 1000, 0.95


def percentile_interval(draws: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of a score from its values on bootstrap draws (Efron, 1979)."""
    low, high = np.quantile(draws, [(1 - _COVERAGE) / 2, (1 + _COVERAGE) / 2])
    return float(low), float(high)


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean of two or more draws from a normal distribution (Student, 1908)."""
    import scipy.stats

    half = scipy.stats.t.ppf((1 + _COVERAGE) / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return float(np.mean(values) - half), float(np.mean(values) + half)


def ndcg(gains: np.ndarray, judged: Sequence[np.ndarray], k: int) -> np.ndarray:
    """Normalised discounted cumulative gain at rank k of each query, like trec_eval's `ndcg_cut`.

    A document's gain is its judged relevance, the discount log2(1 + rank), and the ideal ranking that of all judged
    documents (Järvelin and Kekäläinen, 2002). Negative relevance gains nothing; a query without relevant documents
    scores 0.

    Args:
      gains: float [queries, ranks]; relevance of the ranked documents, 0 for those not judged.
      judged: For each query the relevance of all its judged documents.
      k: Number of ranks that count.
    """
    ideal = np.zeros((len(judged), k))
    for row, relevance in zip(ideal, judged, strict=True):
        best = np.sort(relevance)[::-1][:k]
        row[: len(best)] = best
    found, best = (_discounted(x, k) for x in (gains, ideal))
    return np.divide(found, best, out=np.zeros(len(judged)), where=best > 0)


def _discounted(gains: np.ndarray, k: int) -> np.ndarray:
    gains = np.maximum(gains[:, :k], 0)
    return np.sum(gains / np.log2(2 + np.arange(gains.shape[1])), axis=1)


def recall(gains: np.ndarray, judged: Sequence[np.ndarray], k: int) -> np.ndarray:
    """Share of each query's relevant documents in the first k ranks; arguments and empty queries as in `ndcg`."""
    relevant = np.array([np.sum(relevance > 0) for relevance in judged], float)
    found = np.sum(gains[:, :k] > 0, axis=1).astype(float)
    return np.divide(found, relevant, out=np.zeros(len(judged)), where=relevant > 0)


def reciprocal_rank(gains: np.ndarray, k: int) -> np.ndarray:
    """1 / rank of each query's first relevant document in its first k ranks, 0 without one; `gains` as in `ndcg`."""
    found = gains[:, :k] > 0
    return np.where(found.any(axis=1), 1 / (1 + np.argmax(found, axis=1)), 0.0)


def average_precision(relevant: np.ndarray, scores: np.ndarray) -> float:
    """Mean precision at each relevant item, like scikit-learn's: items of equal score share a rank.

    Args:
      relevant: bool [items], some of them true.
      scores: float [items].
    """
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(relevant[order])
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # last of each run of equal scores
    precision = hits[last] / (last + 1)
    return float(np.sum(np.diff(hits[last], prepend=0) * precision) / hits[-1])


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of ranks, like SciPy's: equal values share their mean rank; 0 if either is constant."""
    import scipy.stats

    ranks = [scipy.stats.rankdata(x) - (len(x) + 1) / 2 for x in (a, b)]
    lengths = math.prod(math.sqrt(np.sum(np.square(x))) for x in ranks)
    return float(np.dot(*ranks) / lengths) if lengths else 0.0


def v_measure(labels: np.ndarray, clusters: np.ndarray) -> float:
    """Harmonic mean of homogeneity and completeness (Rosenberg and Hirschberg, 2007), like scikit-learn's.

    Args:
      labels: int [items], from 0.
      clusters: int [items], from 0.
    """
    counts = np.zeros((labels.max() + 1, clusters.max() + 1))
    np.add.at(counts, (labels, clusters), 1)
    of_labels, of_clusters, of_both = (_entropy(x) for x in (counts.sum(axis=1), counts.sum(axis=0), counts.ravel()))
    shared = of_labels + of_clusters - of_both
    homogeneity = shared / of_labels if of_labels else 1.0
    completeness = shared / of_clusters if of_clusters else 1.0
    return float(2 * homogeneity * completeness / max(homogeneity + completeness, 1e-24))


def _entropy(counts: np.ndarray) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(-np.sum(shares * np.log(shares)))


def pass_at_k(correct: np.ndarray, samples: int, k: int) -> np.ndarray:
    """Unbiased probability that one of k samples is correct (Chen et al., arXiv 2107.03374, equation 1).

    Args:
      correct: int [problems]; number of correct samples of `samples`.
      samples: At least k.
      k: Samples drawn.
    """
    all_wrong = [math.comb(samples - int(right), k) / math.comb(samples, k) for right in correct]
    return 1 - np.array(all_wrong)
