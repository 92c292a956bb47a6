"""Writes Hugging Face folders."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from grit_jax.config import EmbeddingConfig, InputError
from grit_jax.hf.architecture import write_config
from grit_jax.hf.folder import CONFIG_FILE, GRIT_CONFIG_FILE, is_folder
from grit_jax.hf.names import PROJECTION, Tensor, get, table
from grit_jax.hf.tensors import write_tensors
from grit_jax.model.pretrained import Pretrained
from grit_jax.model.transformer import Params

Dtype = Literal["float32", "bfloat16", "float16"]
_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}

# The GRIT format as transformers' chat template; it renders what `prompts.generation` makes.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|user|>\\n' + message['content'] + '\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>\\n' + message['content'] | trim + eos_token + '\\n' }}"
    "{% else %}{{ raise_exception('roles are user and assistant') }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


def save_folder(
    out: str | Path, pretrained: Pretrained, params: Params, *, dtype: Dtype = "float32", max_shard_bytes: int = 2 << 30
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
    _write_json(partial / CONFIG_FILE, config)
    rows = table(architecture, EmbeddingConfig())
    write_tensors(partial, "model", _stored(rows, params, dtype), max_shard_bytes=max_shard_bytes)
    if pretrained.embedding.projection_dim:
        write_tensors(partial, "projection", _stored(PROJECTION, params, dtype), max_shard_bytes=max_shard_bytes)
    _write_json(partial / GRIT_CONFIG_FILE, dataclasses.asdict(pretrained.embedding))
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


def _stored(rows: Iterable[Tensor], params: Params, dtype: Dtype) -> Iterator[tuple[str, np.ndarray]]:
    """Every stored tensor, one at a time.

    Raises:
      InputError: A finite weight is too large for `dtype`.
    """
    for row in rows:
        param = get(params, row.path)
        for name, index in row.places(param.shape):
            value = np.asarray(param[index] if index else param)
            with np.errstate(over="ignore"):
                stored = np.ascontiguousarray(row.to_stored(value).astype(_DTYPES[dtype]))
            if dtype == "float16" and np.any(np.isinf(stored)) and np.all(np.isfinite(value)):
                raise InputError(f"{name} has values over float16's 65504; export in bfloat16 or float32")
            yield name, stored


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
