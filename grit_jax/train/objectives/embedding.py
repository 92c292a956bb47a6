"""The contrastive objective of the embedding stream."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from grit_jax.config import Config
from grit_jax.data.batch import EmbeddingBatch, max_segments
from grit_jax.data.streams.stream import Stream
from grit_jax.losses.contrastive import contrastive_loss, resolve_negatives
from grit_jax.model.pooling import vectors_of
from grit_jax.model.transformer import Transformer
from grit_jax.parallel.sharding import split_axes
from grit_jax.train.health import health_parts
from grit_jax.train.objectives.objective import Inputs, Losses, Objective, Parts

_TEXTS = ("batch", "activation_embed")


class ContrastiveObjective(Objective):
    """InfoNCE of queries against all passages of the global batch, over pooled vectors."""

    uses_head = False
    split_axes = (_TEXTS, _TEXTS)

    def __init__(self, stream: Stream, config: Config):
        super().__init__(stream)
        self._settings, self._loss, self._data = config.model.embedding, config.loss, config.data
        self.weight, self.router_weight = config.loss.embedding_weight, config.loss.embedding_router_weight
        self.causal = self._settings.attention == "causal"

    def inputs(self, batch: EmbeddingBatch) -> Inputs:
        """The rows, and their tokens' weights in the vectors."""
        return Inputs(batch.tokens, batch.segment_ids, batch.positions, batch.pool_weights)

    def kept(self, model: Transformer, hidden: jax.Array, segment_ids: jax.Array, extras: jax.Array) -> jax.Array:
        """The vectors of the rows' texts: [rows, segments, embed]."""
        segments = max_segments(hidden.shape[1])
        return vectors_of(model, hidden, segment_ids, extras, num_segments=segments, settings=self._settings)

    def parts(self, model: Transformer, kept: jax.Array, batch: EmbeddingBatch, dtype: jnp.dtype) -> Parts:
        """This device's share of the queries and of the passages."""
        vectors = kept.reshape(-1, kept.shape[-1])
        return Parts((_own_texts(vectors, batch.query_slots), _own_texts(vectors, batch.passage_slots)), ())

    def losses(self, split: tuple[jax.Array, jax.Array], sums: Any, batch: EmbeddingBatch) -> Losses:
        """L_rep of the batch, and its vectors' `health_parts`."""
        query, passage = split
        loss = contrastive_loss(
            query,
            passage,
            temperature=self._loss.temperature,
            query_weights=batch.query_weights,
            passage_ids=batch.passage_ids,
            negatives=self._loss.negatives,
        )
        return Losses(loss, metrics=health_parts(query, passage))

    def total_weight(self, batch: EmbeddingBatch) -> jax.Array:
        """Sum of the queries' weights."""
        return jnp.sum(batch.query_weights)

    def problem(self, mesh_shape: dict[str, int]) -> str | None:
        """Queries must divide evenly over the devices."""
        shards, queries = math.prod(mesh_shape.values()), self._data.embedding_batch
        if queries % shards == 0:
            return None
        axes = " * ".join(f"mesh.{axis}={size}" for axis, size in mesh_shape.items())
        return (
            f"data.embedding_batch={queries} is not divisible by the mesh's {shards} batch shards ({axes}); "
            f"use a multiple of {shards}"
        )

    def negatives(self, num_shards: int, embed_dim: int) -> str:
        """`dense`, `gathered` or `ring`."""
        queries = self._data.embedding_batch
        width = self._settings.projection_dim or embed_dim
        return resolve_negatives(self._loss.negatives, queries, queries * self._data.group_size, width, num_shards)


def _own_texts(vectors: jax.Array, slots: jax.Array) -> jax.Array:
    """This device's share of the vectors at `slots` of the global batch, from the `vectors` of its rows."""
    axes = split_axes("batch")
    local = slots - jax.lax.axis_index(axes) * len(vectors) if axes else slots
    here = (local >= 0) & (local < len(vectors))
    found = jnp.where(here[:, None], vectors[jnp.where(here, local, 0)], 0)
    return jax.lax.psum_scatter(found, axes, tiled=True) if axes else found
