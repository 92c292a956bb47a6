"""Tuning: finds the fastest settings that fit by ranking with a formula and compiling the best few."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from grit_jax.config import Config
from grit_jax.errors import InputError
from grit_jax.model.transformer import abstract_model, abstract_params
from grit_jax.parallel import sharding
from grit_jax.parallel.chips import GIB
from grit_jax.parallel.execution import num_chunks
from grit_jax.plan.program import Plan, make_plan
from grit_jax.plan.topology import Topology, devices
from grit_jax.plan.work import Lengths, planned_work
from grit_jax.train.objectives import trained_objectives
from grit_jax.train.setup import partition_of

# Share of a device's memory that the formula may fill, as it ignores programs, fragmentation and collectives' buffers.
_HEADROOM = 0.9
# Widths of one token inside a layer in the backward pass, in units of (embed, heads, mlp), counted by hand.
_INSIDE = (8, 8, 6)
_ACTIVATION_BYTES = 2  # bfloat16
_TRAINED_BYTES = 12  # of a trained parameter: itself and two moments, float32


class Candidate(NamedTuple):
    """Settings and their estimated cost.

    Attributes:
      config: The config with these settings.
      overrides: The settings as command-line arguments.
      memory_bytes: Peak of one device.
      work: Time in forward passes: 3 for a step without recomputation on large products.
    """

    config: Config
    overrides: list[str]
    memory_bytes: float
    work: float


class Tuned(NamedTuple):
    """The recommended settings; their plan does not fit if no compiled one did."""

    plan: Plan
    config: Config
    overrides: list[str]


def tune(config: Config, topology: Topology, lengths: Lengths, *, most: int, say: Callable[[str], None]) -> Tuned:
    """Compiles up to `most` candidates, the fastest by the formula first, and recommends the fastest that fits.

    Args:
      config: Config with its architecture resolved.
      topology: The devices to compile for.
      lengths: Lengths of the texts of a step.
      most: Most programs to compile.
      say: Receives a line for each of them.

    Raises:
      InputError: No candidate fits the mesh.
    """
    ranked = sorted(candidates(config, topology, lengths), key=lambda candidate: rank(candidate, topology))
    if not ranked:
        raise InputError(f"no mesh of {topology.num_chips} chips divides this model and batch")
    found: list[Tuned] = []
    for candidate in ranked[:most]:
        plan = make_plan(candidate.config, topology, lengths)
        found.append(Tuned(plan, candidate.config, candidate.overrides))
        seconds = f"{plan.cost.total_seconds:.2f} s" if plan.cost else "not compiled to the end"
        gib = plan.peak_bytes / GIB
        say(f"{' '.join(candidate.overrides)}: {'fits' if plan.fits else 'does not fit'}, {gib:.2f} GiB, {seconds}")
    return min(found, key=lambda each: (not each.plan.fits, each.plan.cost.total_seconds if each.plan.cost else 0))


def rank(candidate: Candidate, topology: Topology) -> tuple[bool, float, float]:
    """Sorting key: candidates that fit first, then the least work, then the least memory."""
    fits = candidate.memory_bytes <= _HEADROOM * topology.chip.hbm_bytes
    return not fits, candidate.work, candidate.memory_bytes


def candidates(config: Config, topology: Topology, lengths: Lengths) -> Iterator[Candidate]:
    """All combinations of mesh, chunks, rematerialisation and rows of a layer that the mesh allows."""
    mesh_devices, state_bytes = devices(topology), _state_bytes(config)
    options = itertools.product((1, 2, 4), (1, 2, 4, 8), ("dots", "full", "offload"), (None, 8, 4, 2, 1))
    for tensor, chunks, remat, layer_rows in options:
        changed = dataclasses.replace(
            config,
            mesh=dataclasses.replace(config.mesh, data=topology.num_slices, fsdp=-1, tensor=tensor),
            model=dataclasses.replace(config.model, remat=remat, layer_rows=layer_rows),
            train=dataclasses.replace(config.train, embedding_chunks=chunks),
        )
        try:
            mesh = sharding.make_mesh(changed.mesh, mesh_devices)
        except InputError:
            continue
        shards = sharding.axis_size(mesh, "batch")
        architecture = config.model.architecture
        if (
            config.data.embedding_batch % shards
            or architecture.embed_dim % shards
            or architecture.num_kv_heads % tensor
        ):
            continue
        objectives = trained_objectives(changed)
        planned = planned_work(architecture, objectives, shards, lengths)
        rows = planned.rows_at_once // shards
        if layer_rows is not None and layer_rows >= rows:
            continue  # the same as all rows
        overrides = [
            f"--mesh.data={topology.num_slices}", "--mesh.fsdp=-1", f"--mesh.tensor={tensor}",
            f"--train.embedding_chunks={chunks}", f"--model.remat={remat}",
            f"--model.layer_rows={'null' if layer_rows is None else layer_rows}",
        ]  # fmt: skip
        memory = _memory(changed, tensor, shards, rows, state_bytes)
        # A stream in chunks costs one more forward pass.
        in_chunks = sum(planned.rows[each.name] for each in objectives if each.stream.num_chunks > 1)
        again = in_chunks / sum(planned.rows.values())
        work = 3 + {"dots": 0.1, "full": 1.0, "offload": 1.05}[remat] + again
        # Tensor parallelism adds a collective to every product; smaller products took 1.11 times as long in two passes
        # and 1.19 in four.
        work *= (1 + 0.05 * (tensor - 1)) * (1 + 0.1 * math.log2(num_chunks(rows, layer_rows)))
        yield Candidate(changed, overrides, memory, work)


def _state_bytes(config: Config) -> float:
    """Mean bytes of a parameter with its optimizer state, which frozen ones lack."""
    shapes = abstract_params(abstract_model(config.model.architecture, config.model.embedding.projection_dim))
    partition = partition_of(config)
    trainable, frozen = (sum(leaf.size for leaf in jax.tree.leaves(part)) for part in partition.split(shapes))
    frozen_bytes = jnp.dtype(partition.frozen_dtype).itemsize
    return (_TRAINED_BYTES * trainable + frozen_bytes * frozen) / (trainable + frozen)


def _memory(config: Config, tensor: int, shards: int, rows: int, state_bytes: float) -> float:
    """Peak bytes of a device: state, saved activations, activations inside one layer, gathered weights."""
    architecture, remat = config.model.architecture, config.model.remat
    embed = architecture.embed_dim
    heads = (architecture.num_heads + 2 * architecture.num_kv_heads) * architecture.head_dim // tensor
    experts = max(1, architecture.num_experts)
    mlp = architecture.mlp_dim * (architecture.experts_per_token if architecture.num_experts else 1) // tensor
    layer = embed * (heads + architecture.num_heads * architecture.head_dim // tensor)
    layer += 3 * experts * embed * architecture.mlp_dim // tensor
    table = architecture.vocab_size * embed // tensor
    tokens = rows * max(config.data.embedding_row_length, config.data.generative_max_length)
    kept = {"full": embed, "offload": 0, "dots": 2 * embed + 2 * heads + 2 * mlp}[remat]
    inside = sum(count * width for count, width in zip(_INSIDE, (embed, heads, mlp), strict=True))
    at_once = tokens * min(1.0, (config.model.layer_rows or rows) / rows)
    state = state_bytes * (architecture.num_layers * layer + 2 * table) / shards
    # A layer's weights and their gradient, and the output table's gradient in float32.
    weights = _ACTIVATION_BYTES * 3 * layer + 8 * table
    return state + weights + _ACTIVATION_BYTES * (architecture.num_layers * tokens * kept + at_once * inside)
