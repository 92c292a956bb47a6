"""Details of a step: losses by file, and the embeddings' health."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import jax
import numpy as np

from grit_jax.parallel import sharding
from grit_jax.train.callbacks.callback import Callback, Run
from grit_jax.train.health import GRAM, health_figures
from grit_jax.train.step import TOKEN_LOSSES, Metrics


class Details(Callback):
    """Adds a batch's loss under the name of its file if it has only one, and every few steps the slower measurements.

    These are the health of the embeddings and, in streams whose tokens have losses, each file's loss. Process 0
    computes them from arrays that all processes gather.

    Args:
      every: Steps between the longer measurements; None for none.
    """

    def __init__(self, every: int | None):
        self._every = every
        self._gathered: dict[int, Metrics] = {}

    @contextmanager
    def running(self, run: Run) -> Generator[None]:
        """Compiles the gathering for the run's devices."""
        self._whole = jax.jit(lambda x: x, out_shardings=sharding.replicated(run.trainer.mesh))
        yield

    def step_started(self, run: Run, step: int, metrics: Metrics) -> None:
        """Gathers before the next step starts; later, gathering would wait for that step to end."""
        if self._every and (step % self._every == 0 or step == 1):
            self._gathered[step] = {name: self._whole(value) for name, value in metrics.items() if value.ndim}

    def step_ended(self, run: Run, step: int, values: dict[str, float]) -> None:
        """Adds the figures."""
        gathered = self._gathered.pop(step, {})
        found: dict[str, np.ndarray] = jax.device_get(gathered) if jax.process_index() == 0 else {}
        losses = {name.removeprefix("loss/"): value for name, value in values.items() if name.startswith("loss/")}
        of_tokens = {name.removeprefix(TOKEN_LOSSES): x for name, x in found.items() if name.startswith(TOKEN_LOSSES)}
        by_file = run.trainer.data.losses_by_file(step - 1, losses, of_tokens)
        values |= {f"loss/{name}": value for name, value in by_file.items()}
        if GRAM in found:
            values |= health_figures(found[GRAM])
