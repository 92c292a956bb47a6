"""What a training step changes, and where it lives on the mesh."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from grit_jax import sharding
from grit_jax.model.transformer import Params, Transformer, abstract_params, param_axes


class TrainState(NamedTuple):
    """Everything that one update replaces.

    Attributes:
      step: int32 scalar; updates done.
      params: Nested dict of float32 arrays.
      opt_state: The optimizer's state, its moments sharded like the parameters.
    """

    step: Any
    params: Any
    opt_state: Any


def new_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first update."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def abstract_state(model: Transformer, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes and shardings of the whole state, without memory.

    Raises:
      InputError: A parameter's dim is not divisible by the mesh.
    """
    shapes = jax.eval_shape(lambda params: new_state(params, optimizer), abstract_params(model))
    param_shardings = sharding.shardings(mesh, shapes.params, param_axes(model))
    whole = sharding.replicated(mesh)
    opt_shardings = optax.tree_map_params(
        optimizer, lambda _, split: split, shapes.opt_state, param_shardings, transform_non_params=lambda _: whole
    )
    placed = TrainState(whole, param_shardings, opt_shardings)
    return jax.tree.map(
        lambda shape, split: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=split), shapes, placed
    )


def shardings_of(abstract: Any) -> Any:
    """The shardings of a tree of ShapeDtypeStructs."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)
