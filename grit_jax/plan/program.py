"""The train step of a config, compiled for a TPU topology without a TPU: its memory and time."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from grit_jax.checkpoints.opening import open_model
from grit_jax.config import Config, ModelConfig, TransformerConfig
from grit_jax.errors import InputError
from grit_jax.parallel import sharding
from grit_jax.plan.cost import Cost, estimate
from grit_jax.plan.topology import Topology, devices
from grit_jax.plan.work import Lengths, Work, planned_work
from grit_jax.train.memory import advice, rows_at_once, state_and_gradient_bytes, step_memory
from grit_jax.train.objectives.objective import Objective
from grit_jax.train.resolve import resolve_architecture, resolve_tokenizer
from grit_jax.train.setup import Setup, lower_step, option_problem, set_up


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The memory and cost of a compiled step. Bytes are those of one device.

    Attributes:
      topology: The devices that it is compiled for.
      parameters: Parameters of the model.
      work: The content of the step.
      rows_at_once: Most rows of a device that pass through the model at once, by stream.
      steps: Steps of the whole run.
      state_bytes: Parameters, optimizer state and one gradient: the least that the step needs.
      negatives: The form of the contrastive loss; None without one.
      argument_bytes: State and batch; None if the step was too large to compile.
      temporary_bytes: Peak of other buffers; None likewise.
      peak_bytes: Peak of all buffers, as in `StepMemory`; of a step that was too large, what the compiler says of it.
      host_bytes: Arrays in the host's memory.
      largest: Descriptions of the largest buffers if the step was too large to compile.
      cost: The estimate of its time; None likewise.
      compile_seconds: Time of the compilation.
    """

    topology: Topology
    parameters: int
    work: Work
    rows_at_once: dict[str, int]
    steps: int
    state_bytes: int
    negatives: str | None
    argument_bytes: int | None = None
    temporary_bytes: int | None = None
    peak_bytes: int
    host_bytes: int = 0
    largest: tuple[str, ...] = ()
    cost: Cost | None = None
    compile_seconds: float

    @property
    def fits(self) -> bool:
        """Whether a device's memory holds the step."""
        return self.cost is not None and self.peak_bytes <= self.topology.chip.hbm_bytes

    def advice(self, model: ModelConfig) -> str:
        """What dominates the memory of a step that does not fit, and the setting to change."""
        return advice(
            model,
            self.rows_at_once,
            limit=self.topology.chip.hbm_bytes,
            state_bytes=self.state_bytes,
            argument_bytes=self.argument_bytes,
            peak_bytes=self.peak_bytes,
        )

    @property
    def run_hours(self) -> float | None:
        """Predicted hours of all steps of the run; None without a cost."""
        return self.steps * self.cost.total_seconds / 3600 if self.cost else None

    @property
    def chip_hours(self) -> float | None:
        """`run_hours` of all chips together."""
        return self.topology.num_chips * (self.steps * self.cost.total_seconds) / 3600 if self.cost else None

    @property
    def mfu(self) -> float | None:
        """Model FLOPs over the peak FLOPs of the chips in the predicted time; None without a cost."""
        if self.cost is None:
            return None
        return self.work.flops / (self.cost.total_seconds * self.topology.num_chips * self.topology.chip.peak_flops)

    @property
    def recompute_factor(self) -> float | None:
        """Executed FLOPs, with recomputation and padding, over model FLOPs; None without a cost."""
        if self.cost is None:
            return None
        return (self.cost.matmul_flops + self.cost.kernel_flops) * self.topology.num_chips / self.work.flops


