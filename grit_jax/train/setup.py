"""What a run compiles, from its config and a mesh: the same for training and for planning."""

from __future__ import annotations

from typing import Any, NamedTuple

import optax
from jax.sharding import Mesh

from grit_jax import sharding
from grit_jax.config import Config, InputError
from grit_jax.execution import execution
from grit_jax.model.transformer import abstract_model, param_axes
from grit_jax.train.optimizer import learning_rate, make_optimizer
from grit_jax.train.state import Partition, TrainState, abstract_state, shardings_of
from grit_jax.train.step import Objective, make_train_step


class Setup(NamedTuple):
    """The parts of a training step.

    Attributes:
      partition: What is trained.
      objective: The joint loss.
      optimizer: What turns its gradient into updates.
      abstract: Shapes and shardings of the state.
      train_step: The step, compiled when it is called.
    """

    partition: Partition
    objective: Objective
    optimizer: optax.GradientTransformation
    abstract: TrainState
    train_step: Any


def set_up(config: Config, mesh: Mesh) -> Setup:
    """The step of a config whose architecture is resolved.

    Raises:
      InputError: A parameter or the batch is not divisible by the mesh, a text may be longer than the model reads, or
        `train.trainable` names what is no parameter.
    """
    _check_lengths(config)
    _check_batch(config, mesh)
    model = abstract_model(config.model.architecture, config.model.embedding.projection_dim)
    partition = partition_of(config)
    trained_axes, _ = partition.split(param_axes(model))
    optimizer = make_optimizer(config.optimizer, config.train.steps, trained_axes)
    abstract = abstract_state(model, optimizer, mesh, partition)
    objective = Objective(model, config, execution(config.model, sharding.platform(mesh)))
    rate = learning_rate(config.optimizer, config.train.steps)
    train_step = make_train_step(objective, optimizer, rate, shardings_of(abstract))
    return Setup(partition, objective, optimizer, abstract, train_step)


def partition_of(config: Config) -> Partition:
    """Which parameters a config trains."""
    return Partition(tuple(config.train.trainable), config.train.frozen_dtype)


def row_multiples(config: Config, mesh: Mesh) -> tuple[int, int]:
    """What the row counts of the embedding and of the generative batch are multiples of."""
    shards = sharding.axis_size(mesh, "batch")
    return config.train.embedding_chunks * shards, config.train.generative_chunks * shards


def _check_lengths(config: Config) -> None:
    limit = config.model.architecture.max_length
    streams = {"query": config.train.embeds, "passage": config.train.embeds, "generative": config.train.generates}
    for name in (name for name, trained in streams.items() if trained):
        length = getattr(config.data, f"{name}_max_length")
        if length > limit:
            raise InputError(f"data.{name}_max_length={length} is over the model's {limit} tokens; lower it")


def _check_batch(config: Config, mesh: Mesh) -> None:
    shards = sharding.axis_size(mesh, "batch")
    if config.train.embeds and config.data.embedding_batch % shards:
        raise InputError(
            f"data.embedding_batch={config.data.embedding_batch} is not divisible by the mesh's {shards} batch shards "
            f"({' * '.join(f'mesh.{axis}={mesh.shape[axis]}' for axis in sharding.mesh_axes('batch'))}); "
            f"use a multiple of {shards}"
        )
