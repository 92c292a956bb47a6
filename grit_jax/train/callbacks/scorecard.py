"""A small suite of both skills, while a run goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from grit_jax.inference.model import GritModel
from grit_jax.train.callbacks.base import Run
from grit_jax.train.callbacks.evaluation import Evaluation

Measure = Callable[[GritModel], Mapping[str, float]]


class Scorecard(Evaluation):
    """Adds a scorecard's figures to the numbers of every few steps and of the last one.

    Args:
      every: Steps between measurements.
      scorecard: Measures a model.
    """

    def __init__(self, every: int, scorecard: Measure):
        super().__init__(every)
        self._scorecard = scorecard

    def measure(self, run: Run) -> Mapping[str, float]:
        """The figures of the model as it is now."""
        return self._scorecard(run.trainer.model())
