"""Streams tensors between safetensors files and the mesh, one tensor at a time.

The files' headers say where each tensor's bytes are, so every process reads only those that its devices hold, from a
disk or a bucket alike.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors.numpy
from etils import epath

from grit_jax import files, sharding
from grit_jax.config import InputError
from grit_jax.hf.names import IGNORED_SUFFIXES, Tensor, get
from grit_jax.model.transformer import Params

INDEX_FILE, PROJECTION_FILE = "model.safetensors.index.json", "projection.safetensors"

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


class StoredTensor(NamedTuple):
    """Where a tensor's values are.

    Attributes:
      file: The safetensors file.
      offset: First byte in it.
      dtype: Type of the values.
      shape: Their shape, row-major.
    """

    file: epath.Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Values `start` to `stop` of the flattened tensor, float64 as float32; nothing else is read."""
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


def read_json(path: epath.Path) -> dict[str, Any]:
    """The object of a JSON file.

    Raises:
      InputError: It is missing or malformed.
    """
    try:
        text = files.read_text(path)
        if text is None:
            raise FileNotFoundError("no such file")
        return json.loads(text)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def indexed_files(index: epath.Path) -> set[str]:
    """Names of the files that an index spreads tensors over.

    Raises:
      InputError: It is missing or malformed.
    """
    try:
        return set(read_json(index)["weight_map"].values())
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index}: has no weight_map of tensors and their files; copy it again") from error


def stored_tensors(folder: epath.Path) -> dict[str, StoredTensor]:
    """Every tensor of a folder's safetensors files, from their headers; follows the index where there is one.

    Names begin with one `model.` less where a wrapper's name comes first, as in the reference's training checkpoints.

    Raises:
      InputError: A file is missing, cut short or not safetensors.
    """
    names = [name for name in files.names(folder) if name.endswith(".safetensors")]
    if files.exists(folder / INDEX_FILE):
        indexed = indexed_files(folder / INDEX_FILE)
        if absent := sorted(indexed - set(names)):
            raise InputError(f"{folder}: {INDEX_FILE} names files that are not there: {', '.join(absent)}")
        names = sorted(indexed | ({PROJECTION_FILE} & set(names)))
    tensors: dict[str, StoredTensor] = {}
    for name in names:
        tensors |= _read_header(folder / name)
    if any(name.startswith("model.model.") for name in tensors):
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(IGNORED_SUFFIXES)}


def _read_header(file: epath.Path) -> dict[str, StoredTensor]:
    """The format is 8 bytes with the header's length, a JSON header, and the tensors' bytes."""
    try:
        with files.open_binary(file) as stream:
            total = stream.seek(0, os.SEEK_END)
            stream.seek(0)
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length <= total - 8:
                raise ValueError(f"its header is said to be {length} bytes long")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        ends = [entry["data_offsets"][1] for entry in header.values()]
        if max(ends, default=0) != total - 8 - length:
            raise ValueError(f"it has {total - 8 - length} bytes of tensors, its header says {max(ends, default=0)}")
        tensors = {}
        for name, entry in header.items():
            if entry["dtype"] not in _DTYPES:
                raise InputError(f"{file}: {name} is stored as {entry['dtype']}; known are {', '.join(_DTYPES)}")
            dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
            start, end = entry["data_offsets"]
            if end - start != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} has {end - start} bytes for shape {shape}")
            tensors[name] = StoredTensor(file, 8 + length + start, dtype, shape)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file}: not a complete safetensors file ({error}); copy it again") from error
    return tensors


def check_tensors(source: str, tensors: dict[str, StoredTensor], rows: Iterable[Tensor], shapes: Params) -> None:
    """Compares what is stored with what a model has.

    Raises:
      InputError: Tensors are missing, unknown or of another shape; the message names them.
    """
    expected = {}
    for row in rows:
        shape = get(shapes, row.path).shape
        expected |= {name: row.stored_shape(shape) for name, _ in row.places(shape)}
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} is not a tensor of this model" for name in sorted(tensors.keys() - expected.keys())]
    problems += [
        f"{name} has shape {tensors[name].shape}, not {shape}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        raise InputError(f"{source}: weights do not match config.json: {_some(problems)}")


def load_param(
    row: Tensor, tensors: dict[str, StoredTensor], shape: tuple[int, ...], target: Any, dtype: Any
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """One parameter, filled in place on the mesh, and for each of its tensors whether all values are finite.

    Each stored tensor is read as one flat array split over all devices, and cast, transposed and moved to where the
    parameter is by the devices. No more than two of them are in flight.

    Args:
      row: The parameter's row.
      tensors: What is stored.
      shape: The parameter's shape.
      target: Its NamedSharding.
      dtype: Its type.
    """
    flat = sharding.flat(target.mesh)
    place = jax.jit(
        functools.partial(_place, row, shape),
        donate_argnums=0,
        out_shardings=(target, sharding.replicated(target.mesh)),
    )
    param = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=target)()
    finite: dict[str, jax.Array] = {}
    waiting = None
    for name, index in row.places(shape):
        stored = tensors[name]
        size = math.prod(stored.shape)
        split = flat if size % target.mesh.size == 0 else sharding.replicated(target.mesh)

        def read(part: Any, stored: StoredTensor = stored, size: int = size) -> np.ndarray:
            start, stop, _ = part[0].indices(size)
            return stored.read(start, stop)

        values = jax.make_array_from_callback((size,), split, read)
        if waiting is not None:
            waiting.block_until_ready()
        param, finite[name] = place(param, values, index)
        waiting = finite[name]
    return param, finite


def _place(row: Tensor, shape: tuple[int, ...], param: jax.Array, values: jax.Array, index: tuple[jax.Array, ...]):
    part = row.from_stored(values.reshape(row.stored_shape(shape)), shape)
    return param.at[index].set(part.astype(param.dtype)), jnp.all(jnp.isfinite(values))


def check_finite(source: str, finite: dict[str, jax.Array]) -> None:
    """Reports tensors with values that are not finite.

    Raises:
      InputError: There are some; the message names them.
    """
    if bad := [name for name, value in jax.device_get(finite).items() if not value]:
        raise InputError(f"{source}: NaN or infinite values in {_some(bad)}; the folder is damaged")


def _some(items: list[str]) -> str:
    return "; ".join(items[:8]) + (f"; and {len(items) - 8} more" if len(items) > 8 else "")


def write_tensors(folder: Path, stem: str, tensors: Iterator[tuple[str, np.ndarray]], *, max_shard_bytes: int) -> None:
    """Writes `stem.safetensors`, or several files with an index; no more than one file's tensors are in memory."""
    shards: list[list[str]] = []
    pending: dict[str, np.ndarray] = {}
    held = total = 0

    def flush() -> None:
        shards.append(list(pending))
        file = folder / f"{stem}-{len(shards)}.safetensors"
        safetensors.numpy.save_file(pending, file, metadata={"format": "pt"})
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
