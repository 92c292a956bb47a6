"""Google Cloud's names for TPU slices, and the abstract devices that libtpu compiles for."""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from grit_jax.errors import InputError, install
from grit_jax.parallel.chips import CHIPS, LIBTPU_WITHOUT_TPU, Chip

if TYPE_CHECKING:
    import jax

Shape = tuple[int, ...]

# The shapes of slices: Google Cloud's pages on each TPU version.
_SHAPES_2D: list[Shape] = [(1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)]
_SHAPES_3D: list[Shape] = [
    (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 4, 12), (4, 8, 8), (4, 8, 12), (8, 8, 8),
    (8, 8, 12), (8, 8, 16), (8, 16, 16),
]  # fmt: skip
_SHAPES = {
    version: {math.prod(shape): shape for shape in shapes}
    for version, shapes in {
        "v4": _SHAPES_3D,
        "v5e": _SHAPES_2D,
        "v5p": [*_SHAPES_3D, (16, 16, 16), (16, 16, 24)],
        "v6e": _SHAPES_2D,
    }.items()
}
# Other names of Google Cloud for a version.
_ALIASES = {"v5litepod": "v5e"}

# Optical switches close a dimension of a 3-D slice into a ring if every dimension is a multiple of a cube's side; a 2-D
# slice has a ring along each side of the whole pod.
_CUBE_SIDE, _POD_SIDE_2D = 4, 16


@dataclass(frozen=True)
class Topology:
    """One or more equal slices of a TPU pod; slices are joined by the data-centre network.

    Args:
      chip: The chip of every device.
      shape: Chips of a slice along each torus axis.
      num_slices: Number of slices.
    """

    chip: Chip
    shape: Shape
    num_slices: int = 1

    @property
    def chips_per_slice(self) -> int:
        """Chips of one slice."""
        return math.prod(self.shape)

    @property
    def num_chips(self) -> int:
        """Chips of all slices; as many devices."""
        return self.chips_per_slice * self.num_slices

    @property
    def libtpu_name(self) -> str:
        """The name that libtpu gives one slice, such as v5p:4x4x4."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def wrap(self) -> tuple[bool, ...]:
        """Which dimensions of a slice are rings, always three."""
        if self.chip.num_axes == 2:
            rings = tuple(size == _POD_SIDE_2D for size in self.shape)
        else:
            rings = (all(size % _CUBE_SIDE == 0 for size in self.shape),) * len(self.shape)
        return (*rings, False)[:3]


def topology_names() -> list[str]:
    """Google Cloud's names of all known slices, such as v5p-128."""
    return [f"{name}-{chips * CHIPS[name].num_cores}" for name, shapes in _SHAPES.items() for chips in shapes]


def parse_topology(name: str, *, slices: int = 1) -> Topology:
    """The topology of a Google Cloud accelerator type.

    Args:
      name: Such as v5p-128 or v5litepod-256. v4 and v5p names count TensorCores, v5e and v6e names count chips.
      slices: Number of slices of that type.

    Raises:
      InputError: The name is not one of `topology_names()`, or `slices` is less than 1.
    """
    version, _, count = name.partition("-")
    version = _ALIASES.get(version, version)
    names = topology_names()
    if f"{version}-{count}" not in names:
        same = [known for known in names if known.startswith(f"{version}-")]
        raise InputError(f"unknown TPU topology {name!r}; known: {', '.join(same or names)}")
    if slices < 1:
        raise InputError(f"slices={slices}: a topology has at least one slice")
    chip = CHIPS[version]
    return Topology(chip, _SHAPES[version][int(count) // chip.num_cores], slices)


def devices(topology: Topology) -> list[jax.Device]:
    """The abstract devices of a topology, to build a mesh from and compile for; needs no TPU.

    Devices are ordered slice by slice. Sets the environment that libtpu reads on loading, so call this before anything
    else loads it; and keeps JAX on the CPU unless JAX_PLATFORMS says otherwise.

    Raises:
      InputError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(f"compiling for {topology.libtpu_name} needs libtpu (no TPU is needed); {install('tpu')}")
    for key, value in LIBTPU_WITHOUT_TPU.items():  # the call gives the topology, whatever host this names
        os.environ.setdefault(key, value)
    import jax
    from jax.experimental import topologies

    if "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")
    options: dict[str, object] = {"num_slices": topology.num_slices, "wrap": topology.wrap}
    if topology.chip.num_cores > 1:
        options["chip_config_name"] = "megacore"  # one device per chip: both cores work on one program
    if topology.chips_per_slice == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    return topologies.get_topology_desc(topology.libtpu_name, "tpu", **options).devices
