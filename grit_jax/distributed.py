"""The processes of a run: how they find each other, agree, and end when one of them is gone."""

from __future__ import annotations

import glob
import json
import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from grit_jax import sharding
from grit_jax.chips import DEVICE_FILES
from grit_jax.config import DistributedConfig, InputError

T = TypeVar("T")

_START_SECONDS = 300  # hosts of a pod do not boot at the same time
_LISTED = 8  # differences, and processes of each, that a message names


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
    if message := gathered_texts(message)[0]:
        raise InputError(message)
    return result


def in_every_process(action: Callable[[], T]) -> T:
    """What `action` gives here, once it has succeeded in every process.

    Raises:
      InputError: It raised one in some process: here that of this process, or else the first one, with its process.
    """
    try:
        result, message = action(), ""
    except InputError as error:
        result, message = None, str(error)
    messages = gathered_texts(message)
    if message:
        raise InputError(message)
    for process, other in enumerate(messages):
        if other:
            raise InputError(f"process {process}: {other}")
    return cast(T, result)


def require_same(facts: Mapping[str, str]) -> None:
    """Returns when all processes give the same facts.

    Batches and programs are computed on every host from what it reads itself, its config and its data above all. Where
    these differ, the hosts train on garbage, or wait for each other for ever.

    Args:
      facts: Values by name.

    Raises:
      InputError: They differ, in every process; the message says which, and on which process.
    """
    everywhere = [json.loads(text) for text in gathered_texts(json.dumps([socket.gethostname(), dict(facts)]))]
    differences = []
    for name in dict.fromkeys(name for _, found in everywhere for name in found):
        processes: dict[str, list[str]] = {}
        for process, (host, found) in enumerate(everywhere):
            processes.setdefault(found.get(name, "missing"), []).append(f"{process} ({host})")
        if len(processes) > 1:
            rarest_first = sorted(processes.items(), key=lambda item: len(item[1]))
            values = [f"{value} on process {_listed(who, ', ')}" for value, who in rarest_first]
            differences.append(f"{name} is {', '.join(values)}")
    if differences:
        raise InputError(
            f"the processes of this run differ: {_listed(differences, '; ')}; "
            "give every host the same config, data and model"
        )


def _listed(items: Sequence[str], separator: str) -> str:
    more = len(items) - _LISTED
    return separator.join(items[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def gathered_texts(text: str) -> list[str]:
    """The texts of all processes, in their order, in every process."""
    content = np.frombuffer(text.encode(), np.uint8)
    sizes = gathered(np.array(len(content), np.int32))
    rows = gathered(np.pad(content, (0, max(sizes) - len(content)))) if max(sizes) else [content] * len(sizes)
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


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
