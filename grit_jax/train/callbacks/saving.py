"""What a run saves: its state to resume from, and parameters to keep."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from functools import partial

from grit_jax import files
from grit_jax.checkpoints.checkpoint import Checkpoints
from grit_jax.config import CheckpointConfig
from grit_jax.parallel.distributed import in_first_process, wait_for_all
from grit_jax.runs import folder
from grit_jax.train.callbacks.callback import Callback, Run


class Saving(Callback):
    """Writes a run's checkpoints, one at a time: Orbax's processes would confuse simultaneous ones.

    While another process writes to the run folder, no save begins, and an unfinished one does not become a checkpoint.

    Args:
      config: What to save when, and what to keep.
    """

    def __init__(self, config: CheckpointConfig):
        self._config = config

    @contextmanager
    def running(self, run: Run) -> Generator[None]:
        """Removes half-written checkpoints; at the end saves the last step, and waits until everything is on disk."""
        output, config = run.trainer.folder, self._config
        open_folder = partial(Checkpoints, timeout_seconds=config.timeout_seconds, confirm=run.confirm)
        self._states = open_folder(files.join(output, folder.CHECKPOINTS), keep=config)
        params = files.join(output, folder.PARAMS)
        self._params = None
        if config.params_every or files.is_folder(params):
            self._params = open_folder(params)
        self._saved, self._values = run.start, {}
        yield
        if self._saved < run.step:
            self._save(run, run.step)
        with run.aside("checkpoint"):
            self._states.close()
            if self._params:
                self._params.close()
            # A process that ends while others still save would look like a failure to them.
            wait_for_all()

    def due(self, run: Run, step: int) -> bool:
        """Whether to save the state or the parameters of a step."""
        return run.reached(step, self._config.every) or self._keeps_params(step)

    def step_ended(self, run: Run, step: int, values: dict[str, float]) -> None:
        """Starts saving."""
        self._values = values
        if self._keeps_params(step):
            self._save_params(run, step)
        if run.reached(step, self._config.every):
            self._save(run, step)

    def _keeps_params(self, step: int) -> bool:
        every = self._config.params_every
        return every is not None and step % every == 0

    def _save_params(self, run: Run, step: int) -> None:
        assert self._params
        with run.aside("checkpoint"):
            self._states.wait()
            in_first_process(run.confirm)
            self._params.save(step, run.trainer.stored_params, None, run.trainer.metadata(step))

    def _save(self, run: Run, step: int) -> None:
        """Saves the state, with `best_metric` where the step has it."""
        state, metric = run.trainer.state, self._config.best_metric
        with run.aside("checkpoint"):
            if self._params:
                self._params.wait()
            in_first_process(run.confirm)
            ranked_by = {metric: self._values[metric]} if metric and metric in self._values else None
            self._states.save(step, run.trainer.stored_params, state.opt_state, run.trainer.metadata(step), ranked_by)
        self._saved = step
