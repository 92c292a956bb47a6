"""The processes of a run: how they find each other, agree, and end when one of them is gone."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from grit_jax import sharding
from grit_jax.chips import DEVICE_FILES
from grit_jax.config import DistributedConfig, InputError

T = TypeVar("T")

_START_SECONDS = 300  # hosts of a pod do not boot at the same time
_MESSAGE_BYTES = 1024


def start(config: DistributedConfig) -> None:
    """Joins the processes of the run; to be called before anything uses a device.

    From then on a process that is silent for `timeout_seconds`, dead or stuck, ends all others with an error, and an
    error that nobody catches ends its process at once: the usual way out waits for threads, and those of a save wait
    for the other processes.

    Raises:
      InputError: The others cannot be reached at the address that was given.
      RuntimeError: The hosts of a TPU do not find each other.
    """
    on_tpu = any(glob.glob(pattern) for pattern in DEVICE_FILES["TPU"])
    if config.coordinator is None and not on_tpu:
        return
    if not on_tpu:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            config.coordinator,
            config.num_processes,
            config.process_id,
            initialization_timeout=_START_SECONDS,
            heartbeat_timeout_seconds=config.timeout_seconds,
            shutdown_timeout_seconds=config.timeout_seconds,
        )
    except (RuntimeError, ValueError) as error:
        if config.coordinator is None:  # nothing that the user gave: a host is gone, or not there yet
            raise RuntimeError("the hosts of this TPU did not find each other; start all of them again") from error
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"distributed.coordinator={config.coordinator}: the processes of the run did not find each other ({reason})"
        ) from error
    sys.excepthook = _leave


def _leave(*error: Any) -> None:
    try:
        sys.__excepthook__(*error)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:  # also where the disk of the log is full
        os._exit(1)


class Agreement:
    """A question that processes answer together at every step: whether any of them was asked to stop.

    The answer comes out of a sum over the devices of the mesh, so that all processes have the same one for a step.
    """

    def __init__(self, mesh: Mesh):
        self._split = sharding.flat(mesh)
        self._size = mesh.size
        self._sum = jax.jit(jnp.sum, out_shardings=sharding.replicated(mesh))

    def ask(self, asked: bool) -> jax.Array:
        """Starts the vote of one step; the answer is true when read as a bool if any process voted so."""
        here = np.full(len(self._split.addressable_devices), asked, np.int32)
        return self._sum(jax.make_array_from_process_local_data(self._split, here, (self._size,)))


def in_first_process(action: Callable[[], T]) -> T | None:
    """What `action` gives in process 0, None in the others, which wait for it; an InputError of it is raised in all."""
    result, message = None, ""
    if jax.process_index() == 0:
        try:
            result = action()
        except InputError as error:
            message = str(error)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        sent = message.encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES)
        received = multihost_utils.broadcast_one_to_all(np.frombuffer(sent, np.uint8))
        message = np.asarray(received).tobytes().decode(errors="ignore").rstrip()
    if message:
        raise InputError(message)
    return result


def gathered(rows: np.ndarray) -> np.ndarray:
    """The arrays of all processes, which have one shape, stacked by process: [processes, ...], in every process."""
    if jax.process_count() == 1:
        return rows[None]
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(rows))


def own_share(size: int) -> list[int]:
    """Which of `size` things this process does: as many in every process, the last one again where they do not divide.

    In the order of the processes the shares are all things in order, and then the repeated ones.
    """
    each = -(-size // jax.process_count())
    first = jax.process_index() * each
    return [min(place, size - 1) for place in range(first, first + each)]
