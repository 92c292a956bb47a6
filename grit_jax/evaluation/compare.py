"""Two models on the same examples: how far apart they are, and how sure that is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from grit_jax.evaluation.metrics import BOOTSTRAP_DRAWS, percentile_interval
from grit_jax.evaluation.task import mean

# What each example contributes, by training run and by task.
Runs = Sequence[Sequence[np.ndarray]]


class Comparison(NamedTuple):
    """A figure of two models, each the mean over its training runs of the mean over tasks.

    Attributes:
      value: Of the first.
      reference: Of the second.
      difference: (value - reference) / reference.
      interval: 95 % interval of the difference.
    """

    value: float
    reference: float
    difference: float
    interval: tuple[float, float]

    def verdict(self, margin: float, *, smaller_is_better: bool = False) -> str:
        """`equivalent`, `better`, `worse` or `undecided`.

        Equivalent where the interval lies within the relative margin; else better or worse where it lies on one side of
        zero.
        """
        low, high = self.interval
        if -margin <= low and high <= margin:
            return "equivalent"
        if low <= 0 <= high:
            return "undecided"
        return "better" if (high < 0) == smaller_is_better else "worse"


def compare(runs: Runs, reference: Runs, score: Callable[[np.ndarray], float] = mean, *, seed: int = 0) -> Comparison:
    """Compares two models by the paired percentile bootstrap: both are scored on the same drawn examples.

    Training runs are drawn too where there are several of them, paired by their place: runs of one place begin with the
    same weights. With one run the interval says nothing about others.

    Args:
      runs: Contributions to the first model's scores.
      reference: The same for the second; arrays of one place have the same examples.
      score: From the contributions of a task to its score.
      seed: Of the draws.
    """
    generator = np.random.default_rng(seed)
    tasks = runs[0]

    def figures(places: Sequence[int], drawn: Sequence[np.ndarray]) -> tuple[float, float]:
        def figure(some: Runs) -> float:
            return float(np.mean([[score(task[d]) for task, d in zip(some[p], drawn, strict=True)] for p in places]))

        return figure(runs), figure(reference)

    value, other = figures(range(len(runs)), [np.arange(len(task)) for task in tasks])
    differences = []
    for _ in range(BOOTSTRAP_DRAWS):
        drawn = [generator.integers(len(task), size=len(task)) for task in tasks]
        ours, theirs = figures(generator.integers(len(runs), size=len(runs)).tolist(), drawn)
        differences.append((ours - theirs) / theirs)
    return Comparison(value, other, (value - other) / other, percentile_interval(differences))
