"""Parses the text of a compiled program: computations, instructions, shapes, loops and groups of devices.

The text is `compiled.as_text()`: scheduled HLO, in which the order of instructions is the order of execution. XLA
describes its syntax at https://openxla.org/xla/operation_semantics and in `hlo_parser.cc`; only what a cost estimate
needs is parsed; the rest of an instruction stays text.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

# Bits of an element; XLA packs 4-bit types two to a byte.
_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}
_ELEMENT = r"pred|bf16|c64|c128|[suf]\d+\w*"

_ARRAY = re.compile(rf"\b({_ELEMENT})\[([\d,]*)\](?:\{{([^{{}}]*)\}})?")
_END = re.compile(r'^\}(, execution_thread="\w+")?$')  # some computations run alongside the main ones
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^  (?:ROOT )?%?[\w.\-]+ = ")
# name = type opcode(operands) attributes; no type holds " word(", and operands nest parentheses once at most.
_PARTS = re.compile(
    r"^(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>.*?) (?P<opcode>[a-z][a-z0-9\-]*)"
    r"\((?P<operands>(?:[^()]|\([^()]*\))*)\)(?P<attributes>.*)$",
    re.DOTALL,
)

# The tables of source lines before the computations: `7 {file_name_id=2 function_name_id=3 line=57 ...}` and the like.
_TABLES = ("FileNames", "FileLocations", "StackFrames")
_TABLE_ROW = re.compile(r'^(\d+) (?:"(.*)"|\{(.*)\})$')

_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"

# How many producers of an instruction's operand to ask for the source line that it lacks.
_SOURCE_STEPS = 6

# Memory spaces of a layout, S(n), as XLA:TPU numbers them.
HBM, VMEM, HOST = 0, 1, 5


@dataclass(frozen=True)
class Array:
    """One array of an instruction's result.

    Args:
      dtype: XLA's name of the element type, such as bf16.
      dims: Sizes.
      space: Memory space: HBM, VMEM, HOST or one of the small ones.
      tiled: Sizes as stored, outermost first: the innermost are whole tiles; empty if the text does not say.
    """

    dtype: str
    dims: tuple[int, ...]
    space: int = HBM
    tiled: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.dims)

    @property
    def num_bytes(self) -> int:
        """Bytes of the elements, without the padding of tiles."""
        return -(-self.size * self._bits // 8)

    @property
    def stored_bytes(self) -> int:
        """Bytes in memory, with the padding of tiles."""
        return -(-math.prod(self.tiled) * self._bits // 8) if self.tiled else self.num_bytes

    @property
    def _bits(self) -> int:
        return _BITS.get(self.dtype) or int(re.findall(r"\d+", self.dtype)[0])


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Args:
      name: Name, unique in its computation.
      opcode: Such as fusion or all-gather-start.
      arrays: The result's arrays; a tuple's leaves in order.
      operands: Names of instructions of the same computation.
      literal: The text between the parentheses, such as a constant's value.
      attributes: The text after the parentheses.
      is_root: Whether it is its computation's result.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    literal: str
    attributes: str
    is_root: bool

    def attribute(self, key: str) -> str | None:
        """The value of `key=value` if it is a name, a number or a string; without % and quotes."""
        found = re.search(rf'\b{key}=%?"?([\w.\-]+)', self.attributes)
        return found and found[1]

    def dims_attribute(self, key: str) -> tuple[int, ...]:
        """The value of `key={1,2}`; empty if the key is missing."""
        found = re.search(rf"\b{key}=\{{([\d,]*)\}}", self.attributes)
        return _numbers(found[1]) if found else ()

    def config(self, key: str) -> int | None:
        """A number of the backend's JSON, such as the compiler's `estimated_cycles`."""
        found = re.search(rf'"{key}":"?(\d+)', self.attributes)
        return int(found[1]) if found else None

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole result."""
        return sum(array.num_bytes for array in self.arrays)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the whole result in memory, with the padding of tiles."""
        return sum(array.stored_bytes for array in self.arrays)


@dataclass(frozen=True)
class Computation:
    """Instructions by name, in the order of execution."""

    name: str
    instructions: Mapping[str, Instruction]

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    @functools.cached_property
    def root(self) -> Instruction:
        """The instruction whose result is the computation's."""
        return next(instruction for instruction in self if instruction.is_root)

    @functools.cached_property
    def parameters(self) -> tuple[Instruction, ...]:
        """The parameters, in order."""
        found = [instruction for instruction in self if instruction.opcode == "parameter"]
        return tuple(sorted(found, key=lambda parameter: int(parameter.literal)))

    @functools.cached_property
    def users(self) -> Mapping[str, tuple[Instruction, ...]]:
        """The instructions that take each instruction as an operand."""
        users: dict[str, list[Instruction]] = {}
        for instruction in self:
            for operand in dict.fromkeys(instruction.operands):
                users.setdefault(operand, []).append(instruction)
        return {name: tuple(takers) for name, takers in users.items()}

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """The operands of an instruction of this computation."""
        return [self.instructions[name] for name in instruction.operands]


