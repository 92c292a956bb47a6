"""Opens and writes Hugging Face folders; reads them from a disk or a bucket."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import jax.numpy as jnp
from etils import epath
from flax.traverse_util import flatten_dict
from jax.typing import DTypeLike

from grit_jax import files
from grit_jax.config import Attention, EmbeddingConfig, Pooling, TransformerConfig, jsonfile
from grit_jax.errors import InputError
from grit_jax.families.family import Tensor
from grit_jax.hf import interop, tensors
from grit_jax.hf.config_json import read_config, write_config
from grit_jax.model.pretrained import Pretrained
from grit_jax.model.transformer import Params, abstract_model, abstract_params
from grit_jax.text.tokenizer import Tokenizer

CONFIG_FILE, GRIT_CONFIG_FILE = "config.json", "grit_config.json"


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether `path` has a config.json and safetensors."""
    folder = epath.Path(path)
    return files.exists(folder / CONFIG_FILE) and any(name.endswith(".safetensors") for name in files.names(folder))


def open_folder(path: str | os.PathLike[str]) -> Pretrained:
    """The model of a Hugging Face folder; `load` reads the weights, and never runs code of the folder.

    Raises:
      InputError: A file is missing or malformed, a feature is not supported, or tensors are missing, unknown, of
        another shape or not finite.
    """
    folder = epath.Path(path)
    config = jsonfile.read(folder / CONFIG_FILE)
    architecture = read_config(config.values, source=config.source)
    embedding = EmbeddingConfig()
    if files.exists(folder / GRIT_CONFIG_FILE):
        embedding = read_embedding(jsonfile.read(folder / GRIT_CONFIG_FILE))
    tensors.weight_files(folder)
    try:
        # Some tokenizers, such as Gemma 3's, have more entries than the model has rows.
        tokenizer = Tokenizer.load(folder).with_rows(architecture.vocab_size)
        architecture = architecture.resolve(tokenizer.vocab_size)
    except InputError as error:
        message = str(error)
        raise error if message.startswith(str(folder)) else InputError(f"{config.source}: {message}") from error

    def load(shardings: Any, dtype: DTypeLike = jnp.float32) -> Params:
        return _load(folder, architecture, embedding, shardings, dtype)

    return Pretrained(architecture, embedding, tokenizer, load)


def read_embedding(section: jsonfile.Section) -> EmbeddingConfig:
    """What `grit_config.json` holds."""
    names = [field.name for field in dataclasses.fields(EmbeddingConfig)]
    if unknown := sorted(section.values.keys() - names):
        raise section.error(unknown[0], f"is not known; keys are {', '.join(names)}")
    return EmbeddingConfig(
        attention=section.choice("attention", get_args(Attention)),
        pooling=section.choice("pooling", get_args(Pooling)),
        normalized=section.flag("normalized"),
        projection_dim=section.integer("projection_dim", null=True),
    )


def _load(
    folder: epath.Path, architecture: TransformerConfig, embedding: EmbeddingConfig, shardings: Any, dtype: DTypeLike
) -> Params:
    shapes = abstract_params(abstract_model(architecture, embedding.projection_dim))
    wanted = tensors.model_tensors(architecture, embedding)
    stored = tensors.stored_tensors(folder, projection=embedding.projection_dim is not None)
    # Some folders repeat the tied table as the head.
    has_head = architecture.tie_embeddings and tensors.TIED_HEAD.name in stored
    tensors.check_tensors(str(folder), stored, [*wanted, tensors.TIED_HEAD] if has_head else wanted, shapes)
    params = tensors.load_params(str(folder), wanted, stored, shapes, shardings, dtype)
    if has_head and tensors.TIED_HEAD.path in flatten_dict(shardings):
        table = tensors.get(params, tensors.TIED_HEAD.path)
        head, _ = tensors.load_param(tensors.TIED_HEAD, stored, table.shape, table.sharding, dtype)
        if not jnp.array_equal(head, table):
            raise InputError(
                f"{folder}: {tensors.TIED_HEAD.name} is not the embedding table, though config.json says "
                "tie_word_embeddings=true; set that to false to keep both, or remove the tensor"
            )
    return params


def save_folder(
    out: str | Path,
    pretrained: Pretrained,
    params: Params,
    *,
    dtype: tensors.Dtype = "float32",
    max_shard_bytes: int = 2 << 30,
    instructions: Mapping[str, str] = MappingProxyType({}),
    origin: interop.Origin = interop.UNKNOWN,
) -> None:
    """Writes a folder that transformers opens and, in float32, `open_folder` reads back bit for bit.

    It also has the files of sentence-transformers and older versions of transformers, and a model card.

    Args:
      out: New folder; an earlier export there is replaced.
      pretrained: The model.
      params: Its parameters.
      dtype: tensors.Dtype of the stored weights.
      max_shard_bytes: Size limit of a safetensors file.
      instructions: Instructions of sentence-transformers' named prompts; `query` and `document` have none by default.
      origin: How the model was made, for the model card.

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
    if code := interop.remote_code(architecture):
        config["auto_map"], text = code
        (partial / interop.REMOTE_CODE_FILE).write_text(text)
    write_json(partial / CONFIG_FILE, config)

    def write(folder: Path, stem: str, rows: Iterable[Tensor], max_shard_bytes: int = sys.maxsize) -> None:
        tensors.write_tensors(folder, stem, tensors.stored_values(rows, params, dtype), max_shard_bytes=max_shard_bytes)

    write(partial, "model", tensors.model_tensors(architecture, EmbeddingConfig()), max_shard_bytes)
    if pretrained.embedding.projection_dim:
        write(partial, "projection", tensors.PROJECTION)
    write_json(partial / GRIT_CONFIG_FILE, dataclasses.asdict(pretrained.embedding))
    special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.padding_id}
    write_json(partial / "generation_config.json", special)
    tokenizer_files = tokenizer.files()
    settings = json.loads(tokenizer_files["tokenizer_config.json"]) | {
        "pad_token": tokenizer.padding,
        "padding_side": "right",
        "model_max_length": architecture.max_length,
        "chat_template": interop.CHAT_TEMPLATE,
    }
    (partial / "tokenizer.json").write_text(interop.older_tokenizer(tokenizer_files["tokenizer.json"]))
    write_json(partial / "tokenizer_config.json", settings)
    (partial / "chat_template.jinja").write_text(interop.CHAT_TEMPLATE)
    for name, value in interop.sentence_files(architecture, pretrained.embedding, instructions).items():
        (partial / name).parent.mkdir(exist_ok=True)
        write_json(partial / name, value)
    if (dense := partial / interop.DENSE_FOLDER).exists():
        write(dense, "model", interop.DENSE)
    card = interop.model_card(out.name, architecture, pretrained.embedding, tokenizer, instructions, origin)
    (partial / interop.CARD_FILE).write_text(card)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON for people to read."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
