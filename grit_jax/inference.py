"""One model for both skills: embeds and generates."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from grit_jax import prompts, sharding
from grit_jax.batch import max_segments
from grit_jax.caching import embed_with_cache, score_after
from grit_jax.config import Attention, EmbeddingConfig, InputError, MeshConfig, ModelConfig, TransformerConfig
from grit_jax.data.packing import pack
from grit_jax.data.pipeline import pool_weights
from grit_jax.execution import Execution, execution
from grit_jax.loading import load_params, open_model
from grit_jax.losses import target_log_likelihoods
from grit_jax.model.decode import decode, prefill
from grit_jax.model.pooling import embed_rows
from grit_jax.model.transformer import KVCache, Params, abstract_model, bind, split_layers, stack_layers
from grit_jax.tokenizer import Tokenizer

Messages = str | Sequence[Mapping[str, str]]

_DECODE_STEPS = 8  # tokens sampled in one call of the device


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


class EmbeddingTokens(NamedTuple):
    """Texts as the embedding pass reads them.

    Attributes:
      tokens: int32 [tokens] of each text, cut to the maximum length.
      spans: int32 [1, 2] of each text; token range of what is pooled, before it was cut.
      num_truncated: Texts that were cut.
    """

    tokens: list[np.ndarray]
    spans: list[np.ndarray]
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


class _Rows(NamedTuple):
    """Packed rows, int32 [rows, length] each, and which text lies where."""

    tokens: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    texts: list[tuple[int, int, int, int]]  # number of the text, row, first column, slot


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
        self._batch_tokens = 2048 if on_cpu else 16384  # a CPU is as fast as long as its caches hold the activations
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
        placed_on = sharding.make_mesh(mesh or MeshConfig(data=-1, fsdp=1, tensor=1), devices)
        settings = execution(ModelConfig(compute_dtype=dtype, remat="none"), sharding.platform(placed_on))
        params = load_params(pretrained, placed_on, settings.dtype)
        about = pretrained.architecture, pretrained.embedding, pretrained.tokenizer
        return cls(params, *about, mesh=placed_on, execution=settings)

    def encode(
        self,
        texts: Sequence[str],
        *,
        instruction: str = "",
        max_length: int | None = None,
        batch_tokens: int | None = None,
    ) -> np.ndarray:
        """Embeds texts; see `encode_with_counts`.

        Returns:
          float32 [texts, embed], of unit length if the model is normalised.
        """
        return self.encode_with_counts(
            texts, instruction=instruction, max_length=max_length, batch_tokens=batch_tokens
        ).vectors

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
          InputError: A text is empty, or the instruction leaves no room for it; the message names its place.
        """
        read = self.embedding_tokens(texts, instruction=instruction, max_length=max_length)
        vectors = np.zeros((len(texts), self._embed_dim), np.float32)
        for rows in self._packed(read.tokens, batch_tokens or self._batch_tokens):
            weights = np.zeros(rows.tokens.shape, np.float32)
            for text, row, start, _ in rows.texts:
                length = len(read.tokens[text])
                pooled = pool_weights(read.spans[text], length, self.embedding.pooling)
                weights[row, start : start + length] = pooled
            with jax.set_mesh(self._mesh):
                slots = _embed(
                    self._model, self.params, *rows[:3], weights, settings=self.embedding, execution=self._execution
                )
            members, slot_numbers = ([place[field] for place in rows.texts] for field in (0, 3))
            vectors[members] = np.asarray(slots).reshape(-1, vectors.shape[1])[slot_numbers]
            progress(len(members))
        return Encoded(vectors, sum(map(len, read.tokens)), read.num_truncated)

    def embedding_tokens(
        self,
        texts: Sequence[str],
        *,
        instruction: str = "",
        max_length: int | None = None,
        form: prompts.CacheForm = "first",
    ) -> EmbeddingTokens:
        """What the embedding pass reads of texts.

        Args:
          texts: What is embedded.
          instruction: What the model is told about all of them.
          max_length: Tokens kept of each formatted text; None is the model's limit.
          form: Whether a text begins with BOS, or comes `second`, after the keys and values of another.

        Raises:
          InputError: A text is empty, or the instruction leaves no room for it; the message names its place.
        """
        limit = min(max_length or self.architecture.max_length, self.architecture.max_length)
        opening = prompts.opening(form, bos=self.tokenizer.bos)
        tokenized = prompts.tokenize(
            [prompts.embedding(text, instruction, bos=opening) for text in texts], self.tokenizer
        )
        for place, prompt in enumerate(tokenized):
            if not len(prompt.spans):
                raise InputError(f"text {place} is empty; leave it out")
            if prompt.spans[0, 0] >= limit:
                raise InputError(
                    f"text {place}: its instruction takes {prompt.spans[0, 0]} of {limit} tokens and leaves no room "
                    "for the text; shorten it or raise the maximum length"
                )
        return EmbeddingTokens(
            [prompt.tokens[:limit] for prompt in tokenized],
            [prompt.spans for prompt in tokenized],
            sum(len(prompt.tokens) > limit for prompt in tokenized),
        )

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
        read = self.embedding_tokens(texts, instruction=instruction, max_length=max_length, form=form)
        found = dict(self.iter_with_caches(read, attention=attention, batch_tokens=batch_tokens))
        return [found[place] for place in range(len(texts))]

    def iter_with_caches(
        self, read: EmbeddingTokens, *, attention: Attention | None = None, batch_tokens: int | None = None
    ) -> Iterator[tuple[int, Cached]]:
        """`encode_with_caches` of texts as they are read, a batch at a time: each text's place, and what is made of it.

        Each text has a row of its own; texts of like length come together.
        """
        settings = dataclasses.replace(self.embedding, attention=attention or self.embedding.attention)
        shards = sharding.axis_size(self._mesh, "batch")
        lengths = np.array([_bucket(len(tokens), at_least=self._shortest_row) for tokens in read.tokens], np.int64)
        for length in np.unique(lengths).tolist():
            of_length = np.flatnonzero(lengths == length).tolist()
            full = max(1, (batch_tokens or self._batch_tokens) // (length * shards)) * shards
            for first in range(0, len(of_length), full):
                members = of_length[first : first + full]
                num_rows = min(full, _bucket(len(members), at_least=shards))
                tokens, segment_ids = (np.zeros((num_rows, length), np.int32) for _ in range(2))
                weights = np.zeros((num_rows, length), np.float32)
                for row, text in enumerate(members):
                    columns = slice(len(read.tokens[text]))
                    tokens[row, columns], segment_ids[row, columns] = read.tokens[text], 1
                    weights[row, columns] = pool_weights(read.spans[text], columns.stop, settings.pooling)
                with jax.set_mesh(self._mesh):
                    vectors, cache = embed_with_cache(
                        self._model, self.params, tokens, segment_ids, weights,
                        settings=settings, dtype=self._execution.dtype,
                    )  # fmt: skip
                vectors, keys, values = map(np.asarray, (vectors, *cache))
                for row, text in enumerate(members):
                    own = row, slice(len(read.tokens[text]))
                    yield text, Cached(vectors[row], KVCache(keys[:, *own], values[:, *own]))

    @property
    def _embed_dim(self) -> int:
        return self.embedding.projection_dim or self.architecture.embed_dim

    def _packed(self, texts: Sequence[np.ndarray], batch_tokens: int) -> Iterator[_Rows]:
        """Batches of packed rows that hold the tokens of each text once."""
        if not len(texts):
            return
        lengths = np.array([len(tokens) for tokens in texts], np.int64)
        # Attention costs what its rows are long, so short texts get short rows: twice as long, to fill them well.
        longest = _bucket(int(lengths.max()), at_least=self._shortest_row)
        row_lengths = np.array(
            [min(2 * _bucket(int(length), at_least=self._shortest_row), longest) for length in lengths]
        )
        shards = sharding.axis_size(self._mesh, "batch")
        for row_length in np.unique(row_lengths).tolist():
            of_length = np.flatnonzero(row_lengths == row_length)
            most = max_segments(row_length)
            packing = pack(lengths[of_length], row_length=row_length, max_segments=most)
            full = max(1, batch_tokens // (row_length * shards)) * shards
            for first in range(0, packing.num_rows, full):
                num_rows = min(full, _bucket(min(full, packing.num_rows - first), at_least=shards))
                tokens, segment_ids, positions = (np.zeros((num_rows, row_length), np.int32) for _ in range(3))
                placed = []
                for place in np.flatnonzero((packing.row >= first) & (packing.row < first + num_rows)).tolist():
                    text, row = int(of_length[place]), int(packing.row[place]) - first
                    segment, start = int(packing.segment[place]), int(packing.offset[place])
                    columns = slice(start, start + len(texts[text]))
                    tokens[row, columns] = texts[text]
                    segment_ids[row, columns] = segment
                    positions[row, columns] = np.arange(len(texts[text]))
                    placed.append((text, row, start, row * most + segment - 1))
                yield _Rows(tokens, segment_ids, positions, placed)

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
        before = [self._prompt(context, prefix=prefix, raw=raw) for context in contexts]
        pairs = [
            prompts.Prompt(text + continuation, ((len(text), len(text) + len(continuation)),))
            for text, continuation in zip(before, continuations, strict=True)
        ]
        tokenized, limit, truncated = prompts.tokenize(pairs, self.tokenizer), self.architecture.max_length, 0
        num_bos = int(self.tokenizer.bos_id is not None)
        for place, (tokens, spans) in enumerate(tokenized):
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
        for place, (tokens, spans) in enumerate(texts):
            if not 1 < len(tokens) <= self.architecture.max_length or not np.any(spans[:, 1] > 1):
                raise InputError(
                    f"text {place} has {len(tokens)} tokens; a text has 2 to {self.architecture.max_length}, of which "
                    "any but the first can be scored"
                )
            readings.setdefault(tokens[:-1].tobytes(), []).append(place)
        values, num_tokens = np.zeros(len(texts)), np.zeros(len(texts), np.int64)
        greedy = np.ones(len(texts), bool)
        read, members = [np.frombuffer(key, np.int32) for key in readings], list(readings.values())
        for rows in self._packed(read, batch_tokens or self._batch_tokens):
            owners, places, targets = [], [], []
            for reading, row, start, _ in rows.texts:
                for text in members[reading]:
                    for first, last in np.maximum(texts[text].spans, 1).tolist():
                        owners += [text] * (last - first)
                        places += range(row * rows.tokens.shape[1] + start + first - 1,
                                        row * rows.tokens.shape[1] + start + last - 1)  # fmt: skip
                        targets += texts[text].tokens[first:last].tolist()
            size = _bucket(len(places), at_least=max(64, sharding.axis_size(self._mesh, "batch")))
            padded = (np.pad(np.array(x, np.int32), (0, size - len(x))) for x in (places, targets))
            with jax.set_mesh(self._mesh):
                scores, likeliest = _score(self._model, self.params, *rows[:3], *padded, execution=self._execution)
            np.add.at(values, owners, np.asarray(scores, np.float64)[: len(owners)])
            np.add.at(num_tokens, owners, 1)
            np.logical_and.at(greedy, owners, np.asarray(likeliest)[: len(owners)])
            progress(sum(len(members[reading]) for reading, *_ in rows.texts))
        return Likelihoods(values, num_tokens, greedy, 0)

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
        size = _bucket(length, at_least=self._shortest_row)
        slots = _bucket(num_cached + size, at_least=self._shortest_row)
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
        scores = []
        rows = sharding.axis_size(self._mesh, "batch")
        for place, encoding in enumerate(self.tokenizer.encode_batch([self.tokenizer.bos + text for text in texts])):
            length = len(encoding.ids)
            if not 0 < length <= self.architecture.max_length:
                raise InputError(f"text {place} has {length} tokens, not 1 to {self.architecture.max_length}")
            shape = rows, _bucket(length, at_least=self._shortest_row)
            tokens, segment_ids = (np.zeros(shape, np.int32) for _ in range(2))
            tokens[:, :length], segment_ids[:, :length] = encoding.ids, 1
            with jax.set_mesh(self._mesh):
                row = _logits(self._model, self.params, tokens, segment_ids, execution=self._execution)
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
        stop: Sequence[str] = (),
        raw: bool = False,
        prefix: str | Sequence[str] = "",
    ) -> str | list[str]:
        """Answers one conversation, or each of a list of them in one batch.

        Args:
          messages: A user's message, a list of `{"role", "content"}`, or a list of either.
          max_new_tokens: Most tokens of an answer.
          temperature: 0 takes the likeliest token each time.
          top_p: Probability of the nucleus that is drawn from.
          seed: Seed of the draws; an answer does not depend on the others of its batch.
          stop: The answer ends before the first of these strings.
          raw: Whether a string is continued as it is, after BOS, and not taken for a user's message.
          prefix: What the answer begins with, or each of a list; it is not returned.

        Returns:
          The answer without its end-of-sequence token, or a list of answers.

        Raises:
          InputError: Prompt and answer do not fit the model.
        """
        many = not isinstance(messages, str) and (not messages or not isinstance(messages[0], Mapping))
        batch: Any = list(messages) if many else [messages]
        options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
        answers = [""] * len(batch)
        prefixes = [prefix] * len(batch) if isinstance(prefix, str) else prefix
        texts = [self._prompt(one, prefix=begin, raw=raw) for one, begin in zip(batch, prefixes, strict=True)]
        for pieces in self._answers(texts, stop=stop, **options) if batch else ():
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
        stop: Sequence[str] = (),
        raw: bool = False,
        prefix: str = "",
    ) -> Iterator[str]:
        """The pieces of `generate`'s answer as they come; arguments as there."""
        options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
        for (piece,) in self._answers([self._prompt(messages, prefix=prefix, raw=raw)], stop=stop, **options):
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

    def prompt_lengths(
        self, messages: Sequence[Messages], *, prefix: str | Sequence[str] = "", raw: bool = False
    ) -> np.ndarray:
        """Tokens of what `generate` reads, int64 [messages]; arguments as there."""
        prefixes = [prefix] * len(messages) if isinstance(prefix, str) else prefix
        texts = [self._prompt(one, prefix=begin, raw=raw) for one, begin in zip(messages, prefixes, strict=True)]
        return np.array([len(encoding.ids) for encoding in self.tokenizer.encode_batch(texts)], np.int64)

    def _prompt(self, messages: Messages, *, prefix: str, raw: bool) -> str:
        """The text that an answer continues."""
        if raw and isinstance(messages, str):
            return self.tokenizer.bos + messages + prefix
        return prompts.generation(messages, bos=self.tokenizer.bos, eos=self.tokenizer.eos, prefix=prefix)

    def _answers(self, texts: list[str], *, stop: Sequence[str], **options) -> Iterator[list[str]]:
        """New text of every answer, after each block of tokens."""
        prompt_ids = [encoding.ids for encoding in self.tokenizer.encode_batch(texts)]
        answers = [_Answer(self.tokenizer, ids, stop) for ids in prompt_ids]
        for block in self._tokens(prompt_ids, **options):
            yield [answer.extend(tokens) for answer, tokens in zip(answers, block, strict=True)]
            if all(answer.done for answer in answers):
                break
        yield [answer.finish() for answer in answers]

    def _tokens(
        self, prompt_ids: list[np.ndarray], *, max_new_tokens: int, temperature: float, top_p: float, seed: int
    ) -> Iterator[np.ndarray]:
        """Blocks of sampled tokens, int32 [batch, up to 8]."""
        lengths = np.array([len(ids) for ids in prompt_ids], np.int32)
        longest = int(lengths.max()) + max_new_tokens
        if longest > self.architecture.max_length:
            raise InputError(
                f"a prompt of {lengths.max()} tokens and {max_new_tokens} new ones are over the model's "
                f"{self.architecture.max_length}; shorten the prompt or ask for fewer"
            )
        # Rows are filled up with one-token prompts to a size that the mesh divides and that is compiled for.
        num_rows = _bucket(len(prompt_ids), at_least=sharding.axis_size(self._mesh, "batch"))
        lengths = np.concatenate([lengths, np.ones(num_rows - len(lengths), np.int32)])
        tokens = np.zeros((num_rows, _bucket(int(lengths.max()), at_least=32)), np.int32)
        for row, ids in enumerate(prompt_ids):
            tokens[row, : len(ids)] = ids
        with jax.set_mesh(self._mesh):
            logits, cache = prefill(
                self._model, self.params, tokens, lengths,
                slots=_bucket(max(longest + _DECODE_STEPS, tokens.shape[1]), at_least=64), dtype=self._execution.dtype,
            )  # fmt: skip
            seeds = np.full(num_rows, seed & 0xFFFFFFFF, np.uint32)
            for done in range(0, max_new_tokens, _DECODE_STEPS):
                block, logits, cache = decode(
                    self._model, self.params, logits, cache, lengths + done, seeds,
                    temperature=np.float32(temperature), top_p=np.float32(top_p), steps=_DECODE_STEPS,
                )  # fmt: skip
                yield np.asarray(block)[: len(prompt_ids), : max_new_tokens - done]