@dataclass(frozen=True)
class Module:
    """A compiled program; `frames` are its source lines, such as `grit_jax/model/layers.py:57`, by `stack_frame_id`."""

    computations: Mapping[str, Computation]
    entry: Computation
    frames: Mapping[str, str] = field(default_factory=dict)

    def source(self, computation: Computation, instruction: Instruction) -> str:
        """The source line of an instruction; of what it takes, if the compiler made it; empty if unknown."""
        for _ in range(_SOURCE_STEPS):
            if line := self.frames.get(instruction.attribute("stack_frame_id") or ""):
                return line
            if found := re.search(r'source_file="([^"]*)" source_line=(\d+)', instruction.attributes):
                return f"{_short(found[1])}:{found[2]}"
            if not instruction.operands:
                break
            instruction = computation.instructions[instruction.operands[0]]
        return ""

    def called(self, instruction: Instruction, key: str = "calls") -> Computation:
        """The computation that an instruction names in `key`: calls, to_apply, condition or body."""
        return self.computations[instruction.attribute(key) or ""]

    def branches(self, instruction: Instruction) -> list[Computation]:
        """The computations of a conditional."""
        if found := re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes):
            return [self.computations[name] for name in re.findall(r"[\w.\-]+", found[1])]
        return [self.called(instruction, f"{key}_computation") for key in ("true", "false")]


def parse_module(text: str) -> Module:
    """Parses the text of a compiled program.

    Raises:
      ValueError: The text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    tables: dict[str, dict[str, str]] = {name: {} for name in _TABLES}
    entry, name, lines, table = None, None, [], None
    for line in text.splitlines():
        if name is None:
            header = _COMPUTATION.match(line)
            if header:
                name, lines = header[2], []
                entry = name if header[1] else entry
            elif row := _TABLE_ROW.match(line):
                if table in tables:
                    tables[table][row[1]] = row[2] or row[3]
            else:
                table = line.strip() or table
        elif _END.match(line):
            parsed = [_parse_instruction(whole) for whole in lines]
            computations[name] = Computation(name, {instruction.name: instruction for instruction in parsed})
            name = None
        elif _INSTRUCTION.match(line):
            lines.append(line.strip())
        else:
            lines[-1] += line  # attributes with line breaks
    if entry is None:
        raise ValueError("the text has no ENTRY computation: not the HLO of a compiled program")
    return Module(computations, computations[entry], _frames(tables))


def _frames(tables: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Source lines by stack frame, each the innermost of its stack."""

    def fields(row: str) -> dict[str, str]:
        return dict(pair.split("=") for pair in row.split())

    files = {key: _short(path) for key, path in tables["FileNames"].items()}
    locations = {key: fields(row) for key, row in tables["FileLocations"].items()}
    lines = {key: f"{files[row['file_name_id']]}:{row['line']}" for key, row in locations.items()}
    return {key: lines[fields(row)["file_location_id"]] for key, row in tables["StackFrames"].items()}


def _short(path: str) -> str:
    """A path from its package on."""
    return re.sub(r".*/(site-packages/|(?=grit_jax/))", "", path)


def _parse_instruction(line: str) -> Instruction:
    parts = _PARTS.match(line)
    if parts is None:
        raise ValueError(f"not an HLO instruction: {line[:200]}")
    return Instruction(
        name=parts["name"],
        opcode=parts["opcode"],
        arrays=parse_arrays(parts["type"]),
        operands=tuple(re.findall(r"%([\w.\-]+)", parts["operands"])),
        literal=parts["operands"],
        attributes=parts["attributes"],
        is_root=parts["root"] is not None,
    )


def parse_arrays(text: str) -> tuple[Array, ...]:
    """The arrays of a type such as `(bf16[2,8]{1,0:T(8,128)(2,1)S(1)}, u32[])`."""
    arrays = []
    for dtype, dims, layout in _ARRAY.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = _numbers(dims)
        arrays.append(Array(dtype, sizes, int(space[1]) if space else HBM, _tiled(sizes, layout)))
    return tuple(arrays)


