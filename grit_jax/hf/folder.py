"""Opens Hugging Face folders, on a disk or in a bucket."""

from __future__ import annotations

import dataclasses
import os
from typing import Any, get_args

import jax.numpy as jnp
from etils import epath

from grit_jax import files
from grit_jax.config import Attention, EmbeddingConfig, Pooling, TransformerConfig, jsonfile
from grit_jax.errors import InputError
from grit_jax.hf import tensors as stored
from grit_jax.hf.architecture import read_config
from grit_jax.hf.names import TIED_HEAD, get, table
from grit_jax.model.pretrained import Pretrained
from grit_jax.model.transformer import Params, abstract_model, abstract_params
from grit_jax.text.tokenizer import Tokenizer

CONFIG_FILE, GRIT_CONFIG_FILE = "config.json", "grit_config.json"


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether `path` has a config.json and safetensors."""
    folder = epath.Path(path)
    return files.exists(folder / CONFIG_FILE) and any(name.endswith(".safetensors") for name in files.names(folder))


def open_folder(path: str | os.PathLike[str]) -> Pretrained:
    """The model of a Hugging Face folder; weights are read when `load` is called, and no code of the folder is run.

    Raises:
      InputError: A file is missing or malformed, a feature is not supported, or tensors are missing, unknown, of
        another shape or not finite.
    """
    folder = epath.Path(path)
    config = jsonfile.read(folder / CONFIG_FILE)
    architecture = read_config(config.values, source=config.source)
    embedding = EmbeddingConfig()
    if files.exists(folder / GRIT_CONFIG_FILE):
        embedding = _read_embedding(jsonfile.read(folder / GRIT_CONFIG_FILE))
    stored.weight_files(folder)
    try:
        # Some tokenizers have entries that the model has no rows for, Gemma 3's among them.
        tokenizer = Tokenizer.load(folder).with_rows(architecture.vocab_size)
        architecture = architecture.resolve(tokenizer.vocab_size)
    except InputError as error:
        message = str(error)
        raise error if message.startswith(str(folder)) else InputError(f"{config.source}: {message}") from error

    def load(shardings: Any, dtype: Any = jnp.float32) -> Params:
        return _load(folder, architecture, embedding, shardings, dtype)

    return Pretrained(architecture, embedding, tokenizer, load)


def _read_embedding(section: jsonfile.Section) -> EmbeddingConfig:
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
    folder: epath.Path, architecture: TransformerConfig, embedding: EmbeddingConfig, shardings: Any, dtype: Any
) -> Params:
    shapes = abstract_params(abstract_model(architecture, embedding.projection_dim))
    rows = table(architecture, embedding)
    there = stored.stored_tensors(folder, projection=embedding.projection_dim is not None)
    # Some folders repeat the tied table as the head.
    repeated = [TIED_HEAD] if architecture.tie_embeddings and TIED_HEAD.name in there else []
    stored.check_tensors(str(folder), there, [*rows, *repeated], shapes)
    params: Params = {}
    finite = {}
    for row in rows:
        parent = params
        for key in row.path[:-1]:
            parent = parent.setdefault(key, {})
        shape = get(shapes, row.path).shape
        parent[row.path[-1]], checked = stored.load_param(row, there, shape, get(shardings, row.path), dtype)
        finite |= checked
    stored.check_finite(str(folder), finite)
    for row in repeated:
        embedding_table = get(params, row.path)
        head, _ = stored.load_param(row, there, embedding_table.shape, embedding_table.sharding, dtype)
        if not jnp.array_equal(head, embedding_table):
            raise InputError(
                f"{folder}: {row.name} is not the embedding table, though config.json says tie_word_embeddings=true; "
                "set that to false to keep both, or remove the tensor"
            )
    return params
