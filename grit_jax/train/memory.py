"""What a training step needs of a device's memory, and what to change where that is too much."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from grit_jax.config import ModelConfig
from grit_jax.data.streams.stream import Stream
from grit_jax.parallel.chips import GIB
from grit_jax.parallel.memory import device_memory
from grit_jax.train.state import TrainState

MORE_DEVICES = "use more chips, or raise mesh.fsdp at the cost of mesh.data"


class StepMemory(NamedTuple):
    """Bytes of a device's memory that a compiled step needs.

    Attributes:
      argument_bytes: State and batch.
      temporary_bytes: Peak of other buffers, without those of donated arguments.
      host_bytes: Arrays in the host's memory.
      peak_bytes: Peak of all buffers; with arrays in the host's memory, and on other devices than TPUs, the sum of
        arguments and temporaries, an upper bound, as the compiler's own number includes the host's or lacks some.
    """

    argument_bytes: int
    temporary_bytes: int
    host_bytes: int
    peak_bytes: int


def step_memory(compiled: jax.stages.Compiled, platform: str) -> StepMemory:
    """The memory of a step compiled for a platform, as its compiler plans it."""
    found: Any = compiled.memory_analysis()
    arguments, temporaries = found.argument_size_in_bytes, found.temp_size_in_bytes
    host = found.host_temp_size_in_bytes
    exact = platform == "tpu" and not host
    return StepMemory(arguments, temporaries, host, found.peak_memory_in_bytes if exact else arguments + temporaries)


def device_bytes(tree: Any) -> int:
    """Bytes of a tree of ShapeDtypeStructs on one device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def state_and_gradient_bytes(abstract: TrainState) -> int:
    """Bytes of parameters, optimizer state and one gradient on one device: the least that a step needs."""
    return device_bytes(abstract) + device_bytes(abstract.trainable)


def packed_rows(stream: Stream, lengths: np.ndarray, shards: int) -> int:
    """Rows of a stream's batch, all devices together, with texts of these lengths.

    Args:
      stream: The stream.
      lengths: int [texts]; tokens of each text of a step.
      shards: Number of equal parts into which a batch's rows are divided.
    """
    multiple = stream.num_chunks * shards
    return math.ceil(stream.packed(lengths).num_rows / multiple) * multiple


def rows_at_once(stream: Stream, num_rows: int, shards: int) -> int:
    """Rows of a stream's batch that pass through the model at once on a device.

    Args:
      stream: The stream.
      num_rows: Rows of its batch, all devices together.
      shards: Number of equal parts into which a batch's rows are divided.
    """
    return num_rows // (stream.num_chunks * shards)


def advice(
    model: ModelConfig,
    rows: Mapping[str, int],
    *,
    limit: int | None,
    state_bytes: int,
    argument_bytes: int | None,
    peak_bytes: int | None,
) -> str:
    """The largest part of the memory of a step that does not fit, and the setting to change.

    Args:
      model: How the model computes.
      rows: Most rows of a device that pass through the model at once, by stream.
      limit: Bytes of a device's memory; None if unknown.
      state_bytes: State and one gradient, in bytes.
      argument_bytes: State and batch, in bytes; None if unknown.
      peak_bytes: All that the step needs, in bytes; None if unknown.
    """
    if limit is not None and state_bytes >= limit:
        return f"state and gradients alone need {gib(state_bytes)} of a device: {MORE_DEVICES}"
    if argument_bytes is not None and peak_bytes is not None and 2 * argument_bytes > peak_bytes:
        return f"the state dominates: {MORE_DEVICES}"
    if model.remat in ("none", "dots"):
        return f"what layers keep dominates: set model.remat=full (it is {model.remat})"
    stream, most = max(rows.items(), key=lambda item: item[1])
    if model.layer_rows is None and most > 1:
        return f"activations dominate: set model.layer_rows={max(1, most // 4)} ({most} rows of a device go together)"
    if model.remat == "full":
        return f"the inputs of layers dominate: set model.remat=offload, or double train.{stream}_chunks"
    return f"activations dominate: lower model.layer_rows (it is {model.layer_rows}), or use more chips"


def lack_of_memory(
    error: jax.errors.JaxRuntimeError, model: ModelConfig, abstract: TrainState, mesh: Mesh, rows: Mapping[str, int]
) -> str:
    """What to change in a run whose devices ran out of memory.

    Args:
      error: What XLA says.
      model: How the model computes.
      abstract: Shapes and shardings of the state.
      mesh: The devices.
      rows: Most rows of a device that pass through the model at once, by stream; empty before the first step.
    """
    limit, state = device_memory(mesh.local_devices[0], mesh.size), device_bytes(abstract)
    of_limit = "" if limit is None else f" of {gib(limit)}"
    held = f"a device{of_limit} holds {gib(state)} of state"
    if rows:
        together = " and ".join(f"{count} {name}" for name, count in rows.items())
        held += f" and takes {together} rows at once"
        remedy = advice(
            model,
            rows,
            limit=limit,
            state_bytes=state_and_gradient_bytes(abstract),
            argument_bytes=state,
            peak_bytes=limit,
        )
    else:
        remedy = f"the state dominates: {MORE_DEVICES}"
    return f"out of memory: {held}; {remedy} (XLA: {' '.join(str(error).split())[:200]})"


def gib(num_bytes: int) -> str:
    """A number of bytes as text: in GiB, or in MiB where it is small."""
    return f"{num_bytes / GIB:,.2f} GiB" if num_bytes >= GIB / 100 else f"{num_bytes / (1 << 20):,.1f} MiB"