@functools.lru_cache(maxsize=4096)
def _tiled(dims: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """Sizes as stored under a layout such as `1,0:T(8,128)(2,1)`: its dims from the innermost, and their tile."""
    found = re.match(r"([\d,]+):T\(([\d,]+)\)", layout)
    if not found:
        return ()
    sizes, tile = [dims[dim] for dim in reversed(_numbers(found[1]))], _numbers(found[2])
    whole = len(sizes) - len(tile)
    if whole < 0:
        return ()
    return (*sizes[:whole], *(-(-size // side) * side for size, side in zip(sizes[whole:], tile, strict=True)))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)


def trip_count(module: Module, loop: Instruction) -> int | None:
    """Iterations of a while loop; None if the text does not say.

    The compiler writes `known_trip_count` for some loops. Other loops of a scan count from 0 by a constant step to a
    constant limit in the condition.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    condition = module.called(loop, "condition")
    for compare in condition:
        if compare.opcode != "compare":
            continue
        operands = condition.operands(compare)
        limits = [int(operand.literal) for operand in operands if operand.opcode == "constant"]
        counters = [operand for operand in operands if operand.opcode == "get-tuple-element"]
        if limits and counters:
            step = _counter_step(module.called(loop, "body"), int(counters[0].attribute("index") or 0))
            return -(-limits[0] // step) if step else None
    return None


def _counter_step(body: Computation, index: int) -> int | None:
    """The constant that a loop's body adds to its variable `index`; None if it is not constant."""
    if body.root.opcode != "tuple":
        return None
    value = body.instructions[body.root.operands[index]]
    while value.opcode in ("copy", "bitcast"):
        value = body.instructions[value.operands[0]]
    if value.opcode != "add":
        return None
    steps = [int(operand.literal) for operand in body.operands(value) if operand.opcode == "constant"]
    return steps[0] if steps else None


def replica_groups(instruction: Instruction, num_devices: int) -> list[tuple[int, ...]]:
    """The groups of devices of a collective, by index in the program.

    XLA writes them in three ways: lists `{{0,1},{2,3}}`; rows of a transposed iota `[4,2]<=[2,4]T(1,0)`; axes of a mesh
    `mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'y'}`. No groups, or an empty list, means all devices.

    Raises:
      ValueError: The groups have another form.
    """
    text = instruction.attributes
    lists = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)+)\}", text)
    if lists:
        return [_numbers(group) for group in re.findall(r"\{([\d,]+)\}", lists[1])]
    rows = re.search(rf"replica_groups=\[([\d,]+)\]<={_IOTA}", text)
    if rows:
        return _chunks(_iota(*rows.groups()[1:]), _numbers(rows[1])[-1])
    mesh = re.search(rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({_IOTA}\))? \{{([^}}]*)\}}", text)
    if mesh:
        sizes = {name: int(size) for name, size in re.findall(r"'?([\w.]+)'?=(\d+)", mesh[1])}
        ids = _iota(mesh[2], mesh[3]) if mesh[2] else np.arange(math.prod(sizes.values()))
        return _groups_along(ids, sizes, mesh[4])
    if re.search(r"replica_groups=(?!\{\})", text):
        raise ValueError(f"{instruction.name}: replica groups in an unknown form: {text[:300]}")
    return [tuple(range(num_devices))]


def _iota(dims: str, order: str | None) -> np.ndarray:
    """The numbers of `[2,4]T(1,0)`: counted up in an array, whose dims are then reordered."""
    sizes = _numbers(dims)
    return np.arange(math.prod(sizes)).reshape(sizes).transpose(_numbers(order) if order else None)


def _groups_along(ids: np.ndarray, sizes: Mapping[str, int], chosen: str) -> list[tuple[int, ...]]:
    """Groups of a mesh's devices along some axes, such as `'x'` or `'x':(2)4`: 4 parts of axis x, 2 parts before."""
    spans: dict[str, list[tuple[int, int]]] = {name: [] for name in sizes}
    for name, before, size in re.findall(r"'?([\w.]+)'?(?::\((\d+)\)(\d+))?", chosen):
        start = int(before or 1)
        spans[name].append((start, start * int(size or sizes[name])))
    dims: list[int] = []
    inside: list[bool] = []
    for name, size in sizes.items():
        cuts = sorted({1, size, *itertools.chain.from_iterable(spans[name])})
        for low, high in itertools.pairwise(cuts):
            dims.append(high // low)
            inside.append(any(start <= low and high <= end for start, end in spans[name]))
    order = sorted(range(len(dims)), key=lambda dim: inside[dim])
    group_size = math.prod(size for size, is_inside in zip(dims, inside, strict=True) if is_inside)
    return _chunks(ids.reshape(dims).transpose(order), group_size)


def _chunks(values: np.ndarray, size: int) -> list[tuple[int, ...]]:
    return list(map(tuple, values.reshape(-1, size).tolist()))
