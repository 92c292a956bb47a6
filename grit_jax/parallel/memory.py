"""The memory of a device: how much there is, and whether it ran out."""

from __future__ import annotations

import os

import jax

from grit_jax.parallel.chips import memory_bytes


def device_memory(device: jax.Device, num_devices: int) -> int | None:
    """Bytes that a device may use, for a CPU device its share of the machine's memory; None if unknown."""
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit:
        return limit
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // num_devices
    return memory_bytes(device.device_kind)


def ran_out(error: BaseException) -> bool:
    """Whether an error says that a device's memory is too small, for a program or for an array.

    A kernel that asks for more than a core's vector memory fails with the same status: no smaller batch helps it.
    """
    text = str(error)
    return (
        isinstance(error, jax.errors.JaxRuntimeError)
        and "RESOURCE_EXHAUSTED" in text
        and "memory space vmem" not in text.lower()
    )
