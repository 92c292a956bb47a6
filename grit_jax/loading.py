"""Opens a model wherever it is stored."""

from __future__ import annotations

from pathlib import Path

from jax.sharding import Mesh

from grit_jax import checkpoint, sharding
from grit_jax.config import InputError, MeshConfig
from grit_jax.hf import folder
from grit_jax.model.pretrained import Pretrained
from grit_jax.model.transformer import Params, abstract_model, abstract_params, param_axes


def open_model(path: str | Path, step: int | None = None) -> Pretrained:
    """The model of a run folder, a checkpoint or a Hugging Face folder.

    Args:
      path: Where it is.
      step: Checkpoint to take; None takes the newest.

    Raises:
      InputError: Nothing there can be read as a model.
    """
    path = Path(path)
    if checkpoint.is_checkpoint(path):
        return checkpoint.open_checkpoint(path, step)
    if folder.is_folder(path):
        if step is not None:
            raise InputError(f"{path} is a Hugging Face folder and has no steps; leave the step out")
        return folder.open_folder(path)
    what = "nothing there" if not path.exists() else "no checkpoints/, no step folder, no config.json with safetensors"
    raise InputError(f"{path}: {what}; name a run folder, a checkpoint or a Hugging Face folder")


def load_params(pretrained: Pretrained, mesh: Mesh) -> Params:
    """Reads a model's parameters onto a mesh, float32.

    Raises:
      InputError: The stored weights are not of this model, or the mesh does not divide them.
    """
    model = abstract_model(pretrained.architecture, pretrained.embedding.projection_dim)
    return pretrained.load(sharding.shardings(mesh, abstract_params(model), param_axes(model)))


def load_on_devices(path: str | Path, step: int | None = None) -> tuple[Pretrained, Params]:
    """Opens a model and reads its parameters, a copy on every device; for conversion."""
    pretrained = open_model(path, step)
    return pretrained, load_params(pretrained, sharding.make_mesh(MeshConfig(data=-1, fsdp=1, tensor=1)))
