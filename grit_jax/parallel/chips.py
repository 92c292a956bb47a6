"""Specifications of accelerator chips, as published by their makers: memory, peak FLOP/s and bandwidths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")

GIB = 1 << 30

# Device files of accelerators; /dev/vfio/vfio exists without any, /dev/dxg is a GPU under Windows.
DEVICE_FILES = {
    "TPU": ("/dev/accel*", "/dev/vfio/[0-9]*"),
    "NVIDIA GPU": ("/dev/nvidia[0-9]*", "/dev/nvidiactl", "/dev/dxg"),
    "AMD GPU": ("/dev/kfd",),
}

# The environment of libtpu on a machine without a TPU: it queries no TPU host's metadata, takes no lock against other
# processes, and finds the host settings that it would otherwise miss.
LIBTPU_WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
}


@dataclass(frozen=True)
class Chip:
    """One TPU chip, which JAX shows as one device.

    Sources: Google Cloud's pages "TPU v4", "TPU v5e", "TPU v5p" and "TPU v6e", and "How to Scale Your Model"
    (jax-ml.github.io/scaling-book) for the bandwidth of a link in practice.

    Args:
      name: Google Cloud's short name, which also starts libtpu's topology names.
      device_kind: Start of JAX's `device_kind`.
      hbm_bytes: Memory limit of a program, as in the compiler's "out of memory" message.
      peak_flops: Dense bfloat16 FLOP/s.
      hbm_bandwidth: Bytes per second.
      ici_bandwidth: Bytes per second over one link in one direction. A chip has two links for each torus axis.
      num_axes: Axes of the torus.
      dcn_bandwidth: Bytes per second and direction of a chip's share of its host's network cards.
      clock: Cycles per second of the TensorCore: peak_flops / (FLOPs per cycle of its matrix units).
      num_cores: TensorCores per chip, which work on one program together.
      mxu_size: Rows and columns of a matrix unit.
      vector_units: Units of 8 x 128 lanes of a core that work on elements; for v6e what attention takes in a published
        run (docs/planning.md), as Google gives no number.
      host_bandwidth: Bytes per second and direction between the chip and its host's memory.
      compiler_options: XLA's options for a training step beside its defaults, as Google's training recipes for the chip
        set them.
    """

    name: str
    device_kind: str
    hbm_bytes: int
    peak_flops: float
    hbm_bandwidth: float
    ici_bandwidth: float
    num_axes: int
    dcn_bandwidth: float
    clock: float
    num_cores: int
    mxu_size: int = 128
    vector_units: int = 4
    host_bandwidth: float = 16e9
    compiler_options: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def vector_operations(self) -> float:
        """Operations per second of the vector units on single elements."""
        return self.num_cores * self.clock * self.vector_units * 8 * 128


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "TPU v4", int(30.75 * GIB), 275e12, 1.2e12, 45e9, 3, 6.25e9, 1.05e9, 2),
        Chip("v5e", "TPU v5 lite", int(15.75 * GIB), 197e12, 819e9, 45e9, 2, 3.125e9, 1.5e9, 1),
        Chip("v5p", "TPU v5", int(95.74 * GIB), 459e12, 2765e9, 90e9, 3, 6.25e9, 1.75e9, 2),
        Chip(
            "v6e", "TPU v6 lite", int(31.25 * GIB), 918e12, 1638e9, 90e9, 2, 12.5e9, 1.75e9, 1, 256, 8, 32e9,
            # More of the core's vector memory for one fusion, 96 MiB: larger tiles read less from HBM, whose bandwidth
            # is what a v6e runs out of first.
            {"xla_tpu_scoped_vmem_limit_kib": "98304"},
        ),
    )
}  # fmt: skip

# Between slices gradients travel over the data-centre network, ten times slower than the links inside a slice: sum them
# beside the backward pass, in pieces of unequal size.
_MULTISLICE_OPTIONS = {
    "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
    "xla_tpu_data_parallel_opt_different_sized_ops": "true",
}

# Dense bfloat16 FLOP/s of one device, by the start of its `device_kind`. Each of the two cores of a TPU v2 or v3 is a
# device. A T4 has no bfloat16 units: its number is that of float32.
_PEAK_FLOPS = {chip.device_kind: chip.peak_flops for chip in CHIPS.values()} | {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "Tesla T4": 8.1e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Peak dense bfloat16 FLOP/s of a device by JAX's `device_kind`; None if unknown."""
    return _of_device(_PEAK_FLOPS, device_kind)


def memory_bytes(device_kind: str) -> int | None:
    """Bytes of memory for programs on a TPU by JAX's `device_kind`; None if unknown."""
    return _of_device({chip.device_kind: chip.hbm_bytes for chip in CHIPS.values()}, device_kind)


def compiler_options(device_kind: str, num_slices: int) -> dict[str, str]:
    """XLA's options for a training step on devices of a kind, in so many slices; empty where they are no known TPU."""
    by_kind = {chip.device_kind: chip.compiler_options for chip in CHIPS.values()}
    options = _of_device(by_kind, device_kind)
    if options is None:
        return {}
    return {**options, **(_MULTISLICE_OPTIONS if num_slices > 1 else {})}


def _of_device(values: Mapping[str, T], device_kind: str) -> T | None:
    # The longest name that fits: "TPU v5" also starts "TPU v5 lite".
    known = max((name for name in values if device_kind.startswith(name)), key=len, default=None)
    return None if known is None else values[known]
