"""Reads and writes Hugging Face folders: safetensors, configs and tokenizer."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from grit_jax.config import EmbeddingConfig, InputError, TransformerConfig
from grit_jax.hf.names import IGNORED_SUFFIXES, PROJECTION, TENSORS, Tensor, read_config, write_config
from grit_jax.model.pretrained import Pretrained
from grit_jax.model.transformer import Params, abstract_model, abstract_params
from grit_jax.tokenizer import Tokenizer

Dtype = Literal["float32", "bfloat16", "float16"]
_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}

_CONFIG, _GRIT_CONFIG, _INDEX = "config.json", "grit_config.json", "model.safetensors.index.json"
_PROJECTION_FILE = "projection.safetensors"

# The GRIT format as transformers' chat template; it renders what `prompts.generation` makes.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|user|>\\n' + message['content'] + '\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>\\n' + message['content'] | trim + eos_token + '\\n' }}"
    "{% else %}{{ raise_exception('roles are user and assistant') }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


def is_folder(path: str | Path) -> bool:
    """Whether `path` has a config.json and safetensors."""
    path = Path(path)
    return (path / _CONFIG).is_file() and any(path.glob("*.safetensors"))


def open_folder(path: str | Path) -> Pretrained:
    """The model of a Hugging Face folder; weights are read when `load` is called.

    Raises:
      InputError: A file is missing or malformed, a feature is not supported, or tensors are missing, unknown or of
        another shape.
    """
    path = Path(path)
    architecture = read_config(_read_json(path / _CONFIG), source=str(path / _CONFIG))
    embedding = EmbeddingConfig()
    if (path / _GRIT_CONFIG).is_file():
        embedding = EmbeddingConfig(**_read_json(path / _GRIT_CONFIG))
    tokenizer = Tokenizer.load(path)
    architecture = architecture.resolve(tokenizer.vocab_size)

    def load(shardings: Any) -> Params:
        return _load(path, architecture, embedding, shardings)

    return Pretrained(architecture, embedding, tokenizer, load)


def _table(path: Path, architecture: TransformerConfig, embedding: EmbeddingConfig) -> list[Tensor]:
    """The row of every parameter."""
    family = _read_json(path / _CONFIG)["model_type"]
    rows = [row for row in TENSORS[family] if row.path != ("head",) or not architecture.tie_embeddings]
    return rows + (list(PROJECTION) if embedding.projection_dim else [])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


class _Tensors:
    """The tensors of a folder's safetensors files, by name."""

    def __init__(self, path: Path, stack: contextlib.ExitStack):
        self._path, self._files = path, {}
        names = sorted(file.name for file in path.glob("*.safetensors"))
        if (path / _INDEX).is_file():
            indexed = set(_read_json(path / _INDEX)["weight_map"].values())
            if absent := sorted(indexed - set(names)):
                raise InputError(f"{path}: {_INDEX} names files that are not there: {', '.join(absent)}")
            names = sorted(indexed | ({_PROJECTION_FILE} & set(names)))
        for name in names:
            try:
                file = stack.enter_context(safetensors.safe_open(path / name, framework="numpy"))
            except Exception as error:  # safetensors' own errors
                raise InputError(f"{path / name}: not a complete safetensors file ({error}); copy it again") from error
            self._files |= dict.fromkeys(file.keys(), file)

    def names(self) -> set[str]:
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """float32 values of a slice; nothing else is read."""
        return self._files[name].get_slice(name)[index].astype(np.float32)


def _load(path: Path, architecture: TransformerConfig, embedding: EmbeddingConfig, shardings: Any) -> Params:
    shapes = abstract_params(abstract_model(architecture, embedding.projection_dim))
    rows = _table(path, architecture, embedding)
    with contextlib.ExitStack() as stack:
        tensors = _Tensors(path, stack)
        _check_tensors(path, tensors, rows, shapes, architecture)
        params: Params = {}
        for row in rows:
            _set(params, row.path, _place(tensors, row, _get(shapes, row.path).shape, _get(shardings, row.path)))
    return params


def _place(tensors: _Tensors, row: Tensor, shape: tuple[int, ...], sharding: jax.sharding.Sharding) -> jax.Array:
    """One parameter, every device reading the slices of the stored tensors that it holds."""

    def piece(index: tuple[slice, ...] | None) -> np.ndarray:
        index = index or (slice(None),) * len(shape)
        if not row.stacked:
            return _read_piece(tensors, row, row.name, shape, index)
        layers = range(*index[0].indices(shape[0]))
        return np.stack(
            [_read_piece(tensors, row, row.name.format(layer=layer), shape[1:], index[1:]) for layer in layers]
        )

    return jax.make_array_from_callback(shape, sharding, piece)


def _read_piece(
    tensors: _Tensors, row: Tensor, name: str, shape: tuple[int, ...], index: tuple[slice, ...]
) -> np.ndarray:
    if row.transform == "same":
        return tensors.read(name, index)
    # A kernel [in..., out...] is stored as [out, in]; slices of a flattened dim are whole heads.
    num_in = _num_in_dims(row)
    starts_stops = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
    local = tuple(stop - start for start, stop in starts_stops)
    flat = [_flat_slice(starts_stops[part], shape[part]) for part in (slice(num_in), slice(num_in, None))]
    return tensors.read(name, (flat[1], flat[0])).T.reshape(local)


