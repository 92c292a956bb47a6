"""Merges models of one architecture into one, parameter by parameter."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Literal

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from grit_jax.checkpoints import checkpoint
from grit_jax.checkpoints.checkpoint import CheckpointMetadata, save_params
from grit_jax.checkpoints.opening import open_model
from grit_jax.config import MeshConfig, field_differences
from grit_jax.errors import InputError
from grit_jax.families.family import Tensor
from grit_jax.hf.tensors import get, model_tensors
from grit_jax.model.pretrained import Pretrained
from grit_jax.model.transformer import abstract_model, abstract_params
from grit_jax.parallel import sharding

Method = Literal["linear", "slerp"]

_PARALLEL = 0.9995  # absolute cosine from which `slerp` is linear, as in mergekit
_OFF = 1e-6  # how far from 1 weights may sum to, as 0.333333 three times does


def merge(
    models: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    method: Method = "linear",
) -> None:
    """Writes the merged model as a checkpoint of parameters in float32, like that of `grit-jax import-hf`.

    Its metadata record what was merged, by checkpoint, with which weights and method. Besides the merged model, one
    parameter of every input is in memory at a time. Arithmetic is in float64, on the host's CPU.

    Args:
      models: Two or more models of one architecture, tokenizer and way to make vectors; whatever `open_model` opens.
      output: New checkpoint folder, on a disk or in a bucket.
      weights: The weight of each model; they sum to 1. None for equal ones.
      method: How tensors are combined: `linear` or, of two models, `slerp`.

    Raises:
      InputError: Models or weights do not go together, or `output` holds something; nothing is written.
    """
    checkpoint.refuse_used(output)
    weights = _checked(weights, len(models), method)
    sources = [_source(model) for model in models]
    opened = [_whole(source) for source in sources]
    first = opened[0]
    for source, pretrained in zip(sources[1:], opened[1:], strict=True):
        _refuse_different(source, pretrained, sources[0], first)
    combine = {"linear": linear, "slerp": slerp}[method]
    mesh = sharding.make_mesh(MeshConfig(), jax.local_devices(backend="cpu")[:1])
    whole = sharding.replicated(mesh)
    shapes = abstract_params(abstract_model(first.architecture, first.embedding.projection_dim))

    def merged(tensor: Tensor) -> jax.Array:
        asked = unflatten_dict({tensor.path: whole})
        values = [np.asarray(get(pretrained.load(asked), tensor.path)) for pretrained in opened]
        out = np.empty(get(shapes, tensor.path).shape, np.float32)
        for _, index in tensor.stored(out.shape):
            out[index] = combine([value[index] for value in values], weights)
        return jax.device_put(out, whole)

    params = {tensor.path: merged(tensor) for tensor in model_tensors(first.architecture, first.embedding)}
    record = {"models": sources, "weights": list(weights), "method": method}
    metadata = CheckpointMetadata(first.architecture, first.embedding, first.tokenizer.files(), merged=record)
    save_params(output, unflatten_dict(params), metadata)


def linear(tensors: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """The weighted sum, in float64."""
    return np.sum([weight * tensor.astype(np.float64) for tensor, weight in zip(tensors, weights, strict=True)], axis=0)


def slerp(tensors: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Spherical interpolation of two tensors as flat vectors (Shoemake, 1985), in float64.

    With the angle a between them and weights u and v, (sin(u a) x + sin(v a) y) / sin(a). The angle is that of the
    directions, lengths are interpolated along. Where the directions are nearly parallel or opposite, or one has none,
    `linear`, as sin(a) is close to 0.
    """
    first, second = (tensor.astype(np.float64) for tensor in tensors)
    lengths = np.linalg.norm(first) * np.linalg.norm(second)
    cosine = np.vdot(first, second) / lengths if lengths else 1.0
    if abs(cosine) > _PARALLEL:
        return linear(tensors, weights)
    angle = np.arccos(cosine)
    of_first, of_second = np.sin(np.array(weights) * angle) / np.sin(angle)
    return of_first * first + of_second * second


def _checked(weights: Sequence[float] | None, count: int, method: Method) -> tuple[float, ...]:
    if count < 2:
        raise InputError(f"merging takes two models or more, not {count}; name another, or --last K of a run")
    if method == "slerp" and count != 2:
        raise InputError(f"slerp merges two models, not {count}; merge them two by two, or by linear")
    if weights is None:
        return (1 / count,) * count
    if len(weights) != count:
        raise InputError(f"{len(weights)} weights for {count} models; give one for each")
    if not math.isclose(total := sum(weights), 1, rel_tol=0, abs_tol=_OFF):
        given = " ".join(f"{weight:g}" for weight in weights)
        raise InputError(f"weights {given} sum to {total:g}, so the result would be scaled; make them sum to 1")
    return tuple(weights)


def _source(model: str | os.PathLike[str]) -> str:
    """Where exactly a model is read from: of a run, the checkpoint."""
    return str(checkpoint.find_checkpoint(model) if checkpoint.is_checkpoint(model) else model)


def _whole(source: str) -> Pretrained:
    """The model there, which has no adapters."""
    model = open_model(source)
    if model.adapter:
        raise InputError(f"{source} is adapters; merge the folder of the whole model that `grit-jax export-hf` writes")
    return model


def _refuse_different(source: str, model: Pretrained, first_source: str, first: Pretrained) -> None:
    for what, here, there in (
        ("architecture", model.architecture, first.architecture),
        ("way to make vectors", model.embedding, first.embedding),
    ):
        if differences := field_differences(here, there):
            raise InputError(
                f"{source} has another {what} than {first_source} ({'; '.join(differences)}); only models that share "
                "these settings can be merged"
            )
    if model.tokenizer.fingerprint != first.tokenizer.fingerprint:
        raise InputError(
            f"{source} has another tokenizer than {first_source}; only models of one tokenizer can be merged"
        )
