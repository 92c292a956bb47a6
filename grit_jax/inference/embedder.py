"""Embeds tokenized texts, many to a row, or one to a row to keep its keys and values."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from grit_jax.config import Attention, EmbeddingConfig, Pooling
from grit_jax.data.batch import max_segments, sizes
from grit_jax.data.packing import fill_single_rows
from grit_jax.data.streams.embedding import pool_weights
from grit_jax.errors import NotFiniteError
from grit_jax.inference.kv_cache import embed_with_cache
from grit_jax.inference.runner import ModelRunner, bucket, one_behind
from grit_jax.model.pooling import vectors_of
from grit_jax.model.transformer import KVCache, bind
from grit_jax.parallel import sharding
from grit_jax.parallel.execution import Execution
from grit_jax.text.prompts import TokenizedPrompt


class Encoded(NamedTuple):
    """Embeddings of texts.

    Attributes:
      vectors: float32 [texts, embed].
      num_tokens: Tokens read.
      num_truncated: Texts cut to the maximum length.
    """

    vectors: np.ndarray
    num_tokens: int
    num_truncated: int


class Cached(NamedTuple):
    """The result of the embedding pass for one text.

    Attributes:
      vector: float32 [embed].
      cache: Rotated keys, and values, of its tokens; numpy [layers, tokens, kv_heads, head_dim].
    """

    vector: np.ndarray
    cache: KVCache


class StartedEmbedding(NamedTuple):
    """A batch that the device is embedding.

    Attributes:
      indices: Indices of the texts in it.
      slots: Index of each text's vector in the flattened output.
      output: float32 [rows, segments, embed], which the device may still be computing.
    """

    indices: list[int]
    slots: list[int]
    output: jax.Array

    def vectors(self) -> np.ndarray:
        """Waits for the vectors of the texts, float32 [texts, embed]."""
        return np.asarray(self.output).reshape(-1, self.output.shape[-1])[self.slots]


class Embedder:
    """Embeds texts with a model; `settings` say how its vectors are made."""

    def __init__(self, runner: ModelRunner, settings: EmbeddingConfig):
        self._runner, self._settings = runner, settings

    @property
    def embed_dim(self) -> int:
        """Width of a vector."""
        return self._settings.projection_dim or self._runner.model.config.embed_dim

    def embed(
        self, texts: Sequence[TokenizedPrompt], batch_tokens: int | None, progress: Callable[[int], None]
    ) -> np.ndarray:
        """Vectors of texts, float32 [texts, embed]; `progress` gets the number of texts of each finished batch."""
        vectors = np.zeros((len(texts), self.embed_dim), np.float32)
        for batch in one_behind(self.start(texts, batch_tokens)):
            vectors[batch.indices] = batch.vectors()
            progress(len(batch.indices))
        return vectors

    def start(self, texts: Sequence[TokenizedPrompt], batch_tokens: int | None) -> Iterator[StartedEmbedding]:
        """Gives the device one batch after another without waiting for the vectors."""
        for packed in self._runner.packed([text.tokens for text in texts], batch_tokens):
            indices, rows = packed.texts.tolist(), packed.rows
            weights = rows.spread(_pool_weights([texts[index] for index in indices], self._settings.pooling))
            yield StartedEmbedding(indices, packed.slots.tolist(), self._vectors(*rows[:3], weights))

    def with_caches(
        self, texts: Sequence[TokenizedPrompt], attention: Attention | None, batch_tokens: int | None
    ) -> Iterator[tuple[int, Cached]]:
        """Yields the index, vector, keys and values of each text; texts of similar length share a batch."""
        runner = self._runner
        settings = dataclasses.replace(self._settings, attention=attention or self._settings.attention)
        lengths = np.array([runner.row_length(len(text.tokens)) for text in texts], np.int64)
        for length in np.unique(lengths).tolist():
            of_length = np.flatnonzero(lengths == length).tolist()
            full = runner.full_batch(length, batch_tokens)
            for first in range(0, len(of_length), full):
                members = of_length[first : first + full]
                read = [texts[index] for index in members]
                num_rows = min(full, bucket(len(members), at_least=runner.shards))
                rows = fill_single_rows([text.tokens for text in read], num_rows=num_rows, row_length=length)
                weights = rows.spread(_pool_weights(read, settings.pooling))
                with jax.set_mesh(runner.mesh):
                    vectors, cache = embed_with_cache(
                        runner.model, runner.params, rows.tokens, rows.segment_ids, weights,
                        settings=settings, execution=runner.execution,
                    )  # fmt: skip
                vectors, keys, values = map(np.asarray, (vectors, *cache))
                for row, index in enumerate(members):
                    own = row, slice(len(texts[index].tokens))
                    yield index, Cached(vectors[row], KVCache(keys[:, *own], values[:, *own]))

    def warm_up(self, max_length: int, progress: Callable[[int], None]) -> int:
        """Compiles all programs that `embed` needs for texts of up to `max_length` tokens, and returns how many."""
        runner = self._runner
        shapes = [
            (num_rows, row_length)
            for row_length in runner.row_lengths(max_length)
            for num_rows in sizes(runner.shards, runner.full_batch(row_length, None), growth=2)
        ]
        for shape in shapes:
            zeros = np.zeros(shape, np.int32)
            jax.block_until_ready(self._vectors(zeros, zeros, zeros, np.zeros(shape, np.float32)))
            progress(1)
        return len(shapes)

    def _vectors(self, *rows: np.ndarray) -> jax.Array:
        """Vectors of packed rows, float32 [rows, segments, embed]."""
        runner = self._runner
        with jax.set_mesh(runner.mesh):
            return _embed(runner.model, runner.params, *rows, settings=self._settings, execution=runner.execution)


def refuse_not_finite(vectors: np.ndarray) -> None:
    """Checks vectors, [texts, embed].

    Raises:
      NotFiniteError: One is not finite; the message gives its index.
    """
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=-1))
    if len(bad):
        raise NotFiniteError(
            f"text {bad[0]}: its vector is not finite ({len(bad)} of {len(vectors)} are not); the model's weights are "
            "damaged, or too large for the type it computes in"
        )


def _pool_weights(texts: Sequence[TokenizedPrompt], pooling: Pooling) -> np.ndarray:
    """Weights of all tokens, one text after the other; a text is pooled over its first span."""
    spans, lengths = np.array([text.spans[0] for text in texts]), np.array([len(text.tokens) for text in texts])
    return pool_weights(spans, lengths, pooling)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("settings", "execution"))
def _embed(model, params, tokens, segment_ids, positions, weights, *, settings: EmbeddingConfig, execution: Execution):
    """Vectors of packed texts, float32 [rows, segments, embed], whole on every device."""
    model = bind(model, params)
    mask = model.mask(segment_ids, positions, causal=settings.attention == "causal")
    hidden, _ = model(tokens, mask, execution)
    num_segments = max_segments(tokens.shape[1])
    vectors = vectors_of(model, hidden, segment_ids, weights, num_segments=num_segments, settings=settings)
    return sharding.constrain(vectors, "whole", "whole", "whole")
