"""One model for both skills: embeds and generates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import jax
import numpy as np
from jax.sharding import Mesh

from grit_jax.checkpoints.opening import load_params, open_model
from grit_jax.config import (
    COPIES,
    Attention,
    EmbeddingConfig,
    LoRAConfig,
    MeshConfig,
    ModelConfig,
    TransformerConfig,
)
from grit_jax.config.ranges import require_positive
from grit_jax.errors import InputError
from grit_jax.inference import writing
from grit_jax.inference.embedder import Cached, Embedder, Encoded, StartedEmbedding, refuse_not_finite
from grit_jax.inference.engine import Continuation, Engine, LaneSize
from grit_jax.inference.runner import ModelRunner, bucket
from grit_jax.inference.scorer import Likelihoods, Scorer
from grit_jax.model.fingerprint import fingerprint
from grit_jax.model.lora import NO_ADAPTERS
from grit_jax.model.transformer import Params, abstract_model
from grit_jax.parallel import sharding
from grit_jax.parallel.execution import Execution, execution
from grit_jax.text import prompts
from grit_jax.text.tokenizer import Tokenizer

Messages = str | Sequence[Mapping[str, str]]


def _ignore(_: int) -> None:
    """The default progress."""


class GritModel:
    """A model with its tokenizer on a mesh.

    Where the mesh spans several processes, all of them make the same calls and get the same results.

    Args:
      params: Parameters, placed on `mesh`.
      architecture: Resolved shape.
      embedding: How it makes vectors.
      tokenizer: The model's tokenizer.
      mesh: Where it runs.
      execution: How it computes.
      lora: Its adapters.

    Attributes:
      architecture: Resolved shape.
      embedding: How it makes vectors.
      tokenizer: The model's tokenizer.
      runner: The parameters on the mesh.
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
        lora: LoRAConfig = NO_ADAPTERS,
    ):
        self.architecture, self.embedding, self.tokenizer, self._lora = architecture, embedding, tokenizer, lora
        self.runner = ModelRunner(params, abstract_model(architecture, embedding.projection_dim, lora), mesh, execution)
        self._embedder, self._scorer = Embedder(self.runner, embedding), Scorer(self.runner)

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
        """Loads a run folder, a checkpoint or a Hugging Face folder; with adapters also the base that they belong to.

        Args:
          path: Where the model is.
          step: Checkpoint to take; None takes the newest.
          mesh: How to spread it over the devices; None puts a copy on each.
          devices: Where to run it; None takes all.
          dtype: Dtype of weights and activations; `auto` is float32 on CPU and bfloat16 elsewhere.

        Raises:
          InputError: There is no model, it does not fit the mesh, or the base of its adapters has changed.
        """
        pretrained = open_model(path, step)
        placed_on = sharding.make_mesh(mesh or COPIES, devices)
        settings = execution(ModelConfig(compute_dtype=dtype, remat="none"), sharding.platform(placed_on))
        params = load_params(pretrained, placed_on, settings.dtype)
        about = pretrained.architecture, pretrained.embedding, pretrained.tokenizer
        return cls(params, *about, mesh=placed_on, execution=settings, lora=pretrained.lora)

    @property
    def params(self) -> Params:
        """The parameters, in the form that the device computes with."""
        return self.runner.params

    @property
    def batch_tokens(self) -> int:
        """Default number of tokens that go through the model at a time."""
        return self.runner.batch_tokens

    @property
    def embed_dim(self) -> int:
        """Width of a vector."""
        return self._embedder.embed_dim

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
        progress: Callable[[int], None] = _ignore,
    ) -> Encoded:
        """Embeds texts, and counts tokens and truncated texts.

        Args:
          texts: The texts to embed.
          instruction: The instruction of all texts, read but not pooled.
          max_length: Most tokens to keep of a formatted text; None for the model's limit.
          batch_tokens: Tokens that go through the model at a time, padding included; None chooses for the device.
          progress: Called with the number of texts in each finished batch.

        Raises:
          InputError: A text, whose index the message gives, is empty, has no room after the instruction, holds a token
            that the model has no embedding for, or gets a vector that is not finite. Or a number is not positive.
        """
        limit = self._limit(max_length)
        tokenized = self.embedding_prompts(texts, instruction=instruction, max_length=limit)
        kept = [prompt.cut(limit) for prompt in tokenized]
        vectors = self.embed(kept, batch_tokens=batch_tokens, progress=progress)
        refuse_not_finite(vectors)
        truncated = sum(len(prompt.tokens) > limit for prompt in tokenized)
        return Encoded(vectors, sum(len(prompt.tokens) for prompt in kept), truncated)

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
        """Embeds texts and keeps the keys and values of the pass, from which generation can continue.

        Args:
          texts: The texts to embed; errors as in `encode_with_counts`.
          instruction: Its keys and values are kept too.
          max_length: Most tokens to keep of a formatted text.
          form: Whether a text begins with BOS, or comes `second`, after the keys and values of another.
          attention: Attention of the pass; None for the model's own, which its vectors were trained with.
          batch_tokens: As in `encode_with_counts`.
        """
        read = self.embedding_prompts(texts, instruction=instruction, max_length=max_length, form=form)
        kept = [prompt.cut(self._limit(max_length)) for prompt in read]
        found = dict(self.embed_with_caches(kept, attention=attention, batch_tokens=batch_tokens))
        return [found[index] for index in range(len(texts))]

    def embedding_prompts(
        self,
        texts: Sequence[str],
        *,
        instruction: str = "",
        max_length: int | None = None,
        form: prompts.CacheForm = "first",
        first: int = 0,
    ) -> list[prompts.TokenizedPrompt]:
        """Formats and tokenizes texts for embedding without cutting them.

        Arguments and errors as in `encode_with_caches`; messages count texts from `first` on.
        """
        _require_strings(texts)
        opening = prompts.opening(form, bos=self.tokenizer.bos)
        limit = self._limit(max_length)
        ending = self.tokenizer.ending
        formatted = [prompts.embedding(text, instruction, bos=opening, ending=ending) for text in texts]
        tokenized = prompts.tokenize(formatted, self.tokenizer)
        for index, prompt in enumerate(tokenized, start=first):
            if not len(prompt.spans):
                raise InputError(f"text {index} is empty; leave it out")
            if prompt.spans[0, 0] >= limit - prompt.ending:
                raise InputError(
                    f"text {index}: its instruction takes {prompt.spans[0, 0]} of {limit} tokens and leaves no room "
                    "for the text; shorten it or raise the maximum length"
                )
        return tokenized

    def embed(
        self,
        texts: Sequence[prompts.TokenizedPrompt],
        *,
        batch_tokens: int | None = None,
        progress: Callable[[int], None] = _ignore,
    ) -> np.ndarray:
        """Vectors of `embedding_prompts` of at most the model's limit, float32 [texts, embed]."""
        return self._embedder.embed(texts, batch_tokens, progress)

    def start_embedding(self, texts: Sequence[prompts.TokenizedPrompt]) -> Iterator[StartedEmbedding]:
        """`embed` for a caller with other work: gives the device one batch after another without waiting for it."""
        return self._embedder.start(texts, None)

    def embed_with_caches(
        self,
        texts: Sequence[prompts.TokenizedPrompt],
        *,
        attention: Attention | None = None,
        batch_tokens: int | None = None,
    ) -> Iterator[tuple[int, Cached]]:
        """`encode_with_caches` for `embedding_prompts`: yields each text's index and result, batch by batch."""
        return self._embedder.with_caches(texts, attention, batch_tokens)

    def warm_up_embedding(self, max_length: int, progress: Callable[[int], None] = _ignore) -> int:
        """Compiles all programs that `embed` needs for texts of up to `max_length` tokens, and returns how many.

        `progress` is called after each.
        """
        return self._embedder.warm_up(max_length, progress)

    def _limit(self, max_length: int | None) -> int:
        """Most tokens of a text."""
        require_positive("max_length", max_length, "leave it out for the model's limit")
        return min(max_length or self.architecture.max_length, self.architecture.max_length)

    def log_likelihoods(
        self,
        contexts: Sequence[Messages],
        continuations: Sequence[str],
        *,
        prefix: str = "",
        raw: bool = False,
        batch_tokens: int | None = None,
        progress: Callable[[int], None] = _ignore,
    ) -> Likelihoods:
        """How likely each continuation is after its context; a context that is too long loses its first tokens.

        A context with several continuations of one token is read once.

        Args:
          contexts: Conversations, as `generate` takes them.
          continuations: The text after each context; tokens that start in it are scored.
          prefix: The beginning of the completion, before the continuation.
          raw: Whether to read a string context as it is, after BOS, rather than as a user's message.
          batch_tokens: As in `encode_with_counts`.
          progress: Called with the number of pairs in each finished batch.

        Raises:
          InputError: No token starts in a continuation, or it is longer than the model's limit.
        """
        _require_list(contexts, "contexts")
        _require_strings(continuations, "continuations")
        before = [self._prompt(context, prefix=prefix, raw=raw) for context in contexts]
        pairs = [
            prompts.Prompt(text + continuation, ((len(text), len(text) + len(continuation)),))
            for text, continuation in zip(before, continuations, strict=True)
        ]
        tokenized, limit, truncated = prompts.tokenize(pairs, self.tokenizer), self.architecture.max_length, 0
        num_bos = int(self.tokenizer.bos_id is not None)
        for index, (tokens, spans, _) in enumerate(tokenized):
            over = len(tokens) - limit
            if not len(spans):
                raise InputError(f"continuation {index}: no token starts in {continuations[index]!r}")
            if over > 0 and spans[0, 0] - num_bos > over:
                kept = np.concatenate([tokens[:num_bos], tokens[num_bos + over :]])
                tokenized[index] = prompts.TokenizedPrompt(kept, spans - over)
                truncated += 1
        scored = self.score(tokenized, batch_tokens=batch_tokens, progress=progress)
        return scored._replace(num_truncated=truncated)

    def score(
        self,
        texts: Sequence[prompts.TokenizedPrompt],
        *,
        batch_tokens: int | None = None,
        progress: Callable[[int], None] = _ignore,
    ) -> Likelihoods:
        """How likely the spans of texts are, given the tokens before them.

        Only the logits of scored tokens are computed. Texts that differ only in their last token are read once.

        Args:
          texts: The texts; the tokens of their spans are scored, but never a text's first token.
          batch_tokens: As in `encode_with_counts`.
          progress: Called with the number of texts in each finished batch.

        Raises:
          InputError: A text has nothing before its scored tokens, or more tokens than the model's limit.
        """
        return self._scorer.score(texts, batch_tokens, progress)

    def logits(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Logits of the next token after BOS and after each token of a text, float32 [tokens, vocab] for each text.

        Raises:
          InputError: A text has no token, or more than the model's limit.
        """
        _require_strings(texts)
        encodings = self.tokenizer.encode_batch([prompts.begun(text, bos=self.tokenizer.bos) for text in texts])
        logits = []
        for index, encoding in enumerate(encodings):
            if not 0 < len(encoding.ids) <= self.architecture.max_length:
                raise InputError(
                    f"text {index} has {len(encoding.ids)} tokens, not 1 to {self.architecture.max_length}"
                )
            logits.append(self._scorer.logits(encoding.ids))
        return logits

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
        """Completes one conversation, or each of a list of them in one batch.

        Args:
          messages: A user's message, a list of `{"role", "content"}`, or a list of either.
          max_new_tokens: Most tokens of a completion.
          temperature: 0 takes the likeliest token each time.
          top_p: Probability of the nucleus to draw from; 0 leaves only the likeliest token.
          seed: Seed of the draws; a completion does not depend on the rest of its batch.
          stop: The completion ends before this string, or the first of several.
          raw: Whether to continue a string as it is, after one BOS, rather than take it for a user's message.
          prefix: The beginning of the completion, or of each of a list; it is not returned.

        Returns:
          The completion without its end-of-sequence token, or a list of completions.

        Raises:
          InputError: Prompt and completion do not fit the model, or a number is out of its range.
        """
        many = not isinstance(messages, str) and (not messages or not isinstance(messages[0], Mapping))
        batch: Any = list(messages) if many else [messages]
        completions = [""] * len(batch)
        prompt_tokens = self.prompt_tokens(batch, prefix=prefix, raw=raw)
        texts = [Continuation(tokens, max_new_tokens, temperature, top_p, seed) for tokens in prompt_tokens]
        for pieces in self.write(texts, stop=stop) if batch else ():
            completions = [completion + piece for completion, piece in zip(completions, pieces, strict=True)]
        return completions if many else completions[0]

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
        """Yields `generate`'s completion piece by piece; arguments as there."""
        (tokens,) = self.prompt_tokens([messages], prefix=prefix, raw=raw)
        for (piece,) in self.write([Continuation(tokens, max_new_tokens, temperature, top_p, seed)], stop=stop):
            if piece:
                yield piece

    def prompt_tokens(
        self, messages: Sequence[Messages], *, prefix: str | Sequence[str] = "", raw: bool = False
    ) -> list[np.ndarray]:
        """The prompts that `generate` reads, int32 [tokens] each; arguments as there."""
        prefixes = [prefix] * len(messages) if isinstance(prefix, str) else prefix
        texts = [self._prompt(one, prefix=begin, raw=raw) for one, begin in zip(messages, prefixes, strict=True)]
        return [encoding.ids for encoding in self.tokenizer.encode_batch(texts)]

    def prompt_lengths(
        self, messages: Sequence[Messages], *, prefix: str | Sequence[str] = "", raw: bool = False
    ) -> np.ndarray:
        """Number of tokens of each prompt that `generate` reads, int64 [messages]; arguments as there."""
        return np.array([len(tokens) for tokens in self.prompt_tokens(messages, prefix=prefix, raw=raw)], np.int64)

    def _prompt(self, messages: Messages, *, prefix: str, raw: bool) -> str:
        """The text that a completion continues."""
        if raw and isinstance(messages, str):
            return prompts.begun(messages, bos=self.tokenizer.bos) + prefix
        return prompts.generation(messages, bos=self.tokenizer.bos, eos=self.tokenizer.eos, prefix=prefix)

    def write(self, texts: Sequence[Continuation], *, stop: str | Sequence[str] = ()) -> Iterator[list[str]]:
        """Yields the new text of every completion, block by block; arguments and errors as in `generate`."""
        longest = max(text.num_slots for text in texts)
        slots = min(bucket(longest, at_least=64), self.architecture.max_length)
        engine = self.engine([LaneSize(bucket(len(texts), at_least=1), slots)])
        return writing.write(engine, self.tokenizer, texts, stop)

    def engine(self, lanes: Sequence[LaneSize], *, fewer_rows: bool = False) -> Engine:
        """An `Engine` with this model; arguments as there."""
        return Engine(self.runner, eos_id=self.tokenizer.eos_id, lanes=lanes, fewer_rows=fewer_rows)

    def fingerprint(self, *, rounded: bool = False) -> str:
        """Identifies weights, shape, settings and tokenizer: equal for equal ones on devices of one type.

        Args:
          rounded: Whether to compare weights in bfloat16. The fingerprint is then equal on devices of every type, and
            for weights that differ by less.
        """
        about = self.architecture, self.embedding, self.tokenizer, self._lora
        with jax.set_mesh(self.runner.mesh):
            return fingerprint(self.params, *about, rounded=rounded)


def _require_list(texts: Any, what: str) -> None:
    """Refuses a string, whose characters are not texts."""
    if isinstance(texts, str):
        raise InputError(f"{what} is one string, {texts!r:.60}; give a list of them")


def _require_strings(texts: Any, what: str = "texts") -> None:
    """Refuses anything but a list of strings."""
    _require_list(texts, what)
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"{what.removesuffix('s')} {index} is {text!r:.60}; it must be a string")
