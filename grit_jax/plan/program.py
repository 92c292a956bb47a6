"""The train step of a config, compiled for a TPU topology without one: memory, time and what decides them."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from grit_jax import sharding
from grit_jax.batch import EmbeddingBatch, GenerativeBatch, GritBatch
from grit_jax.config import Config, InputError, TransformerConfig
from grit_jax.contrastive import resolve_negatives
from grit_jax.loading import open_model
from grit_jax.model.transformer import abstract_model, abstract_params
from grit_jax.plan.cost import Cost, estimate
from grit_jax.plan.topology import Topology, devices
from grit_jax.plan.work import Lengths, Work, planned_work
from grit_jax.train.dry_run import state_and_gradient_bytes
from grit_jax.train.resolve import resolve_architecture, resolve_tokenizer
from grit_jax.train.setup import Setup, row_multiples, set_up


@dataclass(frozen=True)
class Plan:
    """What the compiler says of a step. Bytes are those of one device.

    Attributes:
      topology: What it is compiled for.
      parameters: Of the model.
      work: What the step holds.
      steps: Of the whole run.
      state_bytes: Parameters, optimizer state and one gradient: the least that the step needs.
      negatives: The form of the contrastive loss, None without one.
      argument_bytes: State and batch; None where the compiler gave up.
      temporary_bytes: Most that lives besides, buffers of donated arguments not counted; None likewise.
      peak_bytes: Most that lives at once; where arrays are kept in the host's memory an upper bound, arguments and
        temporaries, as the compiler's own figure counts the host's too.
      host_bytes: What is kept in the host's memory.
      largest: Descriptions of the largest buffers, where the compiler tells them.
      cost: The estimate of its time; None where the compiler gave up.
      compile_seconds: How long compiling took.
    """

    topology: Topology
    parameters: int
    work: Work
    steps: int
    state_bytes: int
    negatives: str | None
    argument_bytes: int | None
    temporary_bytes: int | None
    peak_bytes: int
    host_bytes: int
    largest: tuple[str, ...]
    cost: Cost | None
    compile_seconds: float

    @property
    def fits(self) -> bool:
        """Whether a device's memory holds the step."""
        return self.cost is not None and self.peak_bytes <= self.topology.chip.hbm_bytes

    @property
    def run_seconds(self) -> float | None:
        """Predicted time of all steps of the run; None where the compiler gave up."""
        return None if self.cost is None else self.steps * self.cost.total_seconds

    @property
    def mfu(self) -> float | None:
        """Model FLOPs over what the chips could do in the predicted time."""
        if self.cost is None:
            return None
        return self.work.flops / (self.cost.total_seconds * self.topology.num_chips * self.topology.chip.peak_flops)

    @property
    def recompute_factor(self) -> float | None:
        """FLOPs executed over model FLOPs: recomputation and padding."""
        if self.cost is None:
            return None
        return (self.cost.matmul_flops + self.cost.kernel_flops) * self.topology.num_chips / self.work.flops


def planned_config(config: Config) -> Config:
    """The config with its architecture resolved, as training resolves it.

    Model and tokenizer are read only where `model.architecture` leaves something open, such as its `vocab_size`.

    Raises:
      InputError: They cannot be read, or are not of that architecture.
    """
    architecture = config.model.architecture
    if architecture.vocab_size:
        resolved = architecture.resolve(architecture.vocab_size)
    else:
        try:
            pretrained = open_model(config.model.init) if config.model.init else None
            resolved = resolve_architecture(config, pretrained, resolve_tokenizer(config, pretrained))
        except InputError as error:
            raise InputError(
                f"{error}; with model.architecture.vocab_size neither model nor tokenizer is read"
            ) from error
    return dataclasses.replace(config, model=dataclasses.replace(config.model, architecture=resolved))


def planned_mesh(config: Config, topology: Topology) -> jax.sharding.Mesh:
    """The config's mesh of a topology's devices.

    Raises:
      InputError: libtpu is missing, or the mesh has another number of devices.
    """
    return sharding.make_mesh(config.mesh, devices(topology))


