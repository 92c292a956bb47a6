"""The compiled step of a config on a mesh, for training and for planning."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh

from grit_jax.config import TRAIN_ALL, CompilerOption, Config, ModelConfig
from grit_jax.data.streams.stream import Stream
from grit_jax.errors import InputError
from grit_jax.model.lora import ADAPTERS
from grit_jax.model.transformer import abstract_model, param_axes
from grit_jax.parallel import sharding
from grit_jax.parallel.chips import compiler_options
from grit_jax.parallel.execution import compute_dtype, execution
from grit_jax.train.objectives import trained_objectives
from grit_jax.train.objectives.objective import Objective
from grit_jax.train.optimizer import learning_rate, make_optimizer
from grit_jax.train.state import Partition, TrainState, abstract_state, shardings_of
from grit_jax.train.step import JointObjective, make_train_step

# What XLA says of an option, and what it means.
_OPTION_PROBLEMS = {
    r"No such compile option: '(?P<name>[^']*)'": "the compiler for these devices has no option {name!r}",
    r"Failed to parse '(?P<value>[^']*)' into flag (?P<name>\w+)": "{name}={value} is no value of that option",
    r"While setting option (?P<name>\w+), '(?P<value>[^']*)' is not": "{name}={value} is no value of that option",
}


class Setup(NamedTuple):
    """The parts of a training step.

    Attributes:
      partition: Which parameters are trained.
      objective: The joint loss.
      optimizer: Turns its gradient into updates.
      abstract: Shapes and shardings of the state.
      train_step: The step, compiled on its first call.
    """

    partition: Partition
    objective: JointObjective
    optimizer: optax.GradientTransformation
    abstract: TrainState
    train_step: Any


def set_up(config: Config, mesh: Mesh, objectives: Sequence[Objective] | None = None) -> Setup:
    """The step of a config whose architecture is resolved.

    Args:
      config: The run's settings.
      mesh: The devices.
      objectives: What to train; None for those of `train.mode`.

    Raises:
      InputError: The mesh does not divide a parameter or the batch, a limit of texts is over the model's,
        `train.trainable` matches no parameter, or the model cannot have the adapters.
    """
    objectives = trained_objectives(config) if objectives is None else objectives
    for objective in objectives:
        _check_lengths(objective.stream, config.model.architecture.max_length)
        if problem := objective.problem({axis: mesh.shape[axis] for axis in sharding.mesh_axes("batch")}):
            raise InputError(problem)
    model = abstract_model(config.model.architecture, config.model.embedding.projection_dim, config.lora)
    partition = partition_of(config, sharding.platform(mesh))
    trained_axes, _ = partition.split(param_axes(model))
    optimizer = make_optimizer(config.optimizer, config.train.steps, trained_axes)
    abstract = abstract_state(model, optimizer, mesh, partition)
    seed = config.train.seed if config.lora.dropout else None
    joint = JointObjective(model, objectives, execution(config.model, sharding.platform(mesh)), dropout_seed=seed)
    rate = learning_rate(config.optimizer, config.train.steps)
    train_step = make_train_step(
        joint, optimizer, rate, shardings_of(abstract), compiler_options=step_options(config.model, mesh)
    )
    return Setup(partition, joint, optimizer, abstract, train_step)


def lower_step(setup: Setup, mesh: Mesh, rows: Mapping[str, int]) -> jax.stages.Lowered:
    """The step, for batches of so many rows of each stream, ready to be compiled for the mesh's devices."""
    batch = {each.name: each.stream.empty(rows[each.name]) for each in setup.objective.objectives}
    with jax.set_mesh(mesh):
        return setup.train_step.lower(setup.abstract, sharding.abstract_batch(mesh, batch))


def partition_of(config: Config, platform: str) -> Partition:
    """Which parameters a config trains on a platform: `tpu`, `gpu` or `cpu`."""
    patterns, dtype = tuple(config.train.trainable), config.train.frozen_dtype
    if config.lora.r is None:
        return Partition(patterns, "float32" if dtype == "auto" else dtype)
    patterns = (ADAPTERS, *(() if patterns == TRAIN_ALL else patterns))
    narrow = compute_dtype(config.model.compute_dtype, platform)
    return Partition(patterns, narrow if dtype == "auto" else dtype, frozen_apart=True)


def step_options(config: ModelConfig, mesh: Mesh) -> dict[str, CompilerOption]:
    """XLA's options for the training step: the config's, or those of the mesh's chips."""
    if config.compiler_options is not None:
        return dict(config.compiler_options)
    devices = list(mesh.devices.flat)
    slices = {getattr(device, "slice_index", 0) for device in devices}
    return dict(compiler_options(devices[0].device_kind, len(slices)))


def option_problem(error: jax.errors.JaxRuntimeError, config: ModelConfig) -> str | None:
    """Why the compiler refuses one of the step's options, and what to do; None for any other error."""
    remedy = "correct it or leave it out"
    if config.compiler_options is None:
        remedy = "it is one of the chip's own, which another version of libtpu lacks: set model.compiler_options={}"
    for pattern, problem in _OPTION_PROBLEMS.items():
        if found := re.search(pattern, str(error)):
            return f"model.compiler_options: {problem.format(**found.groupdict())}; {remedy}"
    return None


def _check_lengths(stream: Stream, limit: int) -> None:
    for key, length in stream.limits_by_key.items():
        if length > limit:
            raise InputError(f"{key}={length} is over the model's {limit} tokens; lower it")
