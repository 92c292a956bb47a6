"""Bytes that a compiled program moves between HBM and the compute units."""

from __future__ import annotations

from collections.abc import Iterable

from grit_jax.plan.hlo import HBM, HOST, Array, Computation, Instruction, Module

# Instructions that move nothing: they name or rearrange buffers, or run other computations.
_FREE = (
    "after-all", "bitcast", "call", "conditional", "constant", "get-tuple-element", "parameter", "partition-id",
    "replica-id", "tuple", "while",
)  # fmt: skip
# Instructions that read only the part of their first operand that they return.
_SLICES = ("slice", "dynamic-slice", "gather")
# Instructions that move data between memories, at once or, with -start, during other work.
_COPIES = ("copy", "slice", "dynamic-slice", "dynamic-update-slice")


def hbm_bytes(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Bytes of HBM that one instruction reads and writes: each operand once, the result once.

    A slice of a larger array, or an update in place, counts as the slice; arrays in VMEM, and instructions that run
    other computations, count nothing.
    """
    if instruction.opcode in _FREE or instruction.opcode.endswith(("-done", "-update")):
        return 0
    if instruction.opcode.endswith("-start") and instruction.opcode.removesuffix("-start") in _COPIES:
        # The result names both sides; an update in place names its buffer twice.
        sides = sum(array.space == HBM for array in instruction.arrays if array.dims)
        return moved_bytes(computation, instruction) * min(sides, 2)
    if instruction.opcode == "custom-call" and instruction.attribute("custom_call_target") != "tpu_custom_call":
        return 0  # the compiler's own markers, such as AllocateBuffer
    operands = computation.operands(instruction)
    if instruction.opcode == "fusion":
        fused = module.called(instruction)
        reads = sum(_read_of(module, fused, parameter) for parameter in fused.parameters)
        return reads + _written_by(module, fused, fused.root)
    if instruction.opcode in _SLICES:
        return _in_hbm(operands[0].arrays) and 2 * instruction.num_bytes
    if instruction.opcode == "dynamic-update-slice":
        return _in_hbm(operands[0].arrays) and 2 * operands[1].num_bytes
    return _bytes_in_hbm(array for operand in operands for array in operand.arrays) + _bytes_in_hbm(instruction.arrays)


def moved_bytes(computation: Computation, instruction: Instruction) -> int:
    """Bytes that a copy, or a slice or update across memories, carries: its smallest array that is not a counter."""
    return min((array.num_bytes for array in _arrays(computation, instruction)), default=0)


def crosses_to_host(computation: Computation, instruction: Instruction) -> bool:
    """Whether an instruction moves data between the host's memory and the chip's."""
    if instruction.opcode.removesuffix("-start") not in _COPIES:
        return False
    spaces = {array.space for array in _arrays(computation, instruction)}
    return HOST in spaces and len(spaces) > 1


def _arrays(computation: Computation, instruction: Instruction) -> list[Array]:
    """The arrays of an instruction's operands and result, without counters."""
    everything = [instruction, *computation.operands(instruction)]
    return [array for each in everything for array in each.arrays if array.dims]


def _in_hbm(arrays: Iterable[Array]) -> bool:
    return all(array.space == HBM for array in arrays)


def _bytes_in_hbm(arrays: Iterable[Array]) -> int:
    return sum(array.num_bytes for array in arrays if array.space == HBM)


def _read_of(module: Module, computation: Computation, value: Instruction) -> int:
    """Bytes of one of a fusion's values that its users read, if the value is in HBM."""
    whole = _bytes_in_hbm(value.arrays)
    read = 0
    for user in computation.users.get(value.name, ()):
        if user.opcode == "bitcast":
            read += _read_of(module, computation, user) if whole else 0
        elif user.opcode in _SLICES and user.operands[0] == value.name:
            read += user.num_bytes
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
            pass  # updated in place
        elif user.opcode == "fusion":
            inner = module.called(user)
            taken = [inner.parameters[i] for i, name in enumerate(user.operands) if name == value.name]
            read += sum(_read_of(module, inner, parameter) for parameter in taken)
        else:
            return whole
    return min(read, whole)


def _written_by(module: Module, computation: Computation, value: Instruction) -> int:
    """Bytes that a fusion writes to HBM for one of its results."""
    if value.opcode == "tuple":
        return sum(_written_by(module, computation, element) for element in computation.operands(value))
    if not _in_hbm(value.arrays[:1]) or value.opcode == "parameter":
        return 0
    if value.opcode == "bitcast":
        return _written_by(module, computation, computation.operands(value)[0])
    if value.opcode == "dynamic-update-slice":
        return computation.operands(value)[1].num_bytes
    if value.opcode == "fusion":
        inner = module.called(value)
        return _written_by(module, inner, inner.root)
    return _bytes_in_hbm(value.arrays)
