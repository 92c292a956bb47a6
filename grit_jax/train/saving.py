"""What a run saves: its state to go on from, and parameters to keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from grit_jax import files
from grit_jax.checkpoint import CheckpointMetadata, Checkpoints
from grit_jax.config import CheckpointConfig
from grit_jax.distributed import in_first_process
from grit_jax.model.transformer import Params
from grit_jax.train.state import TrainState
from grit_jax.watch import folder


class Saves:
    """The checkpoints that a run writes, one at a time: of two at once, Orbax's processes would take one for the other.

    What an earlier process has left half written is removed.

    Args:
      output: The run folder.
      config: What is saved when, and kept for how long.
      about: Says what the checkpoint of a step says about itself.
      confirm: Raises where another process writes to the folder, see `SoleWriter.confirm`: such a save does not begin,
        and one that has begun does not become a checkpoint.
    """

    def __init__(
        self,
        output: files.PathLike,
        config: CheckpointConfig,
        about: Callable[[int], CheckpointMetadata],
        confirm: Callable[[], None],
    ):
        self._config, self._about, self._confirm = config, about, confirm
        self._states = Checkpoints(files.join(output, folder.CHECKPOINTS), keep=config, confirm=confirm)
        params = files.join(output, folder.PARAMS)
        self._params = Checkpoints(params, confirm=confirm) if config.params_every or files.is_folder(params) else None

    def params_due(self, step: int) -> bool:
        """Whether the parameters of a step are to be kept."""
        every = self._config.params_every
        return every is not None and step % every == 0

    def save_params(self, step: int, params: Params) -> None:
        """Starts saving parameters alone, as `Checkpoints.save` does."""
        assert self._params
        self._states.wait()
        in_first_process(self._confirm)
        self._params.save(step, params, None, self._about(step))

    def save(self, step: int, state: TrainState, values: Mapping[str, float]) -> None:
        """Starts saving a state, as `Checkpoints.save` does, with what it is ranked by where `values` has it."""
        if self._params:
            self._params.wait()
        in_first_process(self._confirm)
        metric = self._config.best_metric
        ranked_by = {metric: values[metric]} if metric and metric in values else None
        self._states.save(step, state.params, state.opt_state, self._about(step), ranked_by)

    def close(self) -> None:
        """Waits until all is on disk."""
        self._states.close()
        if self._params:
            self._params.close()
