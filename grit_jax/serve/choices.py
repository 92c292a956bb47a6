"""The choices (OpenAI's word for completions) of a response: how they are requested, generated and sent."""

from __future__ import annotations

import abc
import asyncio
import dataclasses
import secrets
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import Field

from grit_jax.inference.decode import Logprobs
from grit_jax.inference.engine import Continuation
from grit_jax.model.transformer import KVCache
from grit_jax.serve.endpoint import Result
from grit_jax.serve.fairness import Caller
from grit_jax.serve.protocol import ModelRequest, StrictModel, only, response_head, usage
from grit_jax.serve.request_errors import RequestError, not_finite
from grit_jax.serve.service import Service
from grit_jax.text.detokenizer import Detokenizer
from grit_jax.text.tokenizer import Tokenizer

_DEFAULT_NEW_TOKENS = 256
_MOST_CHOICES = 16

_no_penalty = only(0, 0.0, because="tokens are drawn without penalties")


class StreamOptions(StrictModel):
    """How to stream a response.

    Attributes:
      include_usage: Whether the last event has the numbers of tokens.
      include_obfuscation: Not used; OpenAI pads events with it.
    """

    include_usage: bool = False
    include_obfuscation: bool = False


class GenerationRequest(ModelRequest):
    """The fields that requests for generated text share.

    Attributes:
      max_tokens: Most new tokens of a choice.
      temperature: 0 takes the likeliest token each time.
      top_p: Probability of the nucleus to draw tokens from.
      n: Choices of each prompt.
      stop: A choice ends before the first of these.
      seed: Seed of the draws; choice i of a prompt has seed + i. Without it, choices differ from request to request.
      stream: Whether to send the response while it is generated.
      stream_options: How to stream; not used without `stream`.
      user: Not used. Later fields may only ask for the server's behaviour.
    """

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 1.0
    n: Annotated[int, Field(ge=1, le=_MOST_CHOICES)] = 1
    stop: str | Annotated[list[str], Field(max_length=4, fail_fast=True)] | None = None
    seed: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    frequency_penalty: Annotated[Any, _no_penalty] = None
    presence_penalty: Annotated[Any, _no_penalty] = None
    logit_bias: Annotated[Any, only({}, because="tokens are drawn without a bias")] = None


class Piece(NamedTuple):
    """A part of a choice, or all of it.

    Attributes:
      index: Index of the choice in the response.
      text: The new text.
      finish: Why the choice ends; None if it continues.
      tokens: int32 [tokens]; the new tokens.
      logprobs: Their log p, if requested.
    """

    index: int
    text: str
    finish: Literal["stop", "length"] | None
    tokens: np.ndarray
    logprobs: Logprobs | None


@dataclasses.dataclass(frozen=True)
class Form(abc.ABC):
    """How an endpoint writes choices.

    Attributes:
      tokenizer: The model's tokenizer.
      top: Number of likeliest tokens to return with each token.
      id_prefix: Prefix of a response's id.
      object: Names in the `object` field of a response and of an event.
    """

    tokenizer: Tokenizer
    top: int
    id_prefix: ClassVar[Literal["chatcmpl", "cmpl"]]
    object: ClassVar[tuple[str, str]]

    @abc.abstractmethod
    def choice(self, piece: Piece) -> dict[str, Any]:
        """A choice of a response."""

    @abc.abstractmethod
    def delta(self, piece: Piece, *, first: bool) -> dict[str, Any]:
        """A choice of an event, which may be the first of this choice."""

    def token_logprobs(self, piece: Piece) -> list[tuple[int, float, list[tuple[int, float]]]]:
        """Each token, its log p, and the likeliest tokens with their log p."""
        if piece.logprobs is None:
            return []
        chosen, likeliest, values = (x.tolist() for x in piece.logprobs)
        pairs = [list(zip(*both, strict=True))[: self.top] for both in zip(likeliest, values, strict=True)]
        return list(zip(piece.tokens.tolist(), chosen, pairs, strict=True))

    def token_text(self, token: int) -> str:
        r"""The text of a token; bytes of a partial character become `bytes:\xf0\x9f`, as at OpenAI."""
        content = self.tokenizer.token_bytes(token)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


class Planned(NamedTuple):
    """The work of the engine for a request.

    Attributes:
      continuations: Every choice of the first prompt, then of the next.
      num_tokens: Tokens of the prompts, each counted once.
      num_cached: Those with cached keys and values.
      fields: Further fields of the response.
    """

    continuations: list[Continuation]
    num_tokens: int
    num_cached: int
    fields: Mapping[str, Any]

    def usage(self, num_written: int) -> Mapping[str, Any]:
        """Numbers of tokens, for the response."""
        return usage(self.num_tokens, num_written, self.num_cached)


