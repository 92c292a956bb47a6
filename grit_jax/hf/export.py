"""Writes Hugging Face folders."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import ml_dtypes
import numpy as np

from grit_jax.config import EmbeddingConfig
from grit_jax.errors import InputError
from grit_jax.hf import targets
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
    "{{ bos_token }}{% set told = namespace(text='', ended=false) %}{% for message in messages %}"
    "{% if message['role'] in ['system', 'developer'] %}"
    "{% if told.ended %}{{ raise_exception('a system message must come before all others') }}{% endif %}"
    "{% set content = message['content'] | trim %}"
    "{% if content %}{% set told.text = told.text + content + '\\n\\n' %}{% endif %}"
    "{% elif message['role'] == 'user' %}{{ '<|user|>\\n' + told.text + message['content'] + '\\n' }}"
    "{% set told.text = '' %}{% set told.ended = true %}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>\\n' + message['content'] | trim + eos_token + '\\n' }}"
    "{% if told.text %}{{ raise_exception('a user message must follow the system message') }}{% endif %}"
    "{% set told.ended = true %}"
    "{% else %}{{ raise_exception('roles are system, user and assistant') }}{% endif %}"
    "{% endfor %}"
    "{% if told.text %}{{ raise_exception('a user message must follow the system message') }}{% endif %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


def save_folder(
    out: str | Path,
    pretrained: Pretrained,
    params: Params,
    *,
    dtype: Dtype = "float32",
    max_shard_bytes: int = 2 << 30,
    instructions: Mapping[str, str] = MappingProxyType({}),
    origin: targets.Origin | None = None,
) -> None:
    """Writes a folder that transformers opens and `open_folder` reads back bit by bit (in float32).

    It also holds what sentence-transformers and older versions of transformers need, and a model card.

    Args:
      out: New folder; an earlier export there is replaced.
      pretrained: Architecture, embedding settings and tokenizer.
      params: The parameters.
      dtype: Type of the stored weights.
      max_shard_bytes: Largest safetensors file.
      instructions: Instructions of sentence-transformers' named prompts; `query` and `document` have none by default.
      origin: What the model card says of how the model was made.

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
    if code := targets.remote_code(architecture):
        config["auto_map"], text = code
        (partial / targets.REMOTE_CODE_FILE).write_text(text)
    _write_json(partial / CONFIG_FILE, config)
    rows = table(architecture, EmbeddingConfig())
    write_tensors(partial, "model", _stored(rows, params, dtype), max_shard_bytes=max_shard_bytes)
    if pretrained.embedding.projection_dim:
        write_tensors(partial, "projection", _stored(PROJECTION, params, dtype), max_shard_bytes=sys.maxsize)
    _write_json(partial / GRIT_CONFIG_FILE, dataclasses.asdict(pretrained.embedding))
    special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.padding_id}
    _write_json(partial / "generation_config.json", special)
    files = tokenizer.files()
    settings = json.loads(files["tokenizer_config.json"]) | {
        "pad_token": tokenizer.padding,
        "padding_side": "right",
        "model_max_length": architecture.max_length,
        "chat_template": CHAT_TEMPLATE,
    }
    (partial / "tokenizer.json").write_text(targets.older_tokenizer(files["tokenizer.json"]))
    _write_json(partial / "tokenizer_config.json", settings)
    (partial / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    for name, value in targets.sentence_files(architecture, pretrained.embedding, instructions).items():
        (partial / name).parent.mkdir(exist_ok=True)
        _write_json(partial / name, value)
    if (dense := partial / targets.DENSE_FOLDER).exists():
        write_tensors(dense, "model", _stored(targets.DENSE, params, dtype), max_shard_bytes=sys.maxsize)
    card = targets.model_card(
        out.name, architecture, pretrained.embedding, tokenizer, instructions, origin or targets.Origin()
    )
    (partial / targets.CARD_FILE).write_text(card)
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


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
