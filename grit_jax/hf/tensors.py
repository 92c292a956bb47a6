"""Streams tensors between safetensors files and the mesh, one at a time.

Headers say where each tensor's bytes are, so a process reads only those that its devices need, from a disk or bucket.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors.numpy
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike

from grit_jax import files
from grit_jax.config import EmbeddingConfig, TransformerConfig, jsonfile
from grit_jax.config.ranges import Range
from grit_jax.errors import InputError, listed
from grit_jax.families import FAMILIES
from grit_jax.families.family import Tensor
from grit_jax.families.llama import HEAD
from grit_jax.model.transformer import Params
from grit_jax.parallel import sharding

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"

# The output head of a model whose head is its embedding table.
TIED_HEAD = Tensor(HEAD, ("embedding",))

# The linear embedding head exists only here and has a file of its own.
PROJECTION_FILE = "projection.safetensors"
PROJECTION = (
    Tensor("projection.weight", ("projection", "kernel"), 1),
    Tensor("projection.bias", ("projection", "bias"), 0),
)

Dtype = Literal["float32", "bfloat16", "float16"]  # of written weights

_IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)  # buffers in older folders, which the config determines
_FILE_NAME = re.compile(r"[\w-][\w.-]*\.safetensors")
_COUNT = Range("must be from 0 to 9223372036854775807", lambda value: 0 <= value < 1 << 63)
_LONGEST_HEADER = 100_000_000  # bytes, as in the safetensors library
_FEW = 1000  # missing tensors that may be named one by one

_DTYPES = {
    name: np.dtype(dtype)
    for name, dtype in {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}.items()
}


def model_tensors(architecture: TransformerConfig, embedding: EmbeddingConfig) -> list[Tensor]:
    """Every parameter of a model, as stored."""
    tied, tensors = architecture.tie_embeddings, FAMILIES[architecture.family].tensors
    own = [tensor for tensor in tensors if not (tied and tensor.path == ("head",))]
    return own + (list(PROJECTION) if embedding.projection_dim else [])


def get(tree: Any, path: tuple[str, ...]) -> Any:
    """The entry of a nested dict at a path."""
    for key in path:
        tree = tree[key]
    return tree


class StoredTensor(NamedTuple):
    """Where a tensor's values are: row-major from byte `offset` of a safetensors file."""

    file: epath.Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Reads only values `start` to `stop` of the flattened tensor; float64 becomes float32."""
        values = np.empty(stop - start, self.dtype)
        wanted: Any = values.view(np.uint8).data
        with files.open_binary(self.file) as stream:
            stream.seek(self.offset + start * self.dtype.itemsize)
            while len(wanted):
                count = stream.readinto(wanted)
                if not count:
                    raise InputError(f"{self.file}: ends early; copy it again")
                wanted = wanted[count:]
        return values.astype(np.float32) if values.dtype == np.float64 else values


def indexed_files(index: epath.Path) -> set[str]:
    """Names of the safetensors files in an index.

    Raises:
      InputError: It is missing or malformed, or names a file elsewhere.
    """
    section = jsonfile.read(index)
    entries = section.values.get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise InputError(f"{index}: has no weight_map of tensors and their files; copy it again")
    weight_map = section.section("weight_map")
    for tensor, name in entries.items():
        if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
            raise weight_map.error(tensor, "is not the name of a safetensors file in the same folder; copy it again")
    return set(entries.values())


def weight_files(folder: epath.Path) -> list[str]:
    """Names of a model's weight files, chosen as transformers does: model.safetensors, else those of the index.

    Adapters, variants such as model.fp16.safetensors, copies and other layouts in the folder are not read.

    Raises:
      InputError: There is neither, the index is malformed, or a file in it is missing.
    """
    there = set(files.names(folder))
    if WEIGHTS_FILE in there:
        return [WEIGHTS_FILE]
    if INDEX_FILE not in there:
        others = sorted(name for name in there if name.endswith(".safetensors"))
        rename = f"{listed(others)} would not be read: rename the one with the whole model"
        raise InputError(f"{folder}: no {WEIGHTS_FILE} and no {INDEX_FILE}; {rename if others else 'copy it again'}")
    indexed = indexed_files(folder / INDEX_FILE)
    if absent := sorted(indexed - there):
        raise InputError(f"{folder}: {INDEX_FILE} names files that are not there: {', '.join(absent)}; copy them too")
    return sorted(indexed)


def stored_tensors(folder: epath.Path, *, projection: bool = False) -> dict[str, StoredTensor]:
    """Every tensor of a folder's `weight_files`, from their headers.

    Names lose a `model.` that a wrapper added, as in the reference's training checkpoints, and gain one if the model
    was saved without its output head, as by transformers' AutoModel.

    Args:
      folder: Model folder.
      projection: Whether to read the embedding head too.

    Raises:
      InputError: A file is missing, cut short or not safetensors, or two hold the same tensor.
    """
    tensors = file_tensors(folder, *weight_files(folder))
    if any(name.startswith("model.model.") for name in tensors):
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    elif not any(name.startswith("model.") for name in tensors):
        tensors = {name if name == HEAD else f"model.{name}": tensor for name, tensor in tensors.items()}
    if projection and files.exists(folder / PROJECTION_FILE):
        _add(tensors, _read_header(folder / PROJECTION_FILE))
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(_IGNORED_SUFFIXES)}


def file_tensors(folder: epath.Path, *names: str) -> dict[str, StoredTensor]:
    """Every tensor of some files, from their headers; raises as `stored_tensors`."""
    tensors: dict[str, StoredTensor] = {}
    for name in names:
        _add(tensors, _read_header(folder / name))
    return tensors


def _add(tensors: dict[str, StoredTensor], more: dict[str, StoredTensor]) -> None:
    if twice := sorted(tensors.keys() & more.keys()):
        both = f"{tensors[twice[0]].file.name} and {more[twice[0]].file}"
        raise InputError(f"{both} both hold {jsonfile.named(twice[0])}; copy both again")
    tensors |= more


def _read_header(file: epath.Path) -> dict[str, StoredTensor]:
    """The format: 8 bytes with the header's length, a JSON header, and the tensors' bytes without gaps."""
    try:
        with files.open_binary(file) as stream:
            total = stream.seek(0, os.SEEK_END)
            stream.seek(0)
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length <= min(total - 8, _LONGEST_HEADER):
                raise InputError(f"its header would be {length} bytes long")
            content = stream.read(length)
        if not content.startswith(b"{"):
            raise InputError("its header is not an object")
        return _read_entries(jsonfile.parse(content, source="its header"), file, 8 + length, total - 8 - length)
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror or error}; copy it again") from error
    except InputError as error:
        raise InputError(f"{file}: not a complete safetensors file ({error}); copy it again") from error


def _read_entries(header: jsonfile.Section, file: epath.Path, begin: int, size: int) -> dict[str, StoredTensor]:
    """The tensors of a header; they start at byte `begin` of the file and take `size` bytes."""
    if metadata := header.section("__metadata__", default=None, null=True):
        for key in metadata.names():
            metadata.text(key)
    tensors, ranges = {}, []
    for name in header.names():
        if name == "__metadata__":
            continue
        entry = header.section(name)
        if unknown := sorted(entry.values.keys() - {"dtype", "shape", "data_offsets"}):
            raise entry.error(unknown[0], "is not part of the format")
        dtype = _DTYPES[entry.choice("dtype", _DTYPES)]
        shape = tuple(entry.integers("shape", _COUNT))
        start, end = entry.integers("data_offsets", _COUNT, length=2)
        if end - start != math.prod(shape) * dtype.itemsize:
            raise entry.error("data_offsets", f"are {end - start} bytes for shape {jsonfile.shown(list(shape))}")
        tensors[name] = StoredTensor(file, begin + start, dtype, shape)
        ranges.append((start, end, name))
    offset = 0
    for start, end, name in sorted(ranges):
        if start != offset:
            raise InputError(f"{jsonfile.named(name)} begins at byte {start}, where byte {offset} is next")
        offset = end
    if offset != size:
        raise InputError(f"it has {size} bytes of tensors, its header says {offset}")
    return tensors


def check_tensors(
    source: str,
    tensors: dict[str, StoredTensor],
    wanted: Sequence[Tensor],
    shapes: Params,
    *,
    described_by: str = "config.json",
) -> None:
    """Compares the stored tensors with those that the model of the file `described_by` needs.

    Raises:
      InputError: Tensors are missing, unknown or of another shape; the message names them.
    """
    count = sum(tensor.num_stored(get(shapes, tensor.path).shape) for tensor in wanted)
    if count > 2 * len(tensors) + _FEW:  # a damaged file may describe millions of tensors
        raise InputError(
            f"{source}: {described_by} describes {count} tensors, the weights are {len(tensors)}; copy both again"
        )
    expected = {}
    for tensor in wanted:
        shape = get(shapes, tensor.path).shape
        expected |= {name: tensor.stored_shape(shape) for name, _ in tensor.stored(shape)}
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    unknown = sorted(tensors.keys() - expected.keys())
    problems += [f"{jsonfile.named(name)} is not a tensor of this model" for name in unknown]
    problems += [
        f"{name} has shape {tensors[name].shape}, not {shape}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        raise InputError(f"{source}: weights do not match {described_by}: {listed(problems)}")


def load_params(
    source: str,
    wanted: Iterable[Tensor],
    stored: dict[str, StoredTensor],
    shapes: Params,
    shardings: Any,
    dtype: DTypeLike,
) -> Params:
    """The parameters of those tensors, which `check_tensors` found, that have a sharding; each as in `load_param`.

    Raises:
      InputError: A value is not finite.
    """
    placed, params, finite = flatten_dict(shardings), {}, {}
    for tensor in wanted:
        if tensor.path in placed:
            shape = get(shapes, tensor.path).shape
            params[tensor.path], checked = load_param(tensor, stored, shape, placed[tensor.path], dtype)
            finite |= checked
    check_finite(source, finite)
    return unflatten_dict(params)


def load_param(
    tensor: Tensor, stored: dict[str, StoredTensor], shape: tuple[int, ...], target: Any, dtype: DTypeLike
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """A parameter of a given shape, NamedSharding and dtype, and whether each of its stored tensors is finite.

    Each stored tensor is read as a flat array split over all devices, which cast, transpose and move it into its part
    of the parameter. At most two are in flight.
    """
    flat, replicated = sharding.flat(target.mesh), sharding.replicated(target.mesh)
    write = jax.jit(functools.partial(_write_part, tensor, shape), donate_argnums=0, out_shardings=(target, replicated))
    param = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=target)()
    finite: dict[str, jax.Array] = {}
    waiting = None
    for name, index in tensor.stored(shape):
        part = stored[name]
        size = math.prod(part.shape)
        split = flat if size % target.mesh.size == 0 else replicated

        def read(index: Any, part: StoredTensor = part, size: int = size) -> np.ndarray:
            start, stop, _ = index[0].indices(size)
            return part.read(start, stop)

        values = jax.make_array_from_callback((size,), split, read)
        if waiting is not None:
            waiting.block_until_ready()
        param, finite[name] = write(param, values, index)
        waiting = finite[name]
    return param, finite


def _write_part(
    tensor: Tensor, shape: tuple[int, ...], param: jax.Array, values: jax.Array, index: tuple[jax.Array, ...]
):
    part = tensor.from_stored(values.reshape(tensor.stored_shape(shape)), shape)
    return param.at[index].set(part.astype(param.dtype)), jnp.all(jnp.isfinite(values))


def check_finite(source: str, finite: dict[str, jax.Array]) -> None:
    """Raises InputError with the names of tensors whose values are not all finite."""
    if bad := [name for name, value in jax.device_get(finite).items() if not value]:
        raise InputError(f"{source}: NaN or infinite values in {listed(bad)}; the folder is damaged")


def stored_values(rows: Iterable[Tensor], params: Params, dtype: Dtype) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values of the stored tensors, one at a time.

    Raises:
      InputError: A finite weight is too large for `dtype`.
    """
    np_dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    for row in rows:
        param = get(params, row.path)
        for name, index in row.stored(param.shape):
            value = np.asarray(param[index] if index else param)
            with np.errstate(over="ignore"):
                stored = np.ascontiguousarray(row.to_stored(value).astype(np_dtype))
            if dtype == "float16" and np.any(np.isinf(stored)) and np.all(np.isfinite(value)):
                raise InputError(f"{name} has values over float16's 65504; export in bfloat16 or float32")
            yield name, stored


def write_tensors(folder: Path, stem: str, tensors: Iterator[tuple[str, np.ndarray]], *, max_shard_bytes: int) -> None:
    """Writes `stem.safetensors`, or several files and an index, with one file's tensors in memory at a time."""
    shards: list[list[str]] = []
    pending: dict[str, np.ndarray] = {}
    held = total = 0

    def flush() -> None:
        shards.append(list(pending))
        file = folder / f"{stem}-{len(shards)}.safetensors"
        file.touch()
        mode = stat.S_IMODE(file.stat().st_mode)
        safetensors.numpy.save_file(pending, file, metadata={"format": "pt"})
        file.chmod(mode)  # as for any other file; the library's mode lets nobody else read it
        pending.clear()

    for name, value in tensors:
        if pending and held + value.nbytes > max_shard_bytes:
            flush()
            held = 0
        pending[name] = value
        held, total = held + value.nbytes, total + value.nbytes
    flush()
    if len(shards) == 1:
        (folder / f"{stem}-1.safetensors").rename(folder / f"{stem}.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        (folder / f"{stem}-{number}.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / INDEX_FILE).write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
    )
