"""What all endpoints work with: the model, its thread, its documents, and the limits of requests."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator, Sequence
from typing import TypeVar, cast

import numpy as np
from pydantic import BaseModel

from grit_jax.data.batch import sizes
from grit_jax.inference.engine import LaneSize
from grit_jax.inference.model import GritModel
from grit_jax.retrieval.rag import Rag
from grit_jax.serve import parsing
from grit_jax.serve.errors import RequestError, not_finite
from grit_jax.serve.fairness import Caller
from grit_jax.serve.metrics import Metrics
from grit_jax.serve.parsing import MOST_TOKENS
from grit_jax.serve.protocol import Inputs
from grit_jax.serve.scheduler import Scheduler
from grit_jax.text.prompts import TokenizedPrompt

T = TypeVar("T", bound=BaseModel)

_SHORTEST_LANE, _LANE_GROWTH = 512, 4
_CHARACTERS_AT_ONCE = 100_000  # that are tokenized before others have their turn


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a server takes on.

    Attributes:
      max_length: Tokens of a prompt and its answer, and of an embedded text.
      rows: Answers of up to 512 tokens that are written at a time; fewer of longer ones.
      queue: Requests of a kind that wait or are under way.
      body_bytes: Bytes of a request.
      all_bodies: Bytes of all requests under way, in units of `body_bytes`.
      seconds: Of a request.
    """

    max_length: int
    rows: int = 16
    queue: int = 256
    body_bytes: int = 8 << 20
    all_bodies: int = 16
    seconds: float = 300.0

    def lanes(self) -> list[LaneSize]:
        """Batches of the engine, of about as many tokens each."""
        slots = sizes(_SHORTEST_LANE, self.max_length, growth=_LANE_GROWTH)
        return [LaneSize(max(1, self.rows * slots[0] // size), size) for size in slots]


@dataclasses.dataclass(frozen=True)
class Service:
    """What endpoints work with.

    Attributes:
      model: The model.
      name: What clients call it.
      limits: What is taken on.
      rag: The store that is searched and answered from; None for none.
      scheduler: The model's thread.
      metrics: What is counted.
    """

    model: GritModel
    name: str
    limits: Limits
    rag: Rag | None
    scheduler: Scheduler
    metrics: Metrics

    async def parse(self, kind: type[T], body: bytes) -> T:
        """The request that a body holds, which is read beside other requests.

        Raises:
          RequestError: It is no such request.
        """
        return await asyncio.to_thread(lambda: parsing.parse(kind, body))

    def refuse_other_model(self, name: str) -> None:
        """Returns where a request names this model.

        Raises:
          RequestError: It names another.
        """
        if name != self.name:
            raise RequestError(
                404, f"there is no model {name[:100]!r} here; ask for {self.name!r}", "model_not_found", "model"
            )

    def needed_rag(self) -> Rag:
        """The documents.

        Raises:
          RequestError: There are none.
        """
        if self.rag is None:
            raise RequestError(400, "this server has no documents; start it with --index STORE", "no_index")
        return self.rag

    def texts(self, inputs: Inputs) -> list[str]:
        """Texts as a client has sent them: one or several, as such or as tokens of this model.

        Raises:
          RequestError: A token is not one of this model's.
        """
        if isinstance(inputs, str):
            return [inputs]
        return [one if isinstance(one, str) else self.model.tokenizer.decode(one) for one in self.separate(inputs)]

    def separate(self, inputs: Inputs) -> list[str | list[int]]:
        """Inputs one by one, texts or tokens.

        Raises:
          RequestError: A token is not one of this model's.
        """
        if isinstance(inputs, str):
            return [inputs]
        many = cast(list[str | list[int]], [inputs] if isinstance(inputs[0], int) else inputs)
        vocab_size = self.model.tokenizer.vocab_size
        for place, one in enumerate(many):
            if not isinstance(one, str) and max(one) >= vocab_size:
                raise RequestError(
                    400,
                    f"input {place} has the token {max(one)}; this model has {vocab_size}, and tokens must be those of "
                    "its own tokenizer: send text (with langchain: check_embedding_ctx_length=False)",
                )
        return many

    async def embedding_prompts(
        self, texts: Sequence[str], instruction: str, *, truncate: bool = False
    ) -> list[TokenizedPrompt]:
        """Tokens of texts that are embedded.

        Raises:
          RequestError: A text is too long and is not to be cut, or there are too many of them.
          InputError: A text is empty, or the instruction leaves no room for it.
        """
        limit, prompts, num_tokens = self.limits.max_length, [], 0
        self.refuse_huge(instruction, "the instruction")
        if truncate:
            texts = [text[: self._most_characters] for text in texts]
        for place, text in enumerate(texts):
            self.refuse_huge(text, f"text {place}")
        for some in _at_once(texts, len(instruction)):
            found = await asyncio.to_thread(
                self.model.embedding_prompts, texts[some], instruction=instruction, max_length=limit,
                first=some.start,
            )  # fmt: skip
            for place, prompt in enumerate(found, start=some.start):
                if len(prompt.tokens) > limit and not truncate:
                    raise self.too_long(f"text {place} has {len(prompt.tokens)} tokens")
            prompts += [prompt.cut(limit) for prompt in found]
            num_tokens += sum(len(prompt.tokens) for prompt in prompts[some])
            if num_tokens > MOST_TOKENS:
                raise RequestError(
                    400, f"the texts have over {MOST_TOKENS} tokens, which is the limit of a request: send fewer"
                )
        return prompts

    async def embed(self, prompts: Sequence[TokenizedPrompt], caller: Caller) -> np.ndarray:
        """Vectors of texts, float32 [texts, embed].

        Raises:
          RequestError: A number of them is not finite, or the model has failed.
        """
        vectors = await self.scheduler.embed(prompts, caller)
        if len(bad := np.flatnonzero(~np.isfinite(vectors).all(axis=1))):
            raise not_finite(f"a vector of text {bad[0]}")
        return vectors

    def refuse_huge(self, text: str, what: str) -> None:
        """Refuses what is too long whatever its tokens are, before it is tokenized.

        Raises:
          RequestError: It is.
        """
        if len(text) > self._most_characters:
            raise self.too_long(f"{what} has {len(text)} characters")

    def too_long(self, what: str) -> RequestError:
        """What a client is told of a text that is over the limit."""
        limit = self.limits.max_length
        return RequestError(400, f"{what}; the limit is {limit} tokens: shorten it", "context_length_exceeded")

    @property
    def _most_characters(self) -> int:
        return self.limits.max_length * self.model.tokenizer.longest_token


def count_tokens(prompts: Sequence[TokenizedPrompt]) -> int:
    """Tokens of all prompts."""
    return sum(len(prompt.tokens) for prompt in prompts)


def _at_once(texts: Sequence[str], num_more: int) -> Iterator[slice]:
    """Texts that are tokenized in one call, each with so many characters more."""
    start, num_characters = 0, 0
    for place, text in enumerate(texts):
        num_characters += len(text) + num_more
        if num_characters >= _CHARACTERS_AT_ONCE:
            yield slice(start, place + 1)
            start, num_characters = place + 1, 0
    if start < len(texts):
        yield slice(start, len(texts))
