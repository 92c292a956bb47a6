"""The reference's recorded numbers, and the bridge to them."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import safetensors.numpy

from grit_jax.config import MeshConfig
from grit_jax.data.batch import EmbeddingBatch, GenerativeBatch, max_segments
from grit_jax.data.streams.embedding import pool_weights
from grit_jax.hf.model_folder import open_folder
from grit_jax.hf.tensors import get, model_tensors
from grit_jax.model.transformer import abstract_model, abstract_params, param_axes
from grit_jax.parallel import sharding

POOLING = {"mean": "mean", "weightedmean": "weighted_mean", "lasttoken": "last_token", "cls": "cls"}
HIDDEN, LOSS, SGD, ADAMW, GRADIENT = 2e-5, 2e-5, 5e-6, 1e-4, 1e-4


def tensors(shared, name):
    """A recorded safetensors file."""
    return safetensors.numpy.load_file(shared / f"golden/{name}.safetensors")


def described(shared, name):
    """A recorded JSON file."""
    return json.loads((shared / f"golden/{name}.json").read_text())


def load(shared, family, folder: Path):
    """The reference's initial model; its folder lacks the tokenizer, which lies beside it."""
    folder.mkdir()
    for file in [*(shared / f"golden/model_{family}").iterdir(), *(shared / "golden/tokenizer").iterdir()]:
        (folder / file.name).symlink_to(file)
    pretrained = open_folder(folder)
    model = abstract_model(pretrained.architecture)
    mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    placed = sharding.shardings(mesh, abstract_params(model), param_axes(model))
    return pretrained, pretrained.load(placed)


def sampled(value):
    """What is recorded of a large tensor."""
    return value if value.size <= 1024 else value.reshape(-1)[::7]


def torch_names(params, architecture, embedding):
    """The parameters under the reference's names, without its wrapper's prefix."""
    named = {}
    for row in model_tensors(architecture, embedding):
        value = np.asarray(get(params, row.path))
        named |= {name: row.to_stored(value[index] if index else value) for name, index in row.stored(value.shape)}
    return named


def compare(recorded, prefix, named, error):
    """The largest `error(ours, theirs)` over all recorded tensors under `prefix`, of which there must be some."""
    errors = {}
    for key in (key for key in recorded if key.startswith(prefix)):
        name = key.removeprefix(prefix).removeprefix("model.")
        name = name if name in named else f"model.{name}"
        ours = np.asarray(named[name], np.float64)
        theirs = recorded[key].astype(np.float64)
        errors[name] = error(ours if ours.shape == theirs.shape else sampled(ours), theirs)
    assert errors
    return max(errors.items(), key=lambda item: item[1])


def relative(ours, theirs):
    """||a - b|| / ||b||."""
    return np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), 1e-30)


def absolute(ours, theirs):
    """Largest difference."""
    return np.max(np.abs(ours - theirs))


def _padded(arrays, length):
    return np.concatenate([np.pad(array, ((0, 0), (0, length - array.shape[1]))) for array in arrays]).astype(np.int32)


def _rows(ids, attention_mask, length):
    """One text per row: tokens, segments and positions."""
    tokens, real = _padded(ids, length), _padded(attention_mask, length)
    return tokens * real, real, (np.arange(length) * real).astype(np.int32)


def embedding_batch(batches, pooling):
    """The embedding stream of some recorded batches, one text per row: all queries, then all passages."""
    parts = [(batch, kind) for kind in ("query", "passage") for batch in batches]
    ids, masks = ([batch[f"{kind}.{key}"] for batch, kind in parts] for key in ("input_ids", "attention_mask"))
    length = -(-max(array.shape[1] for array in ids) // 32) * 32
    tokens, segment_ids, positions = _rows(ids, masks, length)
    weights = np.zeros(tokens.shape, np.float32)
    skipped = np.concatenate([batch[f"{kind}.instruction_lens"] for batch, kind in parts])
    for row, (skip, used) in enumerate(zip(skipped, segment_ids.sum(1), strict=True)):
        weights[row, :used] = pool_weights(np.array([[skip, used]]), int(used), pooling)
    slots = np.arange(len(tokens), dtype=np.int32) * max_segments(length)
    queries = sum(len(batch["query.input_ids"]) for batch in batches)
    passages = len(tokens) - queries
    return EmbeddingBatch(
        tokens, segment_ids, positions, weights, slots[:queries], slots[queries:],
        np.full(queries, 1 / queries, np.float32), np.arange(passages, dtype=np.int32),
    )  # fmt: skip


def generative_batch(batches, loss, sub_batch=None):
    """The generative stream of some recorded batches, scored as `mixed` (by `sub_batch` samples) or as `token`."""
    ids = [batch["generative.input_ids"] for batch in batches]
    masks = [batch["generative.attention_mask"] for batch in batches]
    length = -(-max(array.shape[1] for array in ids) // 32) * 32
    tokens, segment_ids, positions = _rows(ids, masks, length)
    labels = np.concatenate(
        [np.pad(b["generative.labels"], ((0, 0), (0, length - b["generative.labels"].shape[1])), constant_values=-100)
         for b in batches]
    )  # fmt: skip
    targets = np.concatenate([labels[:, 1:], np.full((len(labels), 1), -100)], axis=1)
    scored = (targets != -100).astype(np.float32)
    if loss == "mixed":
        size = sub_batch or len(scored)
        counts = scored.reshape(-1, size, length).sum((1, 2))
        weights = scored / np.repeat(counts, size)[:, None] / len(counts)
    else:
        weights = scored / len(scored)
    return GenerativeBatch(
        tokens, segment_ids, positions, np.where(scored > 0, targets, 0).astype(np.int32), weights.astype(np.float32)
    )


def recorded_batch(recorded, prefix):
    """The batch tensors under `prefix`."""
    return {key.removeprefix(prefix): value for key, value in recorded.items() if key.startswith(prefix)}
