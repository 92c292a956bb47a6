"""One model for both skills: embeds and generates."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from grit_jax.checkpoints.loading import load_params, open_model
from grit_jax.config import COPIES, Attention, EmbeddingConfig, MeshConfig, ModelConfig, Pooling, TransformerConfig
from grit_jax.config.ranges import require_positive
from grit_jax.data.batch import max_segments, sizes
from grit_jax.data.packing import FilledRows, Packing, fill_rows, fill_single_rows, pack
from grit_jax.data.streams.embedding import pool_weights
from grit_jax.errors import InputError, NotFiniteError
from grit_jax.inference.answer import Answer
from grit_jax.inference.caching import embed_with_cache, score_after
from grit_jax.inference.engine import Continuation, Engine, LaneSize, bucket
from grit_jax.losses.language import target_log_likelihoods
from grit_jax.model.pooling import embed_rows
from grit_jax.model.transformer import KVCache, Params, abstract_model, bind, split_layers, stack_layers
from grit_jax.parallel import sharding
from grit_jax.parallel.execution import Execution, execution
from grit_jax.text import prompts
from grit_jax.text.tokenizer import Tokenizer

T = TypeVar("T")

Messages = str | Sequence[Mapping[str, str]]


class Encoded(NamedTuple):
    """Embeddings of some texts.

    Attributes:
      vectors: float32 [texts, embed].
      num_tokens: Tokens that were read.
      num_truncated: Texts that were cut to the maximum length.
    """

    vectors: np.ndarray
    num_tokens: int
    num_truncated: int


class Cached(NamedTuple):
    """What the embedding pass makes of one text.

    Attributes:
      vector: float32 [embed].
      cache: Keys, rotated, and values of its tokens, numpy [layers, tokens, kv_heads, head_dim].
    """

    vector: np.ndarray
    cache: KVCache


class Likelihoods(NamedTuple):
    """How likely a model finds some texts.

    Attributes:
      values: float64 [texts]; sum of log p of the scored tokens, in nats.
      num_tokens: int64 [texts]; scored tokens.
      greedy: bool [texts]; whether each scored token is the likeliest one.
      num_truncated: Texts that were cut to the model's limit.
    """

    values: np.ndarray
    num_tokens: np.ndarray
    greedy: np.ndarray
    num_truncated: int


class _PackedTexts(NamedTuple):
    """Packed rows, and for each text in them its number, its place in the flattened rows, and its slot: int [texts]."""

    rows: FilledRows
    texts: np.ndarray
    starts: np.ndarray
    slots: np.ndarray


def refuse_not_finite(vectors: np.ndarray) -> None:
    """Returns where all vectors, [texts, embed], are finite.

    Raises:
      NotFiniteError: One is not; the message names its place.
    """
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=-1))
    if len(bad):
        raise NotFiniteError(
            f"text {bad[0]}: its vector is not finite ({len(bad)} of {len(vectors)} are not); the model's weights are "
            "damaged, or too large for the type it computes in"
        )


class StartedEmbedding(NamedTuple):
    """Texts that the device embeds.

    Attributes:
      places: Of the texts among those that were given.
      slots: Where the vector of each is.
      output: float32 [rows, segments, embed], perhaps not there yet.
    """

    places: list[int]
    slots: list[int]
    output: jax.Array

    def vectors(self) -> np.ndarray:
        """The vectors of the texts, float32 [texts, embed]; waits for them."""
        return np.asarray(self.output).reshape(-1, self.output.shape[-1])[self.slots]


class GritModel:
    """A model with its tokenizer on a mesh.

    Where the mesh spans several processes, all of them make the same calls and get the same answers.

    Args:
      params: Parameters, placed on `mesh`.
      architecture: Resolved shape.
      embedding: How vectors are made.
      tokenizer: The model's tokenizer.
      mesh: Where it runs.
      execution: How it computes.

    Attributes:
      params: Parameters, as the device computes with them.
      architecture: Resolved shape.
      embedding: How vectors are made.
      tokenizer: The model's tokenizer.
      batch_tokens: Tokens that go through the model at a time, unless a call says otherwise.
    """

    def __init__(
        self,
        params: Params,
        architecture: TransformerConfig,
        embedding: EmbeddingConfig,
        tokenizer: Tokenizer,
        *,
        mesh: Mesh,
        execution: Execution,
    ):
        on_cpu = sharding.platform(mesh) == "cpu"
        self.params = split_layers(params) if on_cpu else params
        self.batch_tokens = 2048 if on_cpu else 16384  # a CPU is as fast as long as its caches hold the activations
        self.architecture, self.embedding, self.tokenizer = architecture, embedding, tokenizer
        self._mesh, self._execution = mesh, execution
        self._shortest_row = max(64, execution.row_unit)
        self._model = abstract_model(architecture, embedding.projection_dim)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        step: int | None = None,
        mesh: MeshConfig | None = None,
        devices: Sequence[jax.Device] | None = None,
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    ) -> Self:
        """Loads a run folder, a checkpoint or a Hugging Face folder.

        Args:
          path: Where the model is.
          step: Checkpoint to take; None takes the newest.
          mesh: How it is spread over the devices; None puts a copy on each.
          devices: Where it runs; None takes all.
          dtype: Type of weights and activations; `auto` is float32 on CPU and bfloat16 elsewhere.

        Raises:
          InputError: There is no model, or it does not fit the mesh.
        """
        pretrained = open_model(path, step)
        placed_on = sharding.make_mesh(mesh or COPIES, devices)
        settings = execution(ModelConfig(compute_dtype=dtype, remat="none"), sharding.platform(placed_on))
        params = load_params(pretrained, placed_on, settings.dtype)
        about = pretrained.architecture, pretrained.embedding, pretrained.tokenizer
        return cls(params, *about, mesh=placed_on, execution=settings)

    @property
    def embed_dim(self) -> int:
        """Numbers of a vector."""
        return self.embedding.projection_dim or self.architecture.embed_dim

    def encode(
        self,
        texts: str | Sequence[str],
        *,
        instruction: str = "",
        max_length: int | None = None,
        batch_tokens: int | None = None,
    ) -> np.ndarray:
        """Embeds a text or several; see `encode_with_counts`.

        Returns:
          float32 [embed] of one text, [texts, embed] of a list; of unit length if the model is normalised.
        """
        vectors = self.encode_with_counts(
            [texts] if isinstance(texts, str) else texts,
            instruction=instruction, max_length=max_length, batch_tokens=batch_tokens,
        ).vectors  # fmt: skip
        return vectors[0] if isinstance(texts, str) else vectors

    def encode_with_counts(
        self,
        texts: Sequence[str],
        *,
        instruction: str = "",
        max_length: int | None = None,
        batch_tokens: int | None = None,
        progress: Callable[[int], None] = lambda _: None,
    ) -> Encoded:
        """Embeds texts, many to a row, and counts what was read.

        Args:
          texts: What is embedded.
          instruction: What the model is told about all of them; it is read but not pooled.
          max_length: Tokens kept of each formatted text; None is the model's limit.
          batch_tokens: Tokens that go through the model at a time, padding included; None takes what suits the device.
          progress: Called with the number of texts that each batch finished.

        Raises:
          InputError: A text is empty, the instruction leaves no room for it, it holds a token that the model has no
            embedding of, or its vector is not finite; the message names its place. Or a number is not positive.
        """
        limit = self._limit(max_length)
        tokenized = self.embedding_prompts(texts, instruction=instruction, max_length=limit)
        kept = [prompt.cut(limit) for prompt in tokenized]
        vectors = self.embed(kept, batch_tokens=batch_tokens, progress=progress)
        refuse_not_finite(vectors)
        truncated = sum(len(prompt.tokens) > limit for prompt in tokenized)
        return Encoded(vectors, sum(len(prompt.tokens) for prompt in kept), truncated)

    def embedding_prompts(
        self,
        texts: Sequence[str],
        *,
        instruction: str = "",
        max_length: int | None = None,
        form: prompts.CacheForm = "first",
        first: int = 0,
    ) -> list[prompts.TokenizedPrompt]:
        """What is read of texts to embed them, however long; other arguments and errors as of `encode_with_counts`.

        `form` says whether a text begins with BOS, or comes `second`, after the keys and values of another. Messages
        count texts from `first` on.
        """
        _refuse_others(texts)
        opening = prompts.opening(form, bos=self.tokenizer.bos)
        limit = self._limit(max_length)
        ending = self.tokenizer.ending
        formatted = [prompts.embedding(text, instruction, bos=opening, ending=ending) for text in texts]
        tokenized = prompts.tokenize(formatted, self.tokenizer)
        for place, prompt in enumerate(tokenized, start=first):
            if not len(prompt.spans):
                raise InputError(f"text {place} is empty; leave it out")
            if prompt.spans[0, 0] >= limit - prompt.ending:
                raise InputError(
                    f"text {place}: its instruction takes {prompt.spans[0, 0]} of {limit} tokens and leaves no room "
                    "for the text; shorten it or raise the maximum length"
                )
        return tokenized

    def embed(
        self,
        texts: Sequence[prompts.TokenizedPrompt],
        *,
        batch_tokens: int | None = None,
        progress: Callable[[int], None] = lambda _: None,
    ) -> np.ndarray:
        """Vectors of texts, float32 [texts, embed].

        Args:
          texts: From `embedding_prompts`, of which so many tokens are read as there are, at most the model's limit.
          batch_tokens: As of `encode_with_counts`.
          progress: As of `encode_with_counts`.
        """
        vectors = np.zeros((len(texts), self.embed_dim), np.float32)
        for batch in _one_behind(self.start_embedding(texts, batch_tokens=batch_tokens)):
            vectors[batch.places] = batch.vectors()
            progress(len(batch.places))
        return vectors

    def start_embedding(
        self, texts: Sequence[prompts.TokenizedPrompt], *, batch_tokens: int | None = None
    ) -> Iterator[StartedEmbedding]:
        """`embed` for a caller with other work: the device has a batch when it comes, and need not be done with it."""
        for packed in self._packed([text.tokens for text in texts], batch_tokens):
            places, rows = packed.texts.tolist(), packed.rows
            weights = rows.spread(_pool_weights([texts[place] for place in places], self.embedding.pooling))
            vectors = self._slots(rows.tokens, rows.segment_ids, rows.positions, weights)
            yield StartedEmbedding(places, packed.slots.tolist(), vectors)

    def encode_with_caches(
        self,
        texts: Sequence[str],
        *,
        instruction: str = "",
        max_length: int | None = None,
        form: prompts.CacheForm = "first",
        attention: Attention | None = None,
        batch_tokens: int | None = None,
    ) -> list[Cached]:
        """Embeds texts and keeps the keys and values of the pass, from which answers can go on.

        Args:
          texts: What is embedded.
          instruction: What the model is told about all of them; its keys and values are kept too.
          max_length: Tokens kept of each formatted text; None is the model's limit.
          form: Whether a text begins with BOS, or comes `second`, after the keys and values of another.
          attention: Of the pass; None is the model's own, which vectors are made for.
          batch_tokens: As of `encode_with_counts`.

        Raises:
          InputError: As of `encode_with_counts`.
        """
        read = self.embedding_prompts(texts, instruction=instruction, max_length=max_length, form=form)
        kept = [prompt.cut(self._limit(max_length)) for prompt in read]
        found = dict(self.embed_with_caches(kept, attention=attention, batch_tokens=batch_tokens))
        return [found[place] for place in range(len(texts))]

    def embed_with_caches(
        self,
        texts: Sequence[prompts.TokenizedPrompt],
        *,
        attention: Attention | None = None,
        batch_tokens: int | None = None,
    ) -> Iterator[tuple[int, Cached]]:
        """`embed` that keeps keys and values: the place of each text and what is made of it, a batch at a time.

        Each text has a row of its own; texts of like length come together. Arguments as of `encode_with_caches`.
        """
        settings = dataclasses.replace(self.embedding, attention=attention or self.embedding.attention)
        lengths = np.array([bucket(len(text.tokens), at_least=self._shortest_row) for text in texts], np.int64)
        for length in np.unique(lengths).tolist():
            of_length = np.flatnonzero(lengths == length).tolist()
            full = self._full_batch(length, batch_tokens)
            for first in range(0, len(of_length), full):
                members = of_length[first : first + full]
                shape = min(full, bucket(len(members), at_least=sharding.axis_size(self._mesh, "batch"))), length
                read = [texts[place] for place in members]
                rows = fill_single_rows([text.tokens for text in read], num_rows=shape[0], row_length=length)
                weights = rows.spread(_pool_weights(read, settings.pooling))
                with jax.set_mesh(self._mesh):
                    vectors, cache = embed_with_cache(
                        self._model, self.params, rows.tokens, rows.segment_ids, weights,
                        settings=settings, execution=self._execution,
                    )  # fmt: skip
                vectors, keys, values = map(np.asarray, (vectors, *cache))
                for row, place in enumerate(members):
                    own = row, slice(len(texts[place].tokens))
                    yield place, Cached(vectors[row], KVCache(keys[:, *own], values[:, *own]))

    def warm_up_embedding(self, max_length: int, progress: Callable[[int], None] = lambda _: None) -> int:
        """Compiles all programs that `embed` needs for texts of up to `max_length` tokens, and returns how many.

        `progress` is called after each.
        """
        shapes = []
        for row_length in self.row_lengths(max_length):
            shards = sharding.axis_size(self._mesh, "batch")
            shapes += [(rows, row_length) for rows in sizes(shards, self._full_batch(row_length, None), growth=2)]
        for shape in shapes:
            nothing = np.zeros(shape, np.int32)
            jax.block_until_ready(self._slots(nothing, nothing, nothing, np.zeros(shape, np.float32)))
            progress(1)
        return len(shapes)

    def row_lengths(self, max_length: int) -> list[int]:
        """Lengths of the rows that texts of up to `max_length` tokens are read in."""
        return sizes(self._shortest_row, bucket(max_length, at_least=self._shortest_row), growth=2)

    def _slots(
        self, tokens: np.ndarray, segment_ids: np.ndarray, positions: np.ndarray, weights: np.ndarray
    ) -> jax.Array:
        """Vectors of the texts of packed rows, float32 [rows, segments, embed]."""
        with jax.set_mesh(self._mesh):
            return _embed(
                self._model, self.params, tokens, segment_ids, positions, weights,
                settings=self.embedding, execution=self._execution,
            )  # fmt: skip

    def _limit(self, max_length: int | None) -> int:
        """Tokens that are kept of a text."""
        require_positive("max_length", max_length, "leave it out for the model's limit")
        return min(max_length or self.architecture.max_length, self.architecture.max_length)

    def _full_batch(self, row_length: int, batch_tokens: int | None) -> int:
        """Rows that go through the model at a time."""
        require_positive("batch_tokens", batch_tokens, "leave it out for what suits the device")
        shards = sharding.axis_size(self._mesh, "batch")
        return max(1, (batch_tokens or self.batch_tokens) // (row_length * shards)) * shards

    def _packed(self, texts: Sequence[np.ndarray], batch_tokens: int | None) -> Iterator[_PackedTexts]:
        """Batches of packed rows that hold the tokens of each text once."""
        if not len(texts):
            return
        lengths = np.array([len(tokens) for tokens in texts], np.int64)
        # Attention costs what its rows are long, so short texts get short rows: twice as long, to fill them well.
        longest = bucket(int(lengths.max()), at_least=self._shortest_row)
        row_lengths = np.array(
            [min(2 * bucket(int(length), at_least=self._shortest_row), longest) for length in lengths]
        )
        if lengths.sum() <= (batch_tokens or self.batch_tokens):
            row_lengths[:] = longest  # one batch: several would leave more of their rows empty
        shards = sharding.axis_size(self._mesh, "batch")
        for row_length in np.unique(row_lengths).tolist():
            of_length = np.flatnonzero(row_lengths == row_length)
            most = max_segments(row_length)
            packing = pack(lengths[of_length], row_length=row_length, max_segments=most)
            full = self._full_batch(row_length, batch_tokens)
            for first in range(0, packing.num_rows, full):
                num_rows = min(full, bucket(min(full, packing.num_rows - first), at_least=shards))
                here = np.flatnonzero((packing.row >= first) & (packing.row < first + num_rows))
                row, offset, segment = (each[here] for each in packing[1:])
                numbers, placed = of_length[here], Packing(num_rows, row - first, offset, segment)
                tokens = np.concatenate([texts[number] for number in numbers])
                yield _PackedTexts(
                    fill_rows(tokens, lengths[numbers], placed, row_length=row_length), numbers,
                    placed.row * row_length + offset, placed.row * most + segment - 1,
                )  # fmt: skip

    def log_likelihoods(
        self,
        contexts: Sequence[Messages],
        continuations: Sequence[str],
        *,
        prefix: str = "",
        raw: bool = False,
        batch_tokens: int | None = None,
        progress: Callable[[int], None] = lambda _: None,
    ) -> Likelihoods:
        """How likely each continuation is after its context. Contexts that are too long lose their first tokens.

        A context that several continuations of one token follow is read once.

        Args:
          contexts: Conversations, as `generate` takes them.
          continuations: What follows each; a token that starts in it is scored.
          prefix: What the answers begin with, before the continuation.
          raw: Whether a context that is a string is taken as it is, after BOS, and not for a user's message.
          batch_tokens: Tokens that go through the model at a time; None takes what suits the device.
          progress: Called with the number of pairs that each batch finished.

        Raises:
          InputError: No token starts in a continuation, or it is longer than the model's limit.
        """
        _refuse_one(contexts, "contexts")
        _refuse_others(continuations, "continuations")
        before = [self._prompt(context, prefix=prefix, raw=raw) for context in contexts]
        pairs = [
            prompts.Prompt(text + continuation, ((len(text), len(text) + len(continuation)),))
            for text, continuation in zip(before, continuations, strict=True)
        ]
        tokenized, limit, truncated = prompts.tokenize(pairs, self.tokenizer), self.architecture.max_length, 0
        num_bos = int(self.tokenizer.bos_id is not None)
        for place, (tokens, spans, _) in enumerate(tokenized):
            over = len(tokens) - limit
            if not len(spans):
                raise InputError(f"continuation {place}: no token starts in {continuations[place]!r}")
            if over > 0 and spans[0, 0] - num_bos > over:
                kept = np.concatenate([tokens[:num_bos], tokens[num_bos + over :]])
                tokenized[place] = prompts.TokenizedPrompt(kept, spans - over)
                truncated += 1
        scored = self.score(tokenized, batch_tokens=batch_tokens, progress=progress)
        return scored._replace(num_truncated=truncated)

    def score(
        self,
        texts: Sequence[prompts.TokenizedPrompt],
        *,
        batch_tokens: int | None = None,
        progress: Callable[[int], None] = lambda _: None,
    ) -> Likelihoods:
        """How likely the spans of texts are, given what is before them.

        Logits are made for the scored tokens only. Texts that differ in their last token alone are read once.

        Args:
          texts: What is read; the tokens of their spans are scored, the first token of all never.
          batch_tokens: Tokens that go through the model at a time; None takes what suits the device.
          progress: Called with the number of texts that each batch finished.

        Raises:
          InputError: A text has nothing before its scored tokens, or more tokens than the model's limit.
        """
        readings: dict[bytes, list[int]] = {}  # what is read of some texts: all but their last token
        for place, (tokens, spans, _) in enumerate(texts):
            if not 1 < len(tokens) <= self.architecture.max_length or not np.any(spans[:, 1] > 1):
                raise InputError(
                    f"text {place} has {len(tokens)} tokens; a text has 2 to {self.architecture.max_length}, of which "
                    "any but the first can be scored"
                )
            readings.setdefault(tokens[:-1].tobytes(), []).append(place)
        values, num_tokens = np.zeros(len(texts)), np.zeros(len(texts), np.int64)
        greedy = np.ones(len(texts), bool)
        for owners, scores, likeliest, num_texts in _one_behind(self._start_scoring(texts, readings, batch_tokens)):
            np.add.at(values, owners, np.asarray(scores, np.float64)[: len(owners)])
            np.add.at(num_tokens, owners, 1)
            np.logical_and.at(greedy, owners, np.asarray(likeliest)[: len(owners)])
            progress(num_texts)
        return Likelihoods(values, num_tokens, greedy, 0)

    def _start_scoring(
        self, texts: Sequence[prompts.TokenizedPrompt], readings: Mapping[bytes, list[int]], batch_tokens: int | None
    ) -> Iterator[tuple[list[int], jax.Array, jax.Array, int]]:
        """Gives the device a batch at a time: the text of each score, the scores, if they are likeliest, and texts."""
        members = list(readings.values())
        for packed in self._packed([np.frombuffer(key, np.int32) for key in readings], batch_tokens):
            owners, places, targets = [], [], []
            for reading, start in zip(packed.texts.tolist(), packed.starts.tolist(), strict=True):
                for text in members[reading]:
                    for first, last in np.maximum(texts[text].spans, 1).tolist():
                        owners += [text] * (last - first)
                        places += range(start + first - 1, start + last - 1)
                        targets += texts[text].tokens[first:last].tolist()
            size = bucket(len(places), at_least=max(64, sharding.axis_size(self._mesh, "batch")))
            padded = (np.pad(np.array(x, np.int32), (0, size - len(x))) for x in (places, targets))
            with jax.set_mesh(self._mesh):
                scores, likeliest = _score(
                    self._model, self.params, *packed.rows[:3], *padded, execution=self._execution
                )
            yield owners, scores, likeliest, sum(len(members[reading]) for reading in packed.texts)

    def log_likelihood_after(self, prefix: KVCache | None, prompt: prompts.TokenizedPrompt) -> tuple[float, int]:
        """How likely the spans of a text are that comes after keys and values.

        Args:
          prefix: Numpy [layers, tokens, kv_heads, head_dim], as `encode_with_caches` gives them; None for nothing.
          prompt: The text; its first token is never scored.

        Returns:
          Sum of log p of the scored tokens, in nats, and how many there are.

        Raises:
          InputError: Both together are over the model's limit.
        """
        num_cached, length = 0 if prefix is None else prefix.keys.shape[1], len(prompt.tokens)
        if num_cached + length > self.architecture.max_length:
            raise InputError(
                f"{num_cached} cached tokens and {length} more are over the model's {self.architecture.max_length}; "
                "shorten the text"
            )
        scored = np.zeros(length, bool)
        for first, last in np.maximum(prompt.spans, 1).tolist():
            scored[first - 1 : last - 1] = True
        size = bucket(length, at_least=self._shortest_row)
        slots = bucket(num_cached + size, at_least=self._shortest_row)
        shape = self.architecture.num_layers, slots, self.architecture.num_kv_heads, self.architecture.head_dim
        cache = KVCache(*(np.zeros(shape, self._execution.dtype) for _ in range(2)))
        for into, values in zip(cache, prefix or ()):
            into[:, :num_cached] = values
        tokens, targets = np.zeros(size, np.int32), np.zeros(size, np.int32)
        tokens[:length], targets[: length - 1] = prompt.tokens, prompt.tokens[1:]
        with jax.set_mesh(self._mesh):
            values = score_after(self._model, self.params, cache, np.int32(num_cached), tokens, targets)
        return float(np.sum(np.asarray(values, np.float64)[:length][scored])), int(scored.sum())

    def logits(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Scores of the next token after BOS and after each token of a text, float32 [tokens, vocab] for each text.

        Raises:
          InputError: A text has no token, or more than the model's limit.
        """
        _refuse_others(texts)
        scores = []
        rows = sharding.axis_size(self._mesh, "batch")
        for place, encoding in enumerate(
            self.tokenizer.encode_batch([prompts.begun(text, bos=self.tokenizer.bos) for text in texts])
        ):
            length = len(encoding.ids)
            if not 0 < length <= self.architecture.max_length:
                raise InputError(f"text {place} has {length} tokens, not 1 to {self.architecture.max_length}")
            row_length = bucket(length, at_least=self._shortest_row)
            filled = fill_single_rows([encoding.ids] * rows, num_rows=rows, row_length=row_length)
            with jax.set_mesh(self._mesh):
                row = _logits(self._model, self.params, filled.tokens, filled.segment_ids, execution=self._execution)
            scores.append(np.asarray(row[0, :length], np.float32))
        return scores

    def generate(
        self,
        messages: Messages | Sequence[Messages],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        raw: bool = False,
        prefix: str | Sequence[str] = "",
    ) -> str | list[str]:
        """Answers one conversation, or each of a list of them in one batch.

        Args:
          messages: A user's message, a list of `{"role", "content"}`, or a list of either.
          max_new_tokens: Most tokens of an answer.
          temperature: 0 takes the likeliest token each time.
          top_p: Probability of the nucleus that is drawn from; of 0, and of little, the likeliest token is left.
          seed: Seed of the draws; an answer does not depend on the others of its batch.
          stop: The answer ends before this string, or the first of several.
          raw: Whether a string is continued as it is, after one BOS, and not taken for a user's message.
          prefix: What the answer begins with, or each of a list; it is not returned.

        Returns:
          The answer without its end-of-sequence token, or a list of answers.

        Raises:
          InputError: Prompt and answer do not fit the model, or a number is out of its range.
        """
        many = not isinstance(messages, str) and (not messages or not isinstance(messages[0], Mapping))
        batch: Any = list(messages) if many else [messages]
        answers = [""] * len(batch)
        prompt_tokens = self.prompt_tokens(batch, prefix=prefix, raw=raw)
        texts = [Continuation(tokens, max_new_tokens, temperature, top_p, seed) for tokens in prompt_tokens]
        for pieces in self.write(texts, stop=stop) if batch else ():
            answers = [answer + piece for answer, piece in zip(answers, pieces, strict=True)]
        return answers if many else answers[0]

    def stream(
        self,
        messages: Messages,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        raw: bool = False,
        prefix: str = "",
    ) -> Iterator[str]:
        """The pieces of `generate`'s answer as they come; arguments as there."""
        (tokens,) = self.prompt_tokens([messages], prefix=prefix, raw=raw)
        for (piece,) in self.write([Continuation(tokens, max_new_tokens, temperature, top_p, seed)], stop=stop):
            if piece:
                yield piece

    def fingerprint(self, *, rounded: bool = False) -> str:
        """Names weights, shape, settings and tokenizer: equal for the same on devices of the same kind.

        Args:
          rounded: Whether weights are compared as bfloat16 has them: equal on devices of every kind, then, and also for
            weights that differ by less.
        """
        with jax.set_mesh(self._mesh):
            sums = jax.device_get(_checksums(self.params, rounded=rounded))
        about = [
            repr(self.architecture),
            repr(self.embedding),
            self.tokenizer.fingerprint,
            *map(int, jax.tree.leaves(sums)),
        ]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]

    def prompt_tokens(
        self, messages: Sequence[Messages], *, prefix: str | Sequence[str] = "", raw: bool = False
    ) -> list[np.ndarray]:
        """What `generate` reads, int32 [tokens] of each message; arguments as there."""
        prefixes = [prefix] * len(messages) if isinstance(prefix, str) else prefix
        texts = [self._prompt(one, prefix=begin, raw=raw) for one, begin in zip(messages, prefixes, strict=True)]
        return [encoding.ids for encoding in self.tokenizer.encode_batch(texts)]

    def prompt_lengths(
        self, messages: Sequence[Messages], *, prefix: str | Sequence[str] = "", raw: bool = False
    ) -> np.ndarray:
        """Tokens of what `generate` reads, int64 [messages]; arguments as there."""
        return np.array([len(tokens) for tokens in self.prompt_tokens(messages, prefix=prefix, raw=raw)], np.int64)

    def _prompt(self, messages: Messages, *, prefix: str, raw: bool) -> str:
        """The text that an answer continues."""
        if raw and isinstance(messages, str):
            return prompts.begun(messages, bos=self.tokenizer.bos) + prefix
        return prompts.generation(messages, bos=self.tokenizer.bos, eos=self.tokenizer.eos, prefix=prefix)

    def write(self, texts: Sequence[Continuation], *, stop: str | Sequence[str] = ()) -> Iterator[list[str]]:
        """New text of every answer, after each block of tokens.

        Args:
          texts: At least one; what the answers continue.
          stop: An answer ends before this string, or the first of several.

        Raises:
          InputError: A text and its answer do not fit the model, or its logits are not finite.
        """
        longest = max(text.num_slots for text in texts)
        slots = min(bucket(longest, at_least=64), self.architecture.max_length)
        engine = self.engine([LaneSize(bucket(len(texts), at_least=1), slots)])
        answers = {text: Answer(self.tokenizer, text.tokens, stop) for text in texts}
        for continuation in answers:
            engine.submit(continuation)
        while engine.is_busy:
            pieces = dict.fromkeys(answers, "")
            for block in engine.step():
                if block.finish == "failed":
                    raise InputError("the model's logits are not finite; its weights are damaged, or too large for it")
                answer = answers[block.continuation]
                pieces[block.continuation] = answer.extend(block.tokens, last=block.finish is not None)
                if answer.done:
                    engine.cancel(block.continuation)
            yield list(pieces.values())

    def engine(self, lanes: Sequence[LaneSize], *, fewer_rows: bool = False) -> Engine:
        """What writes texts of this model that come and go; see `Engine`.

        Args:
          lanes: Its batches, those of the fewest slots first.
          fewer_rows: Whether a lane of which few rows are in use computes only some of them.
        """
        return Engine(
            self._model, self.params, mesh=self._mesh, dtype=self._execution.dtype, eos_id=self.tokenizer.eos_id,
            lanes=lanes, read_tokens=self.batch_tokens, fewer_rows=fewer_rows,
        )  # fmt: skip


