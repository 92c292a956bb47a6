"""The processes of a run: they start, agree and stop together, and end when one of them is gone."""

from __future__ import annotations

import contextlib
import glob
import itertools
import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any, Self, TypeVar, cast

import jax
import numpy as np
from jax._src import distributed as jax_distributed

from grit_jax.config import DistributedConfig
from grit_jax.errors import InputError, listed
from grit_jax.parallel.chips import DEVICE_FILES

T = TypeVar("T")

_START_SECONDS = 300  # hosts of a pod do not boot at the same time
_STOP_POLL_SECONDS = 0.5  # between polls whether another process is to stop
_AGREE_POLL_SECONDS = 0.05  # between polls whether all have published their progress


def start(config: DistributedConfig) -> None:
    """Joins the processes of the run; call it before anything uses a device.

    From then on a process that is silent for `timeout_seconds`, dead or stuck, ends all others with an error. An
    uncaught error ends its process at once, as a normal exit would wait for threads, and a save's threads wait for the
    other processes.

    Raises:
      InputError: The others cannot be reached at the given address.
      RuntimeError: The hosts of a TPU cannot find each other.
    """
    on_tpu = any(glob.glob(pattern) for pattern in DEVICE_FILES["TPU"])
    if config.coordinator is None and not on_tpu:
        return
    if not on_tpu:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # This service would swallow the first SIGTERM even if nothing handles it.
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
        if config.coordinator is None:  # not the user's mistake: a host is gone, or not up yet
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
    finally:  # even if the log's disk is full
        os._exit(1)


class JointStop:
    """Stops all processes after the same unit of work, once any of them is asked to. A context manager.

    All processes begin units of work, such as steps, in the same order, and call `proceed` before each. Once one is
    asked to stop, every process publishes through the coordination service how many units it has begun, and begins no
    other until all have published: the largest number is the last unit for all. A thread in each process does this, so
    that a process whose main thread waits for devices takes part too.

    Args:
      asked: Set, in any process, to stop the run.
    """

    _count = itertools.count()  # names an instance: all processes construct theirs in the same order

    def __init__(self, asked: threading.Event):
        self._asked, self._agreed, self._ended = asked, threading.Event(), threading.Event()
        self._lock, self._begun, self._last = threading.Lock(), 0, None
        self._client: Any = jax_distributed.global_state.client
        self._folder = f"grit_jax/stop/{next(self._count)}/"  # of keys in the coordination service
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
        """Whether the next unit of work may begin: the same in every process, and false for good once false."""
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
            if self._asked.wait(_STOP_POLL_SECONDS) or self._published():
                self._agree()
                return

    def _agree(self) -> None:
        with self._lock:
            key, published = f"{self._folder}{jax.process_index()}", []
            while len(published) < jax.process_count():
                with contextlib.suppress(jax.errors.JaxRuntimeError):
                    self._client.key_value_set(key, str(self._begun), allow_overwrite=True)
                if self._ended.wait(_AGREE_POLL_SECONDS):
                    return
                published = self._published()
            self._last = max(published)
        self._agreed.set()

    def _published(self) -> list[int]:
        """The numbers of begun units that processes have published."""
        try:
            return [int(value) for _, value in self._client.key_value_dir_get(self._folder)]
        except jax.errors.JaxRuntimeError:  # the service is unreachable; if it stays so, JAX ends the process
            return []


def in_first_process(action: Callable[[], T]) -> T | None:
    """The result of `action` in process 0; None in the others, which wait. Its InputError is raised in all."""
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
    """The result of `action` here, once it has succeeded in every process.

    Raises:
      InputError: It raised one in some process; this process raises its own, or else the first of the others.
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
    """Returns when all processes have the same facts.

    Every host computes batches and programs from its own config and data. If these differ, the hosts train on garbage
    or wait for each other forever.

    Args:
      facts: Values by name.

    Raises:
      InputError: They differ, in every process; the message names the facts and the processes.
    """
    everywhere = [json.loads(text) for text in gathered_texts(json.dumps([socket.gethostname(), dict(facts)]))]
    differences = []
    for name in dict.fromkeys(name for _, found in everywhere for name in found):
        processes: dict[str, list[str]] = {}
        for process, (host, found) in enumerate(everywhere):
            processes.setdefault(found.get(name, "missing"), []).append(f"{process} ({host})")
        if len(processes) > 1:
            rarest_first = sorted(processes.items(), key=lambda item: len(item[1]))
            values = [f"{value} on process {listed(who, separator=', ')}" for value, who in rarest_first]
            differences.append(f"{name} is {', '.join(values)}")
    if differences:
        raise InputError(
            f"the processes of this run differ: {listed(differences)}; give every host the same config, data and model"
        )


def gathered_texts(text: str) -> list[str]:
    """The texts of all processes, in process order, in every process."""
    content = np.frombuffer(text.encode(), np.uint8)
    sizes = gathered(np.array(len(content), np.int32))
    rows = gathered(np.pad(content, (0, max(sizes) - len(content)))) if max(sizes) else [content] * len(sizes)
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


def gathered(rows: np.ndarray) -> np.ndarray:
    """The arrays of all processes, of equal shape, stacked: [processes, ...], in every process."""
    if jax.process_count() == 1:
        return rows[None]
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(rows))


def wait_for_all() -> None:
    """Returns when every process of the run has called this."""
    gathered(np.zeros(1, np.int32))


def own_share(size: int) -> list[int]:
    """Indices of this process's share of `size` items: equally many in every process, padded with the last item.

    Joined in process order, the shares are all items in order, then the padding.
    """
    each = -(-size // jax.process_count())
    first = jax.process_index() * each
    return [min(i, size - 1) for i in range(first, first + each)]