def make_plan(config: Config, topology: Topology, lengths: Lengths) -> Plan:
    """Compiles the step for the topology.

    Args:
      config: With its architecture resolved (`planned_config`).
      topology: What to compile for.
      lengths: Of the texts of a step.

    Raises:
      InputError: libtpu is missing, or the config does not fit the mesh.
    """
    mesh = planned_mesh(config, topology)
    work = planned_work(config, row_multiples(config, mesh), lengths)
    setup = set_up(config, mesh)
    lowered = _lower(setup, config, mesh, work)
    architecture, width = config.model.architecture, config.model.embedding.projection_dim
    shapes = abstract_params(abstract_model(architecture, width))
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    data, shards = config.data, sharding.axis_size(mesh, "batch")
    texts = (data.embedding_batch, data.embedding_batch * data.group_size)
    form = resolve_negatives(config.loss.negatives, *texts, width or architecture.embed_dim, shards)
    about: dict[str, Any] = {
        "topology": topology, "parameters": parameters, "work": work, "steps": config.train.steps,
        "state_bytes": state_and_gradient_bytes(setup.abstract),
        "negatives": form if config.train.embeds else None,
    }  # fmt: skip
    started = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        used = _used_bytes(str(error))
        if used is None:
            raise
        return Plan(
            **about, argument_bytes=None, temporary_bytes=None, peak_bytes=used, host_bytes=0,
            largest=_largest_buffers(str(error)), cost=None, compile_seconds=time.monotonic() - started,
        )  # fmt: skip
    seconds = time.monotonic() - started
    memory: Any = compiled.memory_analysis()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    host = memory.host_temp_size_in_bytes
    return Plan(
        **about,
        argument_bytes=arguments,
        temporary_bytes=temporaries,
        peak_bytes=arguments + temporaries if host else memory.peak_memory_in_bytes,
        host_bytes=host,
        largest=(),
        cost=estimate(compiled.as_text() or "", topology, expert_fill=_expert_fill(architecture, mesh)),
        compile_seconds=seconds,
    )


def _expert_fill(architecture: TransformerConfig, mesh: jax.sharding.Mesh) -> float:
    """Share of the rows kept for tokens of a device's experts that hold one, when experts get equally many."""
    if not architecture.num_experts:
        return 1.0
    shards, per_token = sharding.axis_size(mesh, "experts"), architecture.experts_per_token
    return per_token / (shards * min(per_token, architecture.num_experts // shards)) if shards > 1 else 1.0


def lower_step(config: Config, topology: Topology, lengths: Lengths) -> jax.stages.Lowered:
    """The step, ready to be compiled for the topology; arguments and errors as those of `make_plan`."""
    mesh = planned_mesh(config, topology)
    return _lower(set_up(config, mesh), config, mesh, planned_work(config, row_multiples(config, mesh), lengths))


def _lower(setup: Setup, config: Config, mesh: jax.sharding.Mesh, work: Work) -> jax.stages.Lowered:
    with jax.set_mesh(mesh):
        return setup.train_step.lower(setup.abstract, _abstract_batch(config, mesh, work))


def _abstract_batch(config: Config, mesh: jax.sharding.Mesh, work: Work) -> GritBatch:
    def array(dtype: Any, *shape: int) -> Any:
        return np.broadcast_to(np.zeros((), dtype), shape)

    data = config.data
    queries, passages = data.embedding_batch, data.embedding_batch * data.group_size
    embedding = generative = None
    if work.rows[0]:
        shape = (work.rows[0], data.embedding_row_length)
        ids = [array(np.int32, *shape)] * 3
        slots = array(np.int32, queries), array(np.int32, passages)
        embedding = EmbeddingBatch(
            *ids, array(np.float32, *shape), *slots, array(np.float32, queries), array(np.int32, passages)
        )
    if work.rows[1]:
        shape = (work.rows[1], data.generative_max_length)
        generative = GenerativeBatch(*[array(np.int32, *shape)] * 4, array(np.float32, *shape))
    return sharding.abstract_batch(mesh, GritBatch(embedding, generative))


_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def _used_bytes(message: str) -> int | None:
    """Bytes that the compiler says it needs when it runs out of a device's memory; None for another error.

    The compiler words it in several ways, but always names what is needed and the smaller amount that there is.
    """
    summary = message.partition("Largest program allocations")[0]
    if not re.search(r"ran out of memory (in memory space|on) hbm", summary, re.IGNORECASE):
        return None
    sizes = re.findall(r"\b(\d+(?:\.\d+)?)([KMGT])", summary)
    return max((round(float(number) * _UNITS[unit]) for number, unit in sizes), default=None)


def _largest_buffers(message: str, most: int = 5) -> tuple[str, ...]:
    """The largest allocations in such a message: size, shape and operation."""
    found = re.findall(r"Size: ([\d.]+[KMG])(.*?)(?=\n\s*={3,}|\Z)", message, re.DOTALL)
    texts = []
    for size, rest in found[:most]:
        shape, operation = (re.search(pattern, rest) for pattern in (r"Shape: (\S+?)[{\s]", r'op_name="([^"]*)"'))
        texts.append(" ".join([size, *(match[1] for match in (shape, operation) if match)]))
    return tuple(texts)
