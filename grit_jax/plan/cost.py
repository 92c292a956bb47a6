"""Time of a program compiled for a TPU, estimated from its schedule.

The estimate runs the program's instructions in order on a clock. Matrix products add the compiler's own
`estimated_cycles`; vector work and copies add their traffic to memory, as the compiler's cycles are two to three times
what published runs leave for them; Pallas kernels add the time of `kernels.py`; a collective occupies its network from
its start, and adds the time left when its result is awaited. Loop bodies count once per iteration.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from grit_jax.plan.collectives import (
    THREADS,
    Network,
    Transfer,
    TransferTotal,
    collectives_within,
    crosses_slices,
    is_collective,
    rendezvous,
    slice_transfer,
    transfer,
)
from grit_jax.plan.flops import is_kernel, matmul_flops
from grit_jax.plan.hlo import HBM, VMEM, Computation, Instruction, Module, parse_module, trip_count
from grit_jax.plan.kernels import KernelKind, kernel_work
from grit_jax.plan.topology import Topology
from grit_jax.plan.traffic import crosses_to_host, moved_bytes, only_moves, traffic

# Share of HBM's bandwidth that vector work and copies reach: what published runs (docs/planning.md) leave for them.
HBM_EFFICIENCY = 0.9
# Instructions that visit memory in an order that depends on the data: the compiler's cycles, where it gives any, stand.
_IRREGULAR = ("gather", "scatter", "sort")

_ASYNC_START, _ASYNC_DONE = "AsyncCollectiveStart", "AsyncCollectiveDone"

Kind = Literal["products", KernelKind, "vector", "copies", "exposed"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Cost:
    """The cost of one run of a program for each device. Times are seconds.

    Attributes:
      seconds: Time of each kind of work, one after the other: matrix products of XLA, Pallas kernels of attention,
        experts and others, vector work, copies on the chip, and waiting for a network with nothing else to do.
      hbm_seconds: HBM's traffic at full bandwidth: a lower bound of the total.
      ici_seconds: Transfers between the chips of a slice, hidden or not.
      dcn_seconds: Transfers between slices, hidden or not.
      host_seconds: Copies between the chip's and the host's memory, hidden or not.
      matmul_flops: FLOPs of the matrix products in the program, recomputed ones included.
      kernel_flops: FLOPs of the matrix products in Pallas kernels.
      hbm_bytes: Bytes read and written in HBM.
      transfers: The table of transfers, longest first.
      unknown_loops: Loops with an unknown number of iterations, counted as one.
      unknown_kernels: Names of Pallas kernels with unknown FLOPs, counted only by their HBM traffic.
    """

    seconds: Mapping[Kind, float]
    hbm_seconds: float
    ici_seconds: float
    dcn_seconds: float
    host_seconds: float
    matmul_flops: int
    kernel_flops: int
    hbm_bytes: int
    transfers: tuple[TransferTotal, ...]
    unknown_loops: int
    unknown_kernels: tuple[str, ...]

    @property
    def total_seconds(self) -> float:
        """Time from the first instruction to the last."""
        return sum(self.seconds.values())


def estimate(text: str, topology: Topology, *, expert_fill: float = 1.0) -> Cost:
    """Estimates a compiled program.

    Args:
      text: `compiled.as_text()` of a program compiled for `devices(topology)`.
      topology: The topology that it was compiled for.
      expert_fill: Share of the rows of grouped matrix products that hold tokens; shapes are those of the worst case.

    Raises:
      ValueError: The text is not a compiled program.
    """
    estimator = _Estimator(parse_module(text), topology, expert_fill)
    totals = estimator.totals(estimator.module.entry)
    numbers, transfers = totals.numbers, tuple(sorted(totals.transfers.values(), key=lambda total: -total.seconds))
    ici, dcn, host = (
        sum(total.seconds for total in transfers if total.network == name) for name in ("ici", "dcn", "host")
    )
    return Cost(
        seconds={kind: numbers[kind] for kind in KINDS},
        hbm_seconds=numbers["hbm_bytes"] / topology.chip.hbm_bandwidth,
        ici_seconds=ici,
        dcn_seconds=dcn,
        host_seconds=host,
        matmul_flops=int(numbers["matmul_flops"]),
        kernel_flops=int(numbers["kernel_flops"]),
        hbm_bytes=int(numbers["hbm_bytes"]),
        transfers=transfers,
        unknown_loops=int(numbers["unknown_loops"]),
        unknown_kernels=tuple(sorted(totals.unknown_kernels)),
    )


@dataclass
class _Totals:
    """Sums over a computation and its callees; `carrying`: time of fusions that carry on a collective, by channel."""

    numbers: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    carrying: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    transfers: dict[tuple[str, Network, bool, str], TransferTotal] = field(default_factory=dict)
    unknown_kernels: set[str] = field(default_factory=set)

    def add(self, other: _Totals, times: int = 1) -> None:
        for name, number in other.numbers.items():
            self.numbers[name] += times * number
        for channel, seconds in other.carrying.items():
            self.carrying[channel] += times * seconds
        for total in other.transfers.values():
            self.add_transfers(total, times)
        self.unknown_kernels |= other.unknown_kernels

    def add_transfers(self, total: TransferTotal, times: int = 1) -> None:
        key = (total.opcode, total.network, total.overlapped, total.source)
        self.transfers[key] = self.transfers.get(key, TransferTotal(*key)).plus(total, times)

    @property
    def seconds(self) -> float:
        """Time on the clock."""
        return sum(self.numbers[kind] for kind in KINDS)


class _Clock:
    """Runs the work and transfers of one computation, and sums them up."""

    def __init__(self):
        self.totals = _Totals()
        self._free: dict[Network, float] = defaultdict(float)  # when each network finishes all started transfers
        self._used: dict[Network, float] = defaultdict(float)
        self._pending: dict[str, list[tuple[Transfer, float]]] = {}
        self._spread: dict[str, Transfer] = {}

    def work(self, kind: Kind, seconds: float) -> None:
        """Advances by the time of some work."""
        self.totals.numbers[kind] += seconds

    def start(self, name: str, moved: Transfer) -> None:
        """Starts a transfer, after those that occupy its network."""
        end = max(self.totals.seconds, self._free[moved.network]) + moved.seconds
        self._free[moved.network] = end
        self._used[moved.network] += moved.seconds
        self._pending.setdefault(name, []).append((moved, end))

    def rename(self, name: str, new: str) -> None:
        """Hands an instruction's transfers over to another."""
        self._pending[new] = self._pending.pop(name, [])

    def wait(self, name: str, *, overlapped: bool = True) -> None:
        """Waits for the transfers of an instruction; those of an earlier loop iteration are over."""
        for moved, end in self._pending.pop(name, []):
            self.record(moved, max(0.0, end - self.totals.seconds), overlapped=overlapped)

    def record(self, moved: Transfer, exposed: float, *, overlapped: bool) -> None:
        """Enters a transfer into the table and advances by its exposed time."""
        total = TransferTotal(
            moved.opcode, moved.network, overlapped, moved.source, 1, moved.num_bytes, moved.seconds, exposed
        )
        self.totals.add_transfers(total)
        self.work("exposed", exposed)

    def spread(self, channel: str, moved: Transfer) -> None:
        """Starts a collective that fusions carry on; only their time hides it."""
        self._spread[channel] = moved

    def gather(self, channel: str) -> None:
        """Ends a collective that fusions have carried on."""
        moved = self._spread.pop(channel, None)
        if moved:
            hidden = self.totals.carrying.pop(channel, 0.0)
            self.record(moved, max(0.0, moved.seconds - hidden), overlapped=True)

    def close(self) -> _Totals:
        """Ends the computation.

        Transfers that the next loop iteration awaits hide behind this one, but an iteration takes at least as long as
        its transfers on one network.
        """
        for channel in list(self._spread):
            self.gather(channel)
        for moved, _ in itertools.chain.from_iterable(self._pending.values()):
            self.record(moved, max(0.0, self._used[moved.network] - self.totals.seconds), overlapped=True)
        return self.totals


