"""Bytes and time of collectives over the torus of a slice and between slices."""

from __future__ import annotations

import dataclasses
import itertools
import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from grit_jax.plan.hlo import Computation, Instruction, Module, replica_groups
from grit_jax.plan.topology import Topology

_OPCODES = (
    "all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute", "ragged-all-to-all",
    "reduce-scatter",
)  # fmt: skip

# Instructions that start work on another thread, such as a collective of the SparseCores, while this one goes on.
THREADS = ("async-start", "call-start")
# How often a ring carries the array: an all-reduce is a reduce-scatter and an all-gather; in an all-to-all over n chips
# an element passes n/4 links on average, in a gather n.
_PASSES = {"all-to-all": 1 / 4, "ragged-all-to-all": 1 / 4, "all-reduce": 2}

Network = Literal["ici", "dcn", "host"]


@dataclass(frozen=True)
class Transfer:
    """One collective on one device.

    Args:
      opcode: XLA's name; reduce-scatter also if XLA:TPU writes an all-reduce whose result is sliced at once.
      network: ici within a slice, dcn between slices, host to and from the host's memory.
      num_bytes: Bytes of the whole array that is gathered, reduced, permuted or copied.
      seconds: Time if nothing else uses the network.
      source: The source line; empty if unknown.
    """

    opcode: str
    network: Network
    num_bytes: int
    seconds: float
    source: str = ""


def is_collective(instruction: Instruction) -> bool:
    """Whether an instruction is a collective, or the start of one."""
    return instruction.opcode.removesuffix("-start") in _OPCODES


def collectives_within(module: Module, instruction: Instruction) -> Iterator[tuple[Computation, Instruction]]:
    """The collectives that a fusion, a call or the start of a thread runs, each with its own computation."""
    for key in ("calls", "to_apply"):
        if instruction.opcode in ("fusion", "call", *THREADS) and instruction.attribute(key):
            called = module.called(instruction, key)
            for inner in called:
                if is_collective(inner):
                    yield called, inner
                yield from collectives_within(module, inner)


def transfer(computation: Computation, instruction: Instruction, topology: Topology) -> Transfer:
    """Prices a collective within a slice; across slices XLA:TPU makes transfers between hosts (`slice_transfer`)."""
    chip = topology.chip
    opcode = instruction.opcode.removesuffix("-start")
    operand = sum(array.num_bytes for source in computation.operands(instruction) for array in source.arrays)
    if opcode == "collective-permute":
        return Transfer(opcode, "ici", operand, operand / chip.ici_bandwidth)
    if opcode == "all-reduce" and _is_sliced(computation, instruction):
        opcode = "reduce-scatter"
    size = len(replica_groups(instruction, topology.chips_per_slice)[0])
    links = _links(instruction, size, topology) * chip.ici_bandwidth
    num_bytes = operand * size if opcode == "all-gather" else operand
    seconds = _PASSES.get(opcode, 1) * num_bytes * (size - 1) / size / links
    return Transfer(opcode, "ici", num_bytes, seconds)


def _links(collective: Instruction, size: int, topology: Topology) -> int:
    """Links of a chip that a collective uses in each direction: two on every axis that is a ring, one on another.

    The text names how many axes it takes, or a single ring through all chips, or SparseCores' rings along axes;
    otherwise a group of `size` chips takes the fewest axes that hold it.
    """
    text = collective.attributes
    if re.search('Type: 1D|"StrategyRing"|1DRing', text):
        return 2
    named = re.search(r'"emitter":"(\d)D|\bnum_dims:(\d)', text)
    rings = set(re.findall(r"ICI_RING_DIM_(\w+?)_", text))
    sides = sorted(zip(topology.shape, topology.wrap, strict=False), reverse=True)
    axes = int(named[1] or named[2]) if named else len(rings) or _fewest_axes(size, [side for side, _ in sides])
    return sum(2 if is_ring else 1 for side, is_ring in sides[:axes] if side > 1)


def _fewest_axes(size: int, sides: list[int]) -> int:
    held = itertools.accumulate(sides, operator.mul)
    return next((axes for axes, chips in enumerate(held, start=1) if chips >= size), len(sides))


def crosses_slices(instruction: Instruction) -> bool:
    """Whether a send or receive is part of a collective over the data-centre network."""
    return instruction.attribute("_xla_host_transfer_handler_name") == "xla_megascale_runtime"


def rendezvous(instruction: Instruction) -> str:
    """The name that a send shares with the receive of its result."""
    return instruction.attribute("_xla_host_transfer_rendezvous") or instruction.name


def slice_transfer(computation: Computation, send: Instruction, topology: Topology) -> Transfer:
    """Prices one device's sends to its peers in other slices, by the collective that the text names."""
    opcode = (send.attribute("_xla_megascale_transfer_type") or "").lower().replace("_", "-")
    num_bytes = computation.operands(send)[0].num_bytes
    others = topology.num_slices - 1
    # How many copies of the sent data leave (and reach) a device.
    passes = {
        "all-reduce": 2 * others / topology.num_slices,
        "reduce-scatter": others / topology.num_slices,
        "all-to-all": others / topology.num_slices,
        "all-gather": others,
    }.get(opcode, 1)
    return Transfer(opcode, "dcn", num_bytes, passes * num_bytes / topology.chip.dcn_bandwidth)


def _is_sliced(computation: Computation, value: Instruction) -> bool:
    """Whether all uses of a value are slices."""
    users = computation.users.get(value.name, ())
    return bool(users) and all(
        _is_sliced(computation, user)
        if user.opcode in ("get-tuple-element", "bitcast")
        else user.opcode == "dynamic-slice"
        for user in users
    )


@dataclass(frozen=True)
class TransferTotal:
    """One device's transfers of one opcode on one network, from one source line, in a run of the program.

    Args:
      opcode: As in `Transfer`.
      network: As in `Transfer`.
      overlapped: Whether other work runs meanwhile, between a start and a done.
      source: As in `Transfer`.
      count: Number of runs.
      num_bytes: Bytes of the whole arrays.
      seconds: Time that it takes.
      exposed_seconds: The part without other work.
    """

    opcode: str
    network: Network
    overlapped: bool
    source: str = ""
    count: int = 0
    num_bytes: int = 0
    seconds: float = 0.0
    exposed_seconds: float = 0.0

    def plus(self, other: TransferTotal, times: int = 1) -> TransferTotal:
        """The sum of this and `times` times another total."""
        return dataclasses.replace(
            self,
            count=self.count + times * other.count,
            num_bytes=self.num_bytes + times * other.num_bytes,
            seconds=self.seconds + times * other.seconds,
            exposed_seconds=self.exposed_seconds + times * other.exposed_seconds,
        )
