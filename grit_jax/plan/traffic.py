"""Bytes that a compiled program moves between a memory and the compute units."""

from __future__ import annotations

from collections.abc import Iterable

from grit_jax.plan.hlo import HBM, HOST, Array, Computation, Instruction, Module

# Instructions that move nothing: they name or rearrange buffers, or run other computations.
_FREE = (
    "after-all", "bitcast", "call", "call-start", "conditional", "constant", "get-tuple-element", "parameter",
    "partition-id", "replica-id", "tuple", "while",
)  # fmt: skip
# Instructions that read only the part of their first operand that they return.
_SLICES = ("slice", "dynamic-slice", "gather")
# Instructions that move data between memories, at once or, with -start, during other work.
_COPIES = ("copy", "slice", "dynamic-slice", "dynamic-update-slice")
# Instructions that compute no new element.
_MOVES = (
    *_FREE, *_COPIES, "broadcast", "concatenate", "custom-call", "gather", "iota", "pad", "reshape", "reverse",
    "transpose",
)  # fmt: skip


def traffic(module: Module, computation: Computation, instruction: Instruction, space: int = HBM) -> int:
    """Bytes of a memory that one instruction reads and writes: each operand once, the result once.

    Arrays count as they are stored, in whole tiles. A slice of a larger array, or an update in place, counts as the
    slice; scalars, arrays in other memories, and instructions that run other computations, count nothing.
    """
    if instruction.opcode in _FREE or instruction.opcode.endswith(("-done", "-update")):
        return 0
    if instruction.opcode.endswith("-start") and instruction.opcode.removesuffix("-start") in _COPIES:
        # The result names both sides; an update in place names its buffer twice.
        sides = sum(array.space == space for array in instruction.arrays if array.dims)
        return moved_bytes(computation, instruction) * min(sides, 2)
    if instruction.opcode == "custom-call" and instruction.attribute("custom_call_target") != "tpu_custom_call":
        return 0  # the compiler's own markers, such as AllocateBuffer
    operands = computation.operands(instruction)
    if instruction.opcode == "fusion":
        fused = module.called(instruction)
        reads = sum(_read_of(module, fused, parameter, space) for parameter in fused.parameters)
        return reads + _written_by(module, fused, fused.root, space)
    if instruction.opcode in _SLICES:
        return _are_in(operands[0].arrays, space) and 2 * instruction.stored_bytes
    if instruction.opcode == "dynamic-update-slice":
        return _are_in(operands[0].arrays, space) and 2 * operands[1].stored_bytes
    return _bytes_in((array for operand in operands for array in operand.arrays), space) + _bytes_in(
        instruction.arrays, space
    )


def moved_bytes(computation: Computation, instruction: Instruction) -> int:
    """Bytes that a copy, or a slice or update across memories, carries: its smallest array that is not a counter."""
    return min((array.num_bytes for array in _arrays(computation, instruction)), default=0)


def crosses_to_host(computation: Computation, instruction: Instruction) -> bool:
    """Whether an instruction moves data between the host's memory and the chip's."""
    if instruction.opcode.removesuffix("-start") not in _COPIES:
        return False
    spaces = {array.space for array in _arrays(computation, instruction)}
    return HOST in spaces and len(spaces) > 1


def only_moves(module: Module, instruction: Instruction) -> bool:
    """Whether an instruction copies, rearranges or fills without computing any element but an index."""
    if instruction.opcode == "fusion":
        return all(only_moves(module, inner) for inner in module.called(instruction))
    return instruction.opcode in _MOVES or all(not array.dims for array in instruction.arrays)


def _arrays(computation: Computation, instruction: Instruction) -> list[Array]:
    """The arrays of an instruction's operands and result, without counters."""
    everything = [instruction, *computation.operands(instruction)]
    return [array for each in everything for array in each.arrays if array.dims]


def _are_in(arrays: Iterable[Array], space: int) -> bool:
    return all(array.space == space for array in arrays)


def _bytes_in(arrays: Iterable[Array], space: int) -> int:
    return sum(array.stored_bytes for array in arrays if array.space == space and array.dims)


def _read_of(module: Module, computation: Computation, value: Instruction, space: int) -> int:
    """Bytes of one of a fusion's values that its users read, if the value is in the memory."""
    whole = _bytes_in(value.arrays, space)
    read = 0
    for user in computation.users.get(value.name, ()):
        if user.opcode == "bitcast":
            read += _read_of(module, computation, user, space) if whole else 0
        elif user.opcode in _SLICES and user.operands[0] == value.name:
            read += user.stored_bytes
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
            pass  # updated in place
        elif user.opcode == "fusion":
            inner = module.called(user)
            taken = [inner.parameters[i] for i, name in enumerate(user.operands) if name == value.name]
            read += sum(_read_of(module, inner, parameter, space) for parameter in taken)
        else:
            return whole
    return min(read, whole)


def _written_by(module: Module, computation: Computation, value: Instruction, space: int) -> int:
    """Bytes that a fusion writes to the memory for one of its results."""
    if value.opcode == "tuple":
        return sum(_written_by(module, computation, element, space) for element in computation.operands(value))
    if not _are_in(value.arrays[:1], space) or value.opcode == "parameter":
        return 0
    if value.opcode == "bitcast":
        return _written_by(module, computation, computation.operands(value)[0], space)
    if value.opcode == "dynamic-update-slice":
        return computation.operands(value)[1].stored_bytes
    if value.opcode == "fusion":
        inner = module.called(value)
        return _written_by(module, inner, inner.root, space)
    return _bytes_in(value.arrays, space)
