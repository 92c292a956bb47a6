"""The file of a shard's keys and values: those of all its documents' tokens, document by document.

It is a safetensors file, written and read piece by piece. For n tokens it holds

    ends                      int64 [rows]; where each document ends, in tokens
    keys, values              [n, layers, kv_heads, head_dim] in the store's dtype
    key_scales, value_scales  float32 [n, layers, kv_heads], only for int8
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from grit_jax import files
from grit_jax.config import TransformerConfig
from grit_jax.model.transformer import KVCache
from grit_jax.retrieval.quantization import Dtype, quantize, unpack

_SAFETENSORS = {"float32": ("F32", 4), "bfloat16": ("BF16", 2), "int8": ("I8", 1), "int64": ("I64", 8)}


@contextmanager
def writing(
    path: Path, lengths: Sequence[int], architecture: TransformerConfig, dtype: Dtype
) -> Generator[Callable[[int, KVCache], None]]:
    """Yields a function that writes the keys and values of a row; the file appears when all rows are written.

    Args:
      path: The file.
      lengths: Tokens of each row.
      architecture: Shape of the model.
      dtype: Dtype to round keys and values to.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    token_shape = architecture.num_layers, architecture.num_kv_heads, architecture.head_dim
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {"ends": ("int64", (len(ends),))}
    if dtype == "int8":
        shapes |= {name: ("float32", (int(ends[-1]), *token_shape[:2])) for name in ("key_scales", "value_scales")}
    shapes |= {name: (dtype, (int(ends[-1]), *token_shape)) for name in ("keys", "values")}
    header, offsets = _header(shapes)

    def write(row: int, cache: KVCache) -> None:
        for name, values in (("key", cache.keys), ("value", cache.values)):
            rounded, scales = quantize(np.asarray(values, np.float32).swapaxes(0, 1), dtype)
            for tensor, numbers in ((f"{name}s", rounded), (f"{name}_scales", scales)):
                if numbers is not None:
                    file.seek(offsets[tensor] + int(ends[row] - lengths[row]) * numbers[0].nbytes)
                    file.write(numbers.tobytes())

    with files.replacing(path) as file:
        file.write(header)
        file.write(ends.tobytes())
        yield write


def read(path: Path, row: int) -> KVCache:
    """The stored keys and values of one row, float32 [layers, tokens, kv_heads, head_dim]; reads no other row."""
    with safetensors.safe_open(path, "np") as file:
        tokens = _tokens(file, row)
        names: set[str] = {*file.keys()} - {"ends"}
        tensors = {name: file.get_slice(name)[tokens] for name in names}
    keys, values = (
        unpack(tensors[f"{name}s"], tensors.get(f"{name}_scales")).swapaxes(0, 1) for name in ("key", "value")
    )
    return KVCache(keys, values)


def length(path: Path, row: int) -> int:
    """Tokens whose keys and values `read` gives."""
    with safetensors.safe_open(path, "np") as file:
        tokens = _tokens(file, row)
    return tokens.stop - tokens.start


def _tokens(file: Any, row: int) -> slice:
    ends = file.get_slice("ends")[max(0, row - 1) : row + 1].tolist()
    return slice(ends[0] if row else 0, ends[-1])


def _header(shapes: dict[str, tuple[str, tuple[int, ...]]]) -> tuple[bytes, dict[str, int]]:
    """The header of a safetensors file with these dtypes and shapes, and each tensor's offset in the file."""
    tensors, begin = {}, 0
    for name, (dtype, shape) in shapes.items():
        code, size = _SAFETENSORS[dtype]
        end = begin + size * math.prod(shape)
        tensors[name] = {"dtype": code, "shape": shape, "data_offsets": [begin, end]}
        begin = end
    content = json.dumps(tensors).encode()
    content += b" " * (-len(content) % 8)
    header = len(content).to_bytes(8, "little") + content
    return header, {name: len(header) + tensor["data_offsets"][0] for name, tensor in tensors.items()}