def plan(
    service: Service,
    request: GenerationRequest,
    prompts: Sequence[np.ndarray],
    *,
    max_tokens: int | None,
    logprobs: bool,
    prefix: KVCache | None = None,
    fields: Mapping[str, Any] = MappingProxyType({}),
) -> Planned:
    """Plans the work of the engine for a request.

    Args:
      service: The model.
      request: How to generate text.
      prompts: int32 [tokens] each.
      max_tokens: Most new tokens of a choice; None if not given.
      logprobs: Whether log p is requested.
      prefix: Keys and values before the prompts.
      fields: Further fields of the response.

    Raises:
      RequestError: Prompts and choices are too long, or too many.
    """
    num_cached = 0 if prefix is None else prefix.keys.shape[1]
    longest = num_cached + max(map(len, prompts))
    room = service.limits.max_length - longest
    if room < (max_tokens or 1):
        raise service.too_long(f"a prompt of {longest} tokens and {max_tokens or 1} new ones")
    if (count := len(prompts) * request.n) > service.limits.queue:
        message = f"n: the request is for {count} choices; the limit is {service.limits.queue}"
        raise RequestError(400, message, param="n")
    seed = secrets.randbits(32) if request.seed is None else request.seed
    most = max_tokens or min(room, _DEFAULT_NEW_TOKENS)
    continuations = [
        Continuation(tokens, most, request.temperature, request.top_p, seed + index, logprobs, prefix)
        for tokens in prompts
        for index in range(request.n)
    ]
    num_read = sum(map(len, prompts))
    service.counters.tokens.labels("read").inc(num_read)
    service.counters.tokens.labels("cached").inc(num_cached)
    return Planned(continuations, num_cached + num_read, num_cached, fields)


@dataclasses.dataclass(frozen=True)
class Choices:
    """The choices of one request.

    Attributes:
      service: The model.
      request: How to generate them.
      planning: Gives the work to do, and holds the memory that it needs.
      form: How to write them.
      caller: Who sent the request.
    """

    service: Service
    request: GenerationRequest
    planning: AbstractAsyncContextManager[Planned]
    form: Form
    caller: Caller

    async def result(self) -> Result:
        """A response, or the events of one."""
        form, streams = self.form, self.request.stream
        head = {**response_head(form.id_prefix, self.service.name), "object": form.object[streams]}
        if streams:
            return self._events(head)
        async with self.planning as planned:
            by_index: list[list[Piece]] = [[] for _ in planned.continuations]
            async with aclosing(self._pieces(planned.continuations)) as pieces:
                async for piece in pieces:
                    by_index[piece.index].append(piece)
        wholes = [_joined(some) for some in by_index]
        written = sum(len(piece.tokens) for piece in wholes)
        return {**head, **planned.fields, "choices": map(form.choice, wholes), "usage": planned.usage(written)}

    async def _events(self, head: Mapping[str, Any]) -> AsyncGenerator[Mapping[str, Any]]:
        started, written, options = time.perf_counter(), 0, self.request.stream_options
        begun: set[int] = set()
        async with self.planning as planned, aclosing(self._pieces(planned.continuations)) as pieces:
            if planned.fields:
                yield {**head, **planned.fields, "choices": []}
            async for piece in pieces:
                if not written and len(piece.tokens):
                    self.service.counters.first_token_seconds.observe(time.perf_counter() - started)
                written += len(piece.tokens)
                if piece.text or piece.finish or piece.logprobs:
                    yield {**head, "choices": [self.form.delta(piece, first=piece.index not in begun)]}
                    begun.add(piece.index)
        if options and options.include_usage:
            yield {**head, "choices": [], "usage": planned.usage(written)}

    async def _pieces(self, continuations: Sequence[Continuation]) -> AsyncGenerator[Piece]:
        """The pieces of all choices, in the order in which they are generated."""
        found = asyncio.Queue[Piece | Exception]()
        stop = self.request.stop or ()

        async def generate(index: int, continuation: Continuation) -> None:
            detokenizer = Detokenizer(self.service.model.tokenizer, continuation.tokens, stop)
            try:
                async with aclosing(self.service.scheduler.write(continuation, self.caller)) as blocks:
                    async for block in blocks:
                        if block.finish == "failed":
                            raise not_finite("logits")
                        before = detokenizer.num_tokens
                        text = detokenizer.extend(block.tokens, last=block.finish is not None)
                        new = slice(detokenizer.num_tokens - before)
                        logprobs = block.logprobs and Logprobs(*(x[new] for x in block.logprobs))
                        finish = "stop" if detokenizer.done else block.finish
                        found.put_nowait(Piece(index, text, finish, block.tokens[new], logprobs))
                        if detokenizer.done:
                            break
            except Exception as error:  # raised below, to the request
                found.put_nowait(error)

        tasks = [asyncio.create_task(generate(*pair)) for pair in enumerate(continuations)]
        try:
            num_left = len(tasks)
            while num_left:
                piece = await found.get()
                if isinstance(piece, Exception):
                    raise piece
                num_left -= piece.finish is not None
                yield piece
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _joined(pieces: Sequence[Piece]) -> Piece:
    """A whole choice."""
    logprobs = None
    if pieces[0].logprobs is not None:
        logprobs = Logprobs(*(np.concatenate(x) for x in zip(*(piece.logprobs or () for piece in pieces), strict=True)))
    text, tokens = "".join(piece.text for piece in pieces), np.concatenate([piece.tokens for piece in pieces])
    return Piece(pieces[0].index, text, pieces[-1].finish, tokens, logprobs)