def _flat_slice(ranges: list[tuple[int, int]], sizes: tuple[int, ...]) -> slice:
    inner = math.prod(sizes[1:])
    assert all(span == (0, size) for span, size in zip(ranges[1:], sizes[1:], strict=True))
    return slice(ranges[0][0] * inner, ranges[0][1] * inner)


def _num_in_dims(row: Tensor) -> int:
    """Input dims of a kernel; the attention output takes heads and head_dim."""
    return 2 if row.path[-2] == "out" else 1


def _stored_shape(row: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    if row.stacked:
        shape = shape[1:]
    if row.transform == "same":
        return shape
    num_in = _num_in_dims(row)
    return math.prod(shape[num_in:]), math.prod(shape[:num_in])


def _stored_names(rows: list[Tensor], shapes: Params) -> Iterator[tuple[str, Tensor, int | None]]:
    """Every stored tensor: its name, row and layer."""
    for row in rows:
        if not row.stacked:
            yield row.name, row, None
            continue
        for layer in range(_get(shapes, row.path).shape[0]):
            yield row.name.format(layer=layer), row, layer


def _check_tensors(
    path: Path, tensors: _Tensors, rows: list[Tensor], shapes: Params, architecture: TransformerConfig
) -> None:
    expected = {name: _stored_shape(row, _get(shapes, row.path).shape) for name, row, _ in _stored_names(rows, shapes)}
    there = {name for name in tensors.names() if not name.endswith(IGNORED_SUFFIXES)}
    if architecture.tie_embeddings:
        there.discard("lm_head.weight")  # some folders repeat the tied table
    problems = [f"{name} is missing" for name in expected if name not in there]
    problems += [f"{name} is not a tensor of this model" for name in sorted(there - expected.keys())]
    problems += [
        f"{name} has shape {tensors.shape(name)}, not {shape}"
        for name, shape in expected.items()
        if name in there and tensors.shape(name) != shape
    ]
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise InputError(f"{path}: weights do not match {_CONFIG}: {'; '.join(problems[:8])}{more}")


def save_folder(
    out: str | Path, pretrained: Pretrained, params: Params, *, dtype: Dtype = "float32", max_shard_bytes: int = 5 << 30
) -> None:
    """Writes a folder that transformers opens and `open_folder` reads back bit by bit (in float32).

    Args:
      out: New folder; an earlier export there is replaced.
      pretrained: Architecture, embedding settings and tokenizer.
      params: The parameters.
      dtype: Type of the stored weights.
      max_shard_bytes: Largest safetensors file.

    Raises:
      InputError: `out` holds something else.
    """
    out = Path(out)
    if out.exists() and not is_folder(out) and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not an exported model; choose another folder")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tokenizer, architecture = pretrained.tokenizer, pretrained.architecture
    config = write_config(architecture, dtype=dtype, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)
    _write_json(partial / _CONFIG, config)
    rows = _table(partial, architecture, EmbeddingConfig())
    _write_tensors(partial, "model", _stored_tensors(rows, params, dtype), max_shard_bytes)
    if pretrained.embedding.projection_dim:
        _write_tensors(partial, "projection", _stored_tensors(list(PROJECTION), params, dtype), max_shard_bytes)
    _write_json(partial / _GRIT_CONFIG, dataclasses.asdict(pretrained.embedding))
    special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.eos_id}
    _write_json(partial / "generation_config.json", special)
    files = tokenizer.files()
    settings = json.loads(files["tokenizer_config.json"]) | {
        "pad_token": tokenizer.eos,
        "padding_side": "right",
        "model_max_length": architecture.max_length,
        "chat_template": CHAT_TEMPLATE,
    }
    (partial / "tokenizer.json").write_text(files["tokenizer.json"])
    _write_json(partial / "tokenizer_config.json", settings)
    (partial / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


def _stored_tensors(rows: list[Tensor], params: Params, dtype: Dtype) -> Iterator[tuple[str, np.ndarray]]:
    for name, row, layer in _stored_names(rows, params):
        value = _get(params, row.path)
        value = np.asarray(value if layer is None else value[layer])
        if row.transform == "transpose":
            num_in = _num_in_dims(row)
            value = value.reshape(math.prod(value.shape[:num_in]), -1).T
        yield name, np.ascontiguousarray(value.astype(_DTYPES[dtype]))


def _write_tensors(folder: Path, stem: str, tensors: Iterator[tuple[str, np.ndarray]], max_shard_bytes: int) -> None:
    """One file, or several with an index; no more than one shard is held in memory."""
    shards: list[list[str]] = []
    pending: dict[str, np.ndarray] = {}

    def flush() -> None:
        shards.append(list(pending))
        file = folder / f"{stem}-{len(shards)}.safetensors"
        safetensors.numpy.save_file(pending, file, metadata={"format": "pt"})
        pending.clear()

    total = 0
    for name, value in tensors:
        if pending and sum(held.nbytes for held in pending.values()) + value.nbytes > max_shard_bytes:
            flush()
        pending[name] = value
        total += value.nbytes
    flush()
    if len(shards) == 1:
        (folder / f"{stem}-1.safetensors").rename(folder / f"{stem}.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        (folder / f"{stem}-{number}.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    _write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _get(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _set(tree: Params, path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value
