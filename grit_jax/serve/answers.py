"""What the two endpoints that write have in common: how an answer is asked for, written and told."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import numpy as np
from pydantic import Field

from grit_jax.inference.decode import Logprobs
from grit_jax.inference.engine import Continuation
from grit_jax.model.transformer import KVCache
from grit_jax.serve.endpoint import Response
from grit_jax.serve.errors import RequestError, not_finite
from grit_jax.serve.fairness import Caller
from grit_jax.serve.protocol import Exact, Strict, only, usage
from grit_jax.serve.service import Service
from grit_jax.text.detokenizer import Detokenizer
from grit_jax.text.tokenizer import Tokenizer

_NEW_TOKENS = 256  # of an answer whose request does not say
_MOST_CHOICES = 16

_no_penalty = only(0, 0.0, because="tokens are drawn without penalties")


class StreamOptions(Exact):
    """How an answer is streamed.

    Attributes:
      include_usage: Whether the last event tells the numbers of tokens.
      include_obfuscation: Not used; OpenAI pads events with it.
    """

    include_usage: bool = False
    include_obfuscation: bool = False


class WrittenRequest(Strict):
    """What requests for written text share.

    Attributes:
      max_tokens: Most tokens that are written.
      temperature: 0 takes the likeliest token each time.
      top_p: Probability of the nucleus that is drawn from.
      n: Answers of each prompt.
      stop: An answer ends before the first of these.
      seed: Of the draws; answer i of a prompt has seed + i. Without it, answers differ from call to call.
      stream: Whether the answer is sent as it is written.
      stream_options: How; not used where it is not.
      user: Not used.
      frequency_penalty: 0.
      presence_penalty: 0.
      logit_bias: Nothing.
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

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class Piece(NamedTuple):
    """Some of an answer, or all of it.

    Attributes:
      index: Number of the answer among those of its request.
      text: What is new.
      finish: Why there will be no more; None where there will.
      tokens: int32 [tokens]; the tokens that are new.
      logprobs: Log p of these, where they are wanted.
    """

    index: int
    text: str
    finish: Literal["stop", "length"] | None
    tokens: np.ndarray
    logprobs: Logprobs | None


class Form(Protocol):
    """How answers look."""

    def whole(self, piece: Piece) -> dict[str, Any]:
        """A choice of a response."""
        ...

    def part(self, piece: Piece) -> dict[str, Any]:
        """A choice of an event."""
        ...

    def about(self, model: str, *, streams: bool) -> dict[str, Any]:
        """What a response begins with, and every event of it."""
        ...


class Begun(NamedTuple):
    """What is written for a request.

    Attributes:
      continuations: Every answer of the first prompt, then of the next.
      num_tokens: Of the prompts, once each.
      num_cached: Of these, tokens whose keys and values were there.
      more: What is told beside the answers.
    """

    continuations: list[Continuation]
    num_tokens: int
    num_cached: int
    more: Mapping[str, Any]

    def usage(self, num_written: int) -> Mapping[str, Any]:
        """Numbers of tokens, as a response tells them."""
        return usage(self.num_tokens, num_written, self.num_cached)


def begin(
    service: Service,
    request: WrittenRequest,
    prompts: Sequence[np.ndarray],
    *,
    max_tokens: int | None,
    logprobs: bool,
    prefix: KVCache | None = None,
    more: Mapping[str, Any] = MappingProxyType({}),
) -> Begun:
    """What the engine does for a request.

    Args:
      service: The model.
      request: How answers are written.
      prompts: int32 [tokens] each; what is read.
      max_tokens: Most tokens of an answer; None where the request does not say.
      logprobs: Whether log p is told.
      prefix: Keys and values before the prompts.
      more: What is told beside the answers.

    Raises:
      RequestError: Prompts and answers are too long, or too many.
    """
    num_cached = 0 if prefix is None else prefix.keys.shape[1]
    longest = num_cached + max(map(len, prompts))
    room = service.limits.max_length - longest
    if room < (max_tokens or 1):
        raise service.too_long(f"a prompt of {longest} tokens and {max_tokens or 1} new ones")
    if (count := len(prompts) * request.n) > service.limits.queue:
        raise RequestError(
            400, f"n: the request is for {count} answers; the limit is {service.limits.queue}", param="n"
        )
    seed = secrets.randbits(32) if request.seed is None else request.seed
    continuations = [
        Continuation(
            tokens, max_tokens or min(room, _NEW_TOKENS), request.temperature, request.top_p, seed + number, logprobs,
            prefix,
        )
        for tokens in prompts
        for number in range(request.n)
    ]  # fmt: skip
    num_read = sum(map(len, prompts))
    service.metrics.tokens.labels("read").inc(num_read)
    service.metrics.tokens.labels("cached").inc(num_cached)
    return Begun(continuations, num_cached + num_read, num_cached, more)


