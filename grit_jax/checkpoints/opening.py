"""Opens a model wherever it is stored."""

from __future__ import annotations

import dataclasses
import os

import jax.numpy as jnp
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from jax.typing import DTypeLike

from grit_jax import files
from grit_jax.checkpoints import checkpoint
from grit_jax.config import MeshConfig
from grit_jax.errors import InputError
from grit_jax.hf import adapter_folder, hub, model_folder
from grit_jax.model.adapter import base_fingerprint
from grit_jax.model.pretrained import Pretrained
from grit_jax.model.transformer import Params, abstract_params, param_axes
from grit_jax.parallel import sharding
from grit_jax.text.tokenizer import Tokenizer


def open_model(path: str | os.PathLike[str], step: int | None = None) -> Pretrained:
    """The model of a run folder, a checkpoint, a Hugging Face folder or the Hugging Face Hub.

    Args:
      path: Where it is: on a disk, in a bucket, or `org/name` or `org/name@revision` on the Hub.
      step: Checkpoint to take; None takes the newest.

    Raises:
      InputError: There is no model.
    """
    path = epath.Path(hub.snapshot(str(path)) if hub.is_hub_id(path) else path)
    if checkpoint.is_checkpoint(path):
        return checkpoint.open_checkpoint(path, step, open_base=open_model)
    if adapter_folder.is_folder(path) and not model_folder.is_folder(path):
        _refuse_step(path, step)
        return adapter_folder.open_folder(path, open_model)
    if model_folder.is_folder(path):
        _refuse_step(path, step)
        return model_folder.open_folder(path)
    found = (
        "no checkpoints/, no step folder, no config.json with safetensors" if files.exists(path) else "nothing there"
    )
    raise InputError(f"{path}: {found}; name a run folder, a checkpoint or a Hugging Face folder")


def _refuse_step(path: epath.Path, step: int | None) -> None:
    if step is not None:
        raise InputError(f"{path} is a Hugging Face folder and has no steps; leave the step out")


def open_tokenizer(source: str) -> Tokenizer:
    """A tokenizer by folder, file, Hub id or `bytes`.

    Raises:
      InputError: There is none.
    """
    return Tokenizer.load(hub.snapshot(source) if hub.is_hub_id(source) else source)


def load_params(pretrained: Pretrained, mesh: Mesh, dtype: DTypeLike = jnp.float32) -> Params:
    """Reads a model's parameters onto a mesh, split as for training and inference.

    Raises:
      InputError: The stored weights are not this model's, or the mesh does not divide them.
    """
    model = pretrained.model
    return pretrained.load(sharding.shardings(mesh, abstract_params(model), param_axes(model)), dtype)


def load_for_conversion(
    path: str | os.PathLike[str], step: int | None = None, dtype: DTypeLike = jnp.float32
) -> tuple[Pretrained, Params]:
    """Opens a model, adapters merged, and reads its parameters, one copy over all devices."""
    pretrained = open_model(path, step).merged()
    mesh = sharding.make_mesh(MeshConfig())
    return pretrained, pretrained.load(sharding.spread(mesh, abstract_params(pretrained.model)), dtype)


def load_adapters(
    path: str | os.PathLike[str], step: int | None = None, dtype: DTypeLike = jnp.float32
) -> tuple[Pretrained, Params]:
    """Opens adapters and reads their own parameters, after the base's, whose fingerprint they get if they had none.

    Raises:
      InputError: There are no adapters, or their base has changed.
    """
    pretrained = open_model(path, step)
    adapter = pretrained.adapter
    if adapter is None:
        raise InputError(f"{path}: has no adapters; leave --adapter out")
    mesh = sharding.make_mesh(MeshConfig())
    params = pretrained.load(sharding.spread(mesh, abstract_params(pretrained.model)), dtype)
    own = {path: leaf for path, leaf in flatten_dict(params, sep=".").items() if path in pretrained.own}
    if adapter.fingerprint is None:
        base = open_model(adapter.base).merged()
        weights = base.load(sharding.spread(mesh, abstract_params(base.model)), jnp.bfloat16)
        adapter = dataclasses.replace(adapter, fingerprint=base_fingerprint(base, weights))
    return dataclasses.replace(pretrained, adapter=adapter), unflatten_dict(own, sep=".")
