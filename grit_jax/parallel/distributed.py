"""The processes of a run: how they find each other, agree, and end when one of them is gone."""

from __future__ import annotations

import contextlib
import glob
import itertools
import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, TypeVar, cast

import jax
import numpy as np
from jax._src import distributed as jax_distributed

from grit_jax.config import DistributedConfig
from grit_jax.errors import InputError
from grit_jax.parallel.chips import DEVICE_FILES

T = TypeVar("T")

_START_SECONDS = 300  # hosts of a pod do not boot at the same time
_LISTED = 8  # differences, and processes of each, that a message names
_LOOK_SECONDS = 0.5  # between looks whether another process was asked to stop
_ANSWER_SECONDS = 0.05  # between looks whether all have said how far they are


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
    # It would swallow the first SIGTERM, also where nothing has been set up to stop.
    jax.config.update("jax_enable_preemption_service", False)
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


class JointStop:
    """Stops all processes after the same piece of work, once any of them is asked to stop.

    Work comes in pieces, such as a step, that all processes begin in the same order; `proceed` is called before each.
    Once one is asked to stop, every process says through the coordination service how many pieces it has begun, and
    begins no other before all have said so: the largest number is the last piece for all. A thread of each process does
    that, so that one whose main thread waits for devices answers too. A context manager.

    Args:
      asked: Is set, in any process, by what wants the run to stop.
    """

    _count = itertools.count()  # all processes make theirs in the same order: this one names it

    def __init__(self, asked: threading.Event):
        self._asked, self._agreed, self._ended = asked, threading.Event(), threading.Event()
        self._lock, self._begun, self._last = threading.Lock(), 0, None
        self._client: Any = jax_distributed.global_state.client
        self._place = f"grit_jax/stop/{next(self._count)}/"
        self._thread = threading.Thread(target=self._run, name="stop", daemon=True) if jax.process_count() > 1 else None

    def __enter__(self) -> Self:
        if self._thread:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        if self._thread:
            self._thread.join()

    def proceed(self) -> bool:
        """Whether the next piece of work may begin: the same answer in every process, and false ever after."""
        if not self._thread:
            return not self._asked.is_set()
        if self._asked.is_set():
            self._agreed.wait()
        with self._lock:
            if self._begun == self._last:
                return False
            self._begun += 1
            return True

    def _run(self) -> None:
        while not self._ended.is_set():
            if self._asked.wait(_LOOK_SECONDS) or self._said():
                self._agree()
                return

    def _agree(self) -> None:
        with self._lock:
            mine, said = f"{self._place}{jax.process_index()}", []
            while len(said) < jax.process_count():
                with contextlib.suppress(jax.errors.JaxRuntimeError):
                    self._client.key_value_set(mine, str(self._begun), allow_overwrite=True)
                if self._ended.wait(_ANSWER_SECONDS):
                    return
                said = self._said()
            self._last = max(said)
        self._agreed.set()

    def _said(self) -> list[int]:
        """How many pieces processes have begun, of those that have said so."""
        try:
            return [int(value) for _, value in self._client.key_value_dir_get(self._place)]
        except jax.errors.JaxRuntimeError:  # the service is away, which JAX itself ends the process for if it stays
            return []


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


def wait_for_all() -> None:
    """Returns when every process of the run is here."""
    gathered(np.zeros(1, np.int32))


def own_share(size: int) -> list[int]:
    """Which of `size` things this process does: as many in every process, the last one again where they do not divide.

    In the order of the processes the shares are all things in order, and then the repeated ones.
    """
    each = -(-size // jax.process_count())
    first = jax.process_index() * each
    return [min(place, size - 1) for place in range(first, first + each)]