def _pool_weights(texts: Sequence[prompts.TokenizedPrompt], pooling: Pooling) -> np.ndarray:
    """Weights of all tokens of some texts, one text after the other; a text is pooled over its first span."""
    spans, lengths = np.array([text.spans[0] for text in texts]), np.array([len(text.tokens) for text in texts])
    return pool_weights(spans, lengths, pooling)


def _refuse_one(texts: Any, what: str) -> None:
    """Returns where there is a list: the characters of a string are no texts."""
    if isinstance(texts, str):
        raise InputError(f"{what} is one string, {texts!r:.60}; give a list of them")


def _refuse_others(texts: Any, what: str = "texts") -> None:
    """Returns where there is a list of strings."""
    _refuse_one(texts, what)
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"{what.removesuffix('s')} {place} is {text!r:.60}; it must be a string")


def _one_behind(batches: Iterator[T]) -> Iterator[T]:
    """Each batch when the device has the next, so that it works while the host takes this one's results."""
    earlier: list[T] = []
    for batch in batches:
        yield from earlier
        earlier = [batch]
    yield from earlier


@functools.partial(jax.jit, static_argnames="rounded")
def _checksums(params: Params, *, rounded: bool) -> Params:
    """A number for each array that changes when one of its bits does, or when values change places."""

    def checksum(x):
        x = x.astype(jnp.bfloat16) if rounded else x
        bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
        place = sum(
            jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim) * np.uint32(factor)
            for dim, factor in enumerate((0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F)[: x.ndim])
        )
        mixed = (bits ^ (place + np.uint32(1))) * np.uint32(0x2545F491)
        return jnp.sum(mixed ^ (mixed >> 15), dtype=jnp.uint32)

    return jax.tree.map(checksum, stack_layers(params))