def _channel(collective: Instruction) -> str:
    return collective.attribute("channel_id") or collective.name


def _async_role(module: Module, fusion: Instruction) -> str | None:
    """Whether a fusion starts or ends a collective that others carry on: the name of its custom call."""
    targets = {
        inner.attribute("custom_call_target") for inner in module.called(fusion) if inner.opcode == "custom-call"
    }
    return next((role for role in (_ASYNC_START, _ASYNC_DONE) if role in targets), None)


class _Estimator:
    """Sums up the computations of a program, each once."""

    def __init__(self, module: Module, topology: Topology, expert_fill: float):
        self.module, self.topology, self.expert_fill = module, topology, expert_fill
        self._done: dict[str, _Totals] = {}
        # XLA:TPU spreads a collective over fusions: one starts it, one ends it, and those between that contain the same
        # collective, in a nested loop too, carry it on during their own work.
        self._spread = {
            _channel(collective)
            for computation in module.computations.values()
            for instruction in computation
            if instruction.opcode == "fusion" and _async_role(module, instruction)
            for _, collective in collectives_within(module, instruction)
        }

    def totals(self, computation: Computation) -> _Totals:
        """The sums of one run of a computation."""
        if computation.name not in self._done:
            clock = _Clock()
            for instruction in computation:
                clock.totals.numbers["hbm_bytes"] += traffic(self.module, computation, instruction)
                clock.totals.numbers["matmul_flops"] += matmul_flops(self.module, computation, instruction)
                self._run(computation, instruction, clock)
            self._done[computation.name] = clock.close()
        return self._done[computation.name]

    def _run(self, computation: Computation, instruction: Instruction, clock: _Clock) -> None:
        opcode, name = instruction.opcode, instruction.name
        if opcode in ("while", "call", "conditional"):
            self._run_called(instruction, clock)
        elif is_collective(instruction):
            clock.start(name, self._transfer(transfer, computation, instruction))
            if not opcode.endswith("-start"):
                clock.wait(name, overlapped=False)
        elif opcode in ("send", "recv") and crosses_slices(instruction):
            if opcode == "send":
                clock.start(rendezvous(instruction), self._transfer(slice_transfer, computation, instruction))
        elif opcode == "recv-done":
            clock.wait(rendezvous(computation.operands(instruction)[0]))
        elif opcode.endswith("-done"):
            clock.wait(instruction.operands[0])
        elif opcode.endswith("-update"):
            clock.rename(instruction.operands[0], name)
        elif crosses_to_host(computation, instruction):
            num_bytes = moved_bytes(computation, instruction)
            source = self.module.source(computation, instruction)
            clock.start(
                name, Transfer("copy", "host", num_bytes, num_bytes / self.topology.chip.host_bandwidth, source)
            )
            if not opcode.endswith("-start"):
                clock.wait(name, overlapped=False)
        elif is_kernel(instruction):
            self._run_kernel(computation, instruction, clock)
        elif opcode == "fusion":
            self._run_fusion(computation, instruction, clock)
        elif opcode in THREADS and (inner := self._transfers(instruction)):
            for _, moved in inner:
                clock.start(name, moved)
        elif not opcode.endswith("-start"):  # a prefetch goes on beside the work
            clock.work(*self._work(computation, instruction))

    def _run_called(self, instruction: Instruction, clock: _Clock) -> None:
        """Counts a loop's body once per iteration, and a conditional's longest branch."""
        if instruction.opcode == "while":
            trips = trip_count(self.module, instruction)
            clock.totals.numbers["unknown_loops"] += trips is None
            clock.totals.add(self.totals(self.module.called(instruction, "body")), 1 if trips is None else trips)
        elif instruction.opcode == "call":
            clock.totals.add(self.totals(self.module.called(instruction, "to_apply")))
        else:
            branches = [self.totals(branch) for branch in self.module.branches(instruction)]
            clock.totals.add(max(branches, key=lambda totals: totals.seconds))

    def _run_kernel(self, computation: Computation, kernel: Instruction, clock: _Clock) -> None:
        """A kernel takes as long as its computation or its traffic, whichever is longer."""
        work = kernel_work(kernel, computation, self.topology.chip, self.expert_fill)
        if work.flops is None:
            clock.totals.unknown_kernels.add(kernel.name)
        clock.totals.numbers["kernel_flops"] += work.flops or 0
        clock.work(work.kind, max(work.seconds, self._memory_seconds(computation, kernel)))

    def _run_fusion(self, computation: Computation, fusion: Instruction, clock: _Clock) -> None:
        role, transfers = _async_role(self.module, fusion), self._transfers(fusion)
        kind, seconds = self._work(computation, fusion)
        if (transfers or role) and fusion.config("estimated_cycles") is None:
            seconds = 0.0  # nothing but the transfers
        for collective, moved in transfers:
            channel = _channel(collective)
            if channel not in self._spread:
                clock.start(fusion.name, moved)
            elif role == _ASYNC_START:
                clock.spread(channel, moved)
            elif role == _ASYNC_DONE:
                clock.gather(channel)
            else:
                clock.totals.carrying[channel] += seconds
        clock.work(kind, seconds)
        clock.wait(fusion.name, overlapped=False)

    def _transfers(self, instruction: Instruction) -> list[tuple[Instruction, Transfer]]:
        """The collectives in the computations that an instruction calls, with their prices."""
        within = collectives_within(self.module, instruction)
        return [(collective, self._transfer(transfer, inner, collective)) for inner, collective in within]

    def _transfer(
        self,
        price: Callable[[Computation, Instruction, Topology], Transfer],
        computation: Computation,
        instruction: Instruction,
    ) -> Transfer:
        """A transfer with its price and its source line."""
        moved = price(computation, instruction, self.topology)
        return dataclasses.replace(moved, source=self.module.source(computation, instruction))

    def _work(self, computation: Computation, instruction: Instruction) -> tuple[Kind, float]:
        """The kind and the time of an instruction of the TensorCore that is no kernel."""
        cycles, memory = instruction.config("estimated_cycles"), self._memory_seconds(computation, instruction)
        seconds = memory if cycles is None else cycles / self.topology.chip.clock
        if matmul_flops(self.module, computation, instruction):
            return "products", seconds
        if not self._is_irregular(instruction) and memory >= self._memory_seconds(computation, instruction, VMEM):
            seconds = min(seconds, memory)
        return "copies" if only_moves(self.module, instruction) else "vector", seconds

    def _is_irregular(self, instruction: Instruction) -> bool:
        """Whether an instruction, or one inside a fusion, visits memory in an order that depends on the data."""
        if instruction.opcode == "fusion":
            return any(self._is_irregular(inner) for inner in self.module.called(instruction))
        return instruction.opcode in _IRREGULAR

    def _memory_seconds(self, computation: Computation, instruction: Instruction, space: int = HBM) -> float:
        """Time that HBM takes to read and write as much as an instruction touches in a memory."""
        num_bytes = traffic(self.module, computation, instruction, space)
        return num_bytes / (HBM_EFFICIENCY * self.topology.chip.hbm_bandwidth)
