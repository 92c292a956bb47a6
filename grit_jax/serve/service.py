"""What all endpoints share: the model, its thread, its documents, and the limits of requests."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

import numpy as np

from grit_jax.data.batch import sizes
from grit_jax.inference.engine import LaneSize
from grit_jax.inference.model import GritModel
from grit_jax.retrieval.rag import Rag
from grit_jax.serve.bodies import Bodies
from grit_jax.serve.counters import Counters
from grit_jax.serve.fairness import Caller, FairSemaphore
from grit_jax.serve.protocol import Inputs
from grit_jax.serve.request_errors import RequestError, not_finite
from grit_jax.serve.scheduler import Scheduler
from grit_jax.text.prompts import TokenizedPrompt

_SHORTEST_LANE, _LANE_GROWTH = 512, 4
_CHARACTERS_AT_ONCE = 100_000  # tokenized before other requests get a turn
_MOST_TOKENS = 300_000  # of the texts of an embedding request, as at OpenAI


@dataclasses.dataclass(frozen=True)
class Limits:
    """The limits of a server.

    Attributes:
      max_length: Tokens of a prompt and its completion, and of an embedded text.
      rows: Completions of up to 512 tokens written at a time; fewer if longer.
      queue: Requests to a skill, waiting or in progress.
      body_bytes: Bytes of a request.
      all_bodies: Bytes of all requests in progress, in units of `body_bytes`.
      seconds: Time of a request.
    """

    max_length: int
    rows: int = 16
    queue: int = 256
    body_bytes: int = 8 << 20
    all_bodies: int = 16
    seconds: float = 300.0

    def lanes(self) -> list[LaneSize]:
        """Lanes of the engine, all with about the same number of tokens."""
        slots = sizes(_SHORTEST_LANE, self.max_length, growth=_LANE_GROWTH)
        return [LaneSize(max(1, self.rows * slots[0] // size), size) for size in slots]


@dataclasses.dataclass(frozen=True)
class Service:
    """The state that endpoints share.

    Attributes:
      model: The model.
      name: Its name for clients.
      limits: The limits of requests.
      instructions: Named instructions of `/v1/embeddings`.
      rag: The store for search and answers; None for none.
      api_key: The key that clients must send; None for none.
      scheduler: The model's thread.
      counters: The server's counters.
      bodies: Memory for the bodies of requests.
      check_ready: Raises RequestError until the server is ready.
      rag_rows: Limits the documents' keys and values in memory to those of `limits.rows` requests.
    """

    model: GritModel
    name: str
    limits: Limits
    instructions: Mapping[str, str]
    rag: Rag | None
    api_key: str | None
    scheduler: Scheduler
    counters: Counters
    bodies: Bodies
    check_ready: Callable[[], None]
    rag_rows: FairSemaphore

    def refuse_other_model(self, name: str | None) -> None:
        """Checks that a request names this model or none.

        Raises:
          RequestError: It names another model.
        """
        if name not in (None, self.name):
            message = f"there is no model {name[:100]!r} here; ask for {self.name!r}"
            raise RequestError(404, message, "model_not_found", "model")

    def require_rag(self) -> Rag:
        """The store.

        Raises:
          RequestError: There is none.
        """
        if self.rag is None:
            raise RequestError(400, "this server has no documents; start it with --index STORE", "no_index")
        return self.rag

    def as_list(self, inputs: Inputs) -> list[str | list[int]]:
        """The inputs as a list of texts or tokens.

        Raises:
          RequestError: A token is not one of this model's.
        """
        if isinstance(inputs, str):
            return [inputs]
        found = cast(list[str | list[int]], [inputs] if isinstance(inputs[0], int) else inputs)
        vocab_size = self.model.tokenizer.vocab_size
        for index, one in enumerate(found):
            if not isinstance(one, str) and max(one) >= vocab_size:
                raise RequestError(
                    400,
                    f"input {index} has the token {max(one)}; this model has {vocab_size}, and tokens must be those of "
                    "its own tokenizer: send text (with langchain: check_embedding_ctx_length=False)",
                )
        return found

    async def embedding_prompts(
        self, texts: Sequence[str], instruction: str, *, truncate: bool = False
    ) -> list[TokenizedPrompt]:
        """Tokens of texts to embed.

        Raises:
          RequestError: A text is too long and `truncate` is false, or there are too many tokens.
          InputError: A text is empty, or the instruction leaves no room for it.
        """
        limit, prompts, num_tokens = self.limits.max_length, [], 0
        self.refuse_huge(instruction, "the instruction")
        if truncate:
            texts = [text[: self._most_characters] for text in texts]
        for index, text in enumerate(texts):
            self.refuse_huge(text, f"text {index}")
        for some in _slices(texts, len(instruction)):
            found = await asyncio.to_thread(
                self.model.embedding_prompts, texts[some], instruction=instruction, max_length=limit,
                first=some.start,
            )  # fmt: skip
            for index, prompt in enumerate(found, start=some.start):
                if len(prompt.tokens) > limit and not truncate:
                    raise self.too_long(f"text {index} has {len(prompt.tokens)} tokens")
            prompts += [prompt.cut(limit) for prompt in found]
            num_tokens += count_tokens(prompts[some])
            if num_tokens > _MOST_TOKENS:
                message = f"the texts have over {_MOST_TOKENS} tokens, which is the limit of a request: send fewer"
                raise RequestError(400, message)
        return prompts

    async def embed(self, prompts: Sequence[TokenizedPrompt], caller: Caller) -> np.ndarray:
        """Vectors of texts, float32 [texts, embed].

        Raises:
          RequestError: A vector is not finite, or the model has failed.
        """
        vectors = await self.scheduler.embed(prompts, caller)
        if len(bad := np.flatnonzero(~np.isfinite(vectors).all(axis=1))):
            raise not_finite(f"a vector of text {bad[0]}")
        return vectors

    def refuse_huge(self, text: str, what: str) -> None:
        """Refuses, before tokenizing it, a text that is too long whatever its tokens.

        Raises:
          RequestError: It is too long.
        """
        if len(text) > self._most_characters:
            raise self.too_long(f"{what} has {len(text)} characters")

    def too_long(self, what: str) -> RequestError:
        """The error for a text over the limit."""
        limit = self.limits.max_length
        return RequestError(400, f"{what}; the limit is {limit} tokens: shorten it", "context_length_exceeded")

    @property
    def _most_characters(self) -> int:
        return self.limits.max_length * self.model.tokenizer.longest_token


def count_tokens(prompts: Sequence[TokenizedPrompt]) -> int:
    """Tokens of all prompts."""
    return sum(len(prompt.tokens) for prompt in prompts)


def _slices(texts: Sequence[str], num_more: int) -> Iterator[slice]:
    """Slices of texts to tokenize in one call, with `num_more` characters added to each text."""
    start, num_characters = 0, 0
    for index, text in enumerate(texts):
        num_characters += len(text) + num_more
        if num_characters >= _CHARACTERS_AT_ONCE:
            yield slice(start, index + 1)
            start, num_characters = index + 1, 0
    if start < len(texts):
        yield slice(start, len(texts))
