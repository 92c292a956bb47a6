"""Losses on held-out data."""

from __future__ import annotations

from collections.abc import Mapping

from grit_jax.train.callbacks.base import Callback, Run


class Evaluation(Callback):
    """Adds what `Trainer.evaluate` measures to the numbers of every few steps and of the last one.

    Args:
      every: Steps between measurements; None for the last step alone.
    """

    def __init__(self, every: int | None):
        self._every = every

    def due(self, run: Run, step: int) -> bool:
        """Whether it is time to measure."""
        return run.reached(step, self._every)

    def step_ended(self, run: Run, step: int, values: dict[str, float]) -> None:
        """Measures, unless the run stops."""
        if self.due(run, step) and run.proceed():
            with run.aside("evaluation"):
                values |= self.measure(run)

    def measure(self, run: Run) -> Mapping[str, float]:
        """What is measured of the model as it is now."""
        return run.trainer.evaluate()
