"""Two models on the same examples: their difference, and its confidence interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from grit_jax.errors import InputError
from grit_jax.evaluation.scores import BOOTSTRAP_DRAWS, percentile_interval, t_interval
from grit_jax.evaluation.task import mean

# The contribution of each example, by training run and by task.
Runs = Sequence[Sequence[np.ndarray]]


class Comparison(NamedTuple):
    """A score of two models, each the mean over its training runs of the mean over tasks.

    Attributes:
      value: Score of the first.
      reference: Score of the second.
      difference: (value - reference) / reference.
      interval: 95 % interval of the difference by the bootstrap.
      by_run: The difference in each training run.
      run_interval: 95 % interval of the mean of `by_run` by Student's t, as in a paired test; None for one run. With
        few runs the bootstrap's is too narrow: for three it draws from three.
    """

    value: float
    reference: float
    difference: float
    interval: tuple[float, float]
    by_run: tuple[float, ...]
    run_interval: tuple[float, float] | None

    def verdict(self, margin: float, *, smaller_is_better: bool = False) -> str:
        """`equivalent`, `better`, `worse` or `undecided`.

        Equivalent if every interval lies within the relative margin; better or worse if all lie on one side of zero.
        """
        lows, highs = zip(self.interval, self.run_interval or self.interval, strict=True)
        low, high = min(lows), max(highs)
        if -margin <= low and high <= margin:
            return "equivalent"
        if low <= 0 <= high:
            return "undecided"
        return "better" if (high < 0) == smaller_is_better else "worse"


def compare(runs: Runs, reference: Runs, score: Callable[[np.ndarray], float] = mean, *, seed: int = 0) -> Comparison:
    """Compares two models by the paired percentile bootstrap, which resamples the same examples for both.

    It resamples several training runs too, in pairs: runs of one index begin with the same weights. With one run the
    interval says nothing about others.

    Args:
      runs: Contributions to the first model's scores.
      reference: The same of the second; arrays of one index have the same examples.
      score: Computes the score of a task from its contributions.
      seed: Seed of the draws.

    Raises:
      InputError: The two were not scored on the same examples, or the second scores 0: no relative difference.
    """
    shapes = {tuple(task.shape for task in run) for run in (*runs, *reference)}
    if len(runs) != len(reference) or len(shapes) != 1:
        raise InputError(
            f"{len(runs)} and {len(reference)} runs with examples of the shapes {sorted(shapes)} cannot be compared in "
            "pairs; score both models on the same tasks"
        )
    generator = np.random.default_rng(seed)
    sizes = [len(task) for task in runs[0]]
    all_runs, all_examples = range(len(runs)), [np.arange(size) for size in sizes]

    def values(chosen: Sequence[int], examples: Sequence[np.ndarray]) -> tuple[float, float]:
        def value(model: Runs) -> float:
            scores = [[score(task[i]) for task, i in zip(model[run], examples, strict=True)] for run in chosen]
            return float(np.mean(scores))

        return value(runs), value(reference)

    draws = []
    for _ in range(BOOTSTRAP_DRAWS):
        examples = [generator.integers(size, size=size) for size in sizes]
        draws.append(_relative(*values(generator.integers(len(runs), size=len(runs)).tolist(), examples)))
    by_run = tuple(_relative(*values([run], all_examples)) for run in all_runs)
    first, second = values(all_runs, all_examples)
    return Comparison(
        first,
        second,
        _relative(first, second),
        percentile_interval(draws),
        by_run,
        t_interval(by_run) if len(runs) > 1 else None,
    )


def _relative(value: float, reference: float) -> float:
    if reference == 0:
        raise InputError("the reference scores 0 on all examples, or on those of a draw; compare the scores themselves")
    return (value - reference) / reference