@functools.partial(jax.jit, static_argnums=0, static_argnames=("settings", "execution"))
def _embed(model, params, tokens, *rows, settings: EmbeddingConfig, execution: Execution):
    model = bind(model, params)
    slots, _ = embed_rows(model, model.embed(tokens, execution.dtype), *rows, settings=settings, execution=execution)
    return sharding.constrain(slots, "whole", "whole", "whole")


@functools.partial(jax.jit, static_argnums=0, static_argnames="execution")
def _score(model, params, tokens, segment_ids, positions, places, targets, *, execution: Execution):
    """Log p of `targets` after the tokens at `places`, counted through the rows, and whether they are likeliest."""
    model = bind(model, params)
    hidden, _ = model(tokens, model.mask(segment_ids, positions, causal=True), execution)
    chosen = hidden.reshape(-1, hidden.shape[-1])[places]
    found = target_log_likelihoods(chosen, model.output_layer(execution.dtype), targets)
    return jax.tree.map(lambda x: sharding.constrain(x, "whole"), found)


@functools.partial(jax.jit, static_argnums=0, static_argnames="execution")
def _logits(model, params, tokens, segment_ids, *, execution: Execution):
    model = bind(model, params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = model(tokens, model.mask(segment_ids, positions, causal=True), execution)
    return sharding.constrain(model.output_layer(execution.dtype)(hidden), "whole", "whole", "whole")
