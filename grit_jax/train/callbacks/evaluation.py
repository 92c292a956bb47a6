"""Measurements of the model itself: losses on held-out data, a scorecard."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from grit_jax.train.callbacks.callback import Callback, Run

if TYPE_CHECKING:
    from grit_jax.train.loop import Trainer


class Evaluation(Callback):
    """Adds a measurement to the metrics of every few steps and of the last one.

    Args:
      every: Steps between measurements; None for only the last step.
      measure: Measures the model as it is.
    """

    def __init__(self, every: int | None, measure: Callable[[Trainer], Mapping[str, float]]):
        self._every, self._measure = every, measure

    def due(self, run: Run, step: int) -> bool:
        """Whether it is time to measure."""
        return run.reached(step, self._every)

    def step_ended(self, run: Run, step: int, values: dict[str, float]) -> None:
        """Measures, unless the run stops."""
        if self.due(run, step) and run.proceed():
            with run.aside("evaluation"):
                values |= self._measure(run.trainer)
