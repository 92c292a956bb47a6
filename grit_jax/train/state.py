"""The state of a training run, trained and frozen, and its shardings."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from jax.typing import DTypeLike

from grit_jax.config import TRAIN_ALL
from grit_jax.errors import InputError
from grit_jax.model.transformer import Params, Transformer, abstract_params, param_axes
from grit_jax.parallel import sharding


@dataclasses.dataclass(frozen=True)
class Partition:
    """Which parameters are trained.

    Attributes:
      trainable: `fnmatch` patterns of the paths of trained parameters, such as `layers.mlp.*`.
      frozen_dtype: Type of the others.
      frozen_apart: Whether the others are those of a base, so that checkpoints hold only what is trained.
    """

    trainable: tuple[str, ...] = TRAIN_ALL
    frozen_dtype: DTypeLike = jnp.float32
    frozen_apart: bool = False

    def stored(self, state: TrainState) -> Any:
        """The parameters of a state that its checkpoint holds."""
        return state.trainable if self.frozen_apart else state.params

    def split(self, tree: Any) -> tuple[Any, Any]:
        """Splits a nested dict by parameter, of arrays or anything else, into the trained part and the frozen one.

        Raises:
          InputError: A pattern matches no parameter.
        """
        leaves = flatten_dict(tree, sep=".")
        trained: set[str] = set()
        for pattern in self.trainable:
            found = fnmatch.filter(leaves, pattern)
            if not found:
                close = difflib.get_close_matches(pattern, leaves, n=1, cutoff=0)[0]
                raise InputError(
                    f"train.trainable: no parameter is called {pattern!r}; did you mean {close!r}? "
                    f"There are {', '.join(sorted(leaves))}"
                )
            trained.update(found)
        parts = ({path: leaf for path, leaf in leaves.items() if (path in trained) is kept} for kept in (True, False))
        trainable, frozen = (unflatten_dict(part, sep=".") for part in parts)
        return trainable, frozen


EVERYTHING = Partition()


def merged(trainable: Any, frozen: Any) -> Any:
    """The inverse of `Partition.split`."""
    return unflatten_dict(flatten_dict(trainable, sep=".") | flatten_dict(frozen, sep="."), sep=".")


class TrainState(NamedTuple):
    """Everything that a run resumes from.

    Attributes:
      step: int32 scalar; updates done.
      trainable: Nested dict of float32 arrays, which updates change.
      frozen: Nested dict of the other parameters, in `Partition.frozen_dtype`.
      opt_state: The optimizer's state for trained parameters, its moments sharded like them.
    """

    step: Any
    trainable: Any
    frozen: Any
    opt_state: Any

    @property
    def params(self) -> Any:
        """All parameters in one nested dict, as in checkpoints and the model."""
        return merged(self.trainable, self.frozen)


def new_state(params: Params, optimizer: optax.GradientTransformation, partition: Partition = EVERYTHING) -> TrainState:
    """The state before the first update."""
    trainable, frozen = partition.split(params)
    frozen = jax.tree.map(lambda param: param.astype(partition.frozen_dtype), frozen)
    return TrainState(jnp.zeros((), jnp.int32), trainable, frozen, optimizer.init(trainable))


def abstract_state(
    model: Transformer, optimizer: optax.GradientTransformation, mesh: Mesh, partition: Partition = EVERYTHING
) -> TrainState:
    """Shapes and shardings of the whole state; allocates no memory.

    Raises:
      InputError: A parameter's dim is not divisible by the mesh.
    """
    params = abstract_params(model)
    shapes = jax.eval_shape(lambda params: new_state(params, optimizer, partition), params)
    trainable, frozen = partition.split(sharding.shardings(mesh, params, param_axes(model)))
    whole = sharding.replicated(mesh)
    opt_state = optax.tree_map_params(
        optimizer, lambda _, split: split, shapes.opt_state, trainable, transform_non_params=lambda _: whole
    )
    placed = TrainState(whole, trainable, frozen, opt_state)
    return jax.tree.map(
        lambda shape, split: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=split), shapes, placed
    )


def shardings_of(abstract: Any) -> Any:
    """The shardings of a tree of ShapeDtypeStructs."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)
