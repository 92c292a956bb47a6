"""How strongly each objective moves the shared weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax

from grit_jax.data.batch import Batch
from grit_jax.model.transformer import Params
from grit_jax.train.callbacks.callback import Callback, Run

GradientNorm = Callable[[Params, Params, Batch], jax.Array]


class GradientNorms(Callback):
    """Measures each stream's gradient norm before a step that trains both, and the norms' ratio.

    Args:
      every: Steps between measurements; None for none.
      norm: `make_gradient_norm`'s function.
    """

    def __init__(self, every: int | None, norm: GradientNorm):
        self._every, self._norm = every, norm
        self._found: dict[int, dict[str, float]] = {}

    def before_step(self, run: Run, step: int, batch: Batch) -> None:
        """Measures every few steps."""
        if not self._every or step % self._every or len(batch) < 2:
            return
        with run.aside("evaluation"):
            params = run.trainer.state.trainable, run.trainer.state.frozen
            norms = {name: float(self._norm(*params, {name: batch[name]})) for name in run.trainer.streams}
        first, second, *_ = norms.values()
        self._found[step] = {f"grad_norm/{name}": norm for name, norm in norms.items()}
        self._found[step]["grad_norm/ratio"] = first / second if second else math.inf

    def step_ended(self, run: Run, step: int, values: dict[str, float]) -> None:
        """Adds the measurement before the step."""
        values |= self._found.pop(step, {})