def planned_config(config: Config) -> Config:
    """The config with its architecture resolved as in training.

    Model and tokenizer are read only if `model.architecture` lacks a `vocab_size`.

    Raises:
      InputError: They cannot be read, or have another architecture.
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
    """The config's mesh on a topology's devices.

    Raises:
      InputError: libtpu is missing, or the mesh has another number of devices.
    """
    return sharding.make_mesh(config.mesh, devices(topology))


def make_plan(
    config: Config, topology: Topology, lengths: Lengths, *, streams: Sequence[Objective] | None = None
) -> Plan:
    """Compiles the step for the topology.

    Args:
      config: Config with its architecture resolved (`planned_config`).
      topology: The devices to compile for.
      lengths: Lengths of the texts of a step.
      streams: As in `Trainer`.

    Raises:
      InputError: libtpu is missing, the config does not fit the mesh, or the compiler does not know an option.
    """
    mesh = planned_mesh(config, topology)
    setup = set_up(config, mesh, streams)
    work, lowered = lower(setup, mesh, lengths)
    architecture = config.model.architecture
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(setup.abstract.params))
    shards = sharding.axis_size(mesh, "batch")
    forms = (objective.negatives(shards, architecture.embed_dim) for objective in setup.objective.objectives)
    about: dict[str, Any] = {
        "topology": topology, "parameters": parameters, "work": work, "steps": config.train.steps,
        "rows_at_once": {
            each.name: rows_at_once(each.stream, work.rows[each.name], shards) for each in setup.objective.objectives
        },
        "state_bytes": state_and_gradient_bytes(setup.abstract),
        "negatives": next(filter(None, forms), None),
    }  # fmt: skip
    started = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if problem := option_problem(error, config.model):
            raise InputError(problem) from error
        used = _used_bytes(str(error))
        if used is None:
            raise
        seconds = time.monotonic() - started
        return Plan(**about, peak_bytes=used, largest=_largest_buffers(str(error)), compile_seconds=seconds)
    seconds = time.monotonic() - started
    return Plan(
        **about,
        **step_memory(compiled, sharding.platform(mesh))._asdict(),
        cost=estimate(compiled.as_text() or "", topology, expert_fill=_expert_fill(architecture, mesh, work)),
        compile_seconds=seconds,
    )


def _expert_fill(architecture: TransformerConfig, mesh: jax.sharding.Mesh, work: Work) -> float:
    """Share of the rows for a device's experts that hold a token: all get equally many, and no padding."""
    if not architecture.num_experts:
        return 1.0
    shards, per_token = sharding.axis_size(mesh, "experts"), architecture.experts_per_token
    # With experts on several devices, there are rows for the case that one device's experts get all tokens.
    reserved = shards * min(per_token, architecture.num_experts // shards) if shards > 1 else per_token
    return work.tokens / work.capacity * per_token / reserved


def lower(setup: Setup, mesh: jax.sharding.Mesh, lengths: Lengths) -> tuple[Work, jax.stages.Lowered]:
    """The content of a step with texts of these lengths, and the step lowered for the devices of a mesh."""
    objectives, architecture = setup.objective.objectives, setup.objective.model.config
    work = planned_work(architecture, objectives, sharding.axis_size(mesh, "batch"), lengths)
    return work, lower_step(setup, mesh, work.rows)


_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def _used_bytes(message: str) -> int | None:
    """Bytes that a step needs, from the compiler's message that a device's memory is too small; None for another error.

    The wording varies, but names the need and the smaller limit.
    """
    summary = message.partition("Largest program allocations")[0]
    if not re.search(r"ran out of memory (in memory space|on) hbm", summary, re.IGNORECASE):
        return None
    sizes = re.findall(r"\b(\d+(?:\.\d+)?)([KMGT])", summary)
    return max((round(float(number) * _UNITS[unit]) for number, unit in sizes), default=None)


def _largest_buffers(message: str) -> tuple[str, ...]:
    """The largest allocations in that message: size, shape and operation."""
    found = re.findall(r"Size: ([\d.]+[KMG])(.*?)(?=\n\s*={3,}|\Z)", message, re.DOTALL)
    texts = []
    for size, rest in found[:5]:
        shape, operation = (re.search(pattern, rest) for pattern in (r"Shape: (\S+?)[{\s]", r'op_name="([^"]*)"'))
        texts.append(" ".join([size, *(match[1] for match in (shape, operation) if match)]))
    return tuple(texts)