class Answers:
    """The answers of one request.

    Args:
      service: The model.
      request: How they are written.
      beginning: What is written, for as long as it takes.
      form: How they look.
      caller: Who asks.
    """

    def __init__(
        self,
        service: Service,
        request: WrittenRequest,
        beginning: AbstractAsyncContextManager[Begun],
        form: Form,
        caller: Caller,
    ):
        self._service, self._request, self._form = service, request, form
        self._beginning, self._caller = beginning, caller
        self._about = form.about(service.name, streams=request.stream)

    async def response(self) -> Response:
        """A response, or the events of one."""
        if self._request.stream:
            return self._events()
        async with self._beginning as begun:
            by_index: list[list[Piece]] = [[] for _ in begun.continuations]
            async with aclosing(self._pieces(begun.continuations)) as pieces:
                async for piece in pieces:
                    by_index[piece.index].append(piece)
        wholes = [_joined(some) for some in by_index]
        written = sum(len(piece.tokens) for piece in wholes)
        return {
            **self._about, **begun.more, "choices": map(self._form.whole, wholes), "usage": begun.usage(written),
        }  # fmt: skip

    async def _events(self) -> AsyncGenerator[Mapping[str, Any]]:
        started, written = time.perf_counter(), 0
        async with self._beginning as begun, aclosing(self._pieces(begun.continuations)) as pieces:
            if begun.more:
                yield {**self._about, **begun.more, "choices": []}
            async for piece in pieces:
                if not written and len(piece.tokens):
                    self._service.metrics.first_token_seconds.observe(time.perf_counter() - started)
                written += len(piece.tokens)
                if piece.text or piece.finish or piece.logprobs:
                    yield {**self._about, "choices": [self._form.part(piece)]}
        if self._request.includes_usage:
            yield {**self._about, "choices": [], "usage": begun.usage(written)}

    async def _pieces(self, continuations: Sequence[Continuation]) -> AsyncGenerator[Piece]:
        """What is new of all answers, in the order in which it is written."""
        found = asyncio.Queue[Piece | Exception]()

        async def write(index: int, continuation: Continuation) -> None:
            detokenizer = Detokenizer(self._service.model.tokenizer, continuation.tokens, self._request.stops)
            try:
                async with aclosing(self._service.scheduler.write(continuation, self._caller)) as blocks:
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
            except Exception as error:  # told to the one who asked
                found.put_nowait(error)

        tasks = [asyncio.create_task(write(*pair)) for pair in enumerate(continuations)]
        try:
            left = len(tasks)
            while left:
                piece = await found.get()
                if isinstance(piece, Exception):
                    raise piece
                left -= piece.finish is not None
                yield piece
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _joined(pieces: Sequence[Piece]) -> Piece:
    """A whole answer."""
    logprobs = None
    if pieces[0].logprobs is not None:
        logprobs = Logprobs(*(np.concatenate(x) for x in zip(*(piece.logprobs or () for piece in pieces), strict=True)))
    text, tokens = "".join(piece.text for piece in pieces), np.concatenate([piece.tokens for piece in pieces])
    return Piece(pieces[0].index, text, pieces[-1].finish, tokens, logprobs)


def told_tokens(piece: Piece, top: int) -> list[tuple[int, float, list[tuple[int, float]]]]:
    """Each token, its log p, and the likeliest tokens with theirs."""
    if piece.logprobs is None:
        return []
    chosen, likeliest, values = (x.tolist() for x in piece.logprobs)
    pairs = [list(zip(*both, strict=True))[:top] for both in zip(likeliest, values, strict=True)]
    return list(zip(piece.tokens.tolist(), chosen, pairs, strict=True))


def token_text(tokenizer: Tokenizer, token: int) -> str:
    r"""The text of a token; bytes that are a part of a character only are told as `bytes:\xf0\x9f`, as at OpenAI."""
    content = tokenizer.token_bytes(token)
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)