class _Answer:
    """Text of one answer, released piece by piece once later tokens cannot change it."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: np.ndarray, stop: Sequence[str]):
        self._tokenizer, self._stop = tokenizer, [text for text in stop if text]
        # A few tokens of the prompt give the decoder what it needs to place spaces.
        self._ids = prompt_ids[-8:].tolist()
        self._skip = len(tokenizer.decode(self._ids))
        self._text, self._released, self.done = "", 0, False

    def extend(self, tokens: np.ndarray) -> str:
        """Adds tokens and returns the text that is certain by now."""
        if self.done:
            return ""
        ids = tokens.tolist()
        if self._tokenizer.eos_id in ids:
            ids, self.done = ids[: ids.index(self._tokenizer.eos_id)], True
        self._ids += ids
        self._text = self._tokenizer.decode(self._ids)[self._skip :]
        ends = [place for place in map(self._text.find, self._stop) if place >= 0]
        if ends:
            self._text, self.done = self._text[: min(ends)], True
        return self._release(len(self._text) if self.done else self._certain())

    def finish(self) -> str:
        """What was held back."""
        return self._release(len(self._text))

    def _certain(self) -> int:
        """Length of the text before an unfinished character or what may become a stop string."""
        end = len(self._text.rstrip("\N{REPLACEMENT CHARACTER}"))
        for stop in self._stop:
            for length in range(min(len(stop) - 1, end), 0, -1):
                if self._text.endswith(stop[:length], 0, end):
                    end -= length
                    break
        return end

    def _release(self, end: int) -> str:
        piece = self._text[self._released : end]
        self._released = max(self._released, end)
        return piece


def _bucket(size: int, *, at_least: int) -> int:
    """The next power of two times `at_least`, so that few shapes are compiled."""
    while at_least < size:
        at_least *= 2
    return at_least


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
