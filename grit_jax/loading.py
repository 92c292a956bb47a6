"""Opens a model wherever it is stored."""

from __future__ import annotations

from pathlib import Path

from grit_jax.config import InputError
from grit_jax.model.pretrained import Pretrained


def open_model(path: str | Path, step: int | None = None) -> Pretrained:
    """The model of a run folder, a checkpoint or a Hugging Face folder.

    Args:
      path: Where it is.
      step: Checkpoint to take; None takes the newest.

    Raises:
      InputError: Nothing there can be read as a model.
    """
    from grit_jax import checkpoint
    from grit_jax.hf import folder

    path = Path(path)
    if checkpoint.is_checkpoint(path):
        return checkpoint.open_checkpoint(path, step)
    if folder.is_folder(path):
        if step is not None:
            raise InputError(f"{path} is a Hugging Face folder and has no steps; leave the step out")
        return folder.open_folder(path)
    what = "nothing there" if not path.exists() else "no checkpoints/, no step folder, no config.json with safetensors"
    raise InputError(f"{path}: {what}; name a run folder, a checkpoint or a Hugging Face folder")
