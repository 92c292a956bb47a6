"""Two models on the same examples: how far apart they are, and how sure that is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from grit_jax.errors import InputError
from grit_jax.evaluation.metrics import BOOTSTRAP_DRAWS, percentile_interval, t_interval
from grit_jax.evaluation.task import mean

# What each example contributes, by training run and by task.
Runs = Sequence[Sequence[np.ndarray]]


class Comparison(NamedTuple):
    """A figure of two models, each the mean over its training runs of the mean over tasks.

    Attributes:
      value: Of the first.
      reference: Of the second.
      difference: (value - reference) / reference.
      interval: 95 % interval of the difference by the bootstrap.
      by_run: The difference in each training run.
      run_interval: 95 % interval of the mean of `by_run` by Student's t, as of a paired test; None for one run. The
        bootstrap's is too narrow where there are few runs: for three it draws from three.
    """

    value: float
    reference: float
    difference: float
    interval: tuple[float, float]
    by_run: tuple[float, ...]
    run_interval: tuple[float, float] | None

    def verdict(self, margin: float, *, smaller_is_better: bool = False) -> str:
        """`equivalent`, `better`, `worse` or `undecided`.

        Equivalent where every interval lies within the relative margin; else better or worse where all lie on one side
        of zero.
        """
        lows, highs = zip(self.interval, self.run_interval or self.interval, strict=True)
        low, high = min(lows), max(highs)
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

    Raises:
      InputError: The two were not scored on the same examples, or the second scores 0, which nothing is relative to.
    """
    shapes = {tuple(task.shape for task in run) for run in (*runs, *reference)}
    if len(runs) != len(reference) or len(shapes) != 1:
        raise InputError(
            f"{len(runs)} and {len(reference)} runs with examples of the shapes {sorted(shapes)} cannot be compared in "
            "pairs; score both models on the same tasks"
        )
    generator = np.random.default_rng(seed)
    tasks = runs[0]

    def figures(places: Sequence[int], drawn: Sequence[np.ndarray]) -> tuple[float, float]:
        def figure(some: Runs) -> float:
            return float(np.mean([[score(task[d]) for task, d in zip(some[p], drawn, strict=True)] for p in places]))

        return figure(runs), figure(reference)

    def difference(places: Sequence[int], drawn: Sequence[np.ndarray]) -> float:
        return _relative(*figures(places, drawn))

    everything = [np.arange(len(task)) for task in tasks]
    differences = []
    for _ in range(BOOTSTRAP_DRAWS):
        drawn = [generator.integers(len(task), size=len(task)) for task in tasks]
        differences.append(difference(generator.integers(len(runs), size=len(runs)).tolist(), drawn))
    by_run = tuple(difference([place], everything) for place in range(len(runs)))
    value, theirs = figures(range(len(runs)), everything)
    return Comparison(
        value,
        theirs,
        _relative(value, theirs),
        percentile_interval(differences),
        by_run,
        t_interval(by_run) if len(runs) > 1 else None,
    )


def _relative(value: float, reference: float) -> float:
    if reference == 0:
        raise InputError("the reference scores 0 on all examples, or on those of a draw; compare the scores themselves")
    return (value - reference) / reference
