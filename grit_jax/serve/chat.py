"""`POST /v1/chat/completions`: a conversation is continued, or a question answered from documents."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from grit_jax.inference.decode import TOP_LOGPROBS
from grit_jax.retrieval.rag import Prepared
from grit_jax.serve import protocol
from grit_jax.serve.answers import Answers, Begun, Piece, WrittenRequest, begin, token_text, told_tokens
from grit_jax.serve.endpoint import Response
from grit_jax.serve.errors import RequestError
from grit_jax.serve.fairness import Caller, FairSemaphore
from grit_jax.serve.protocol import Exact, only
from grit_jax.serve.search import as_documents
from grit_jax.serve.service import Service, count_tokens
from grit_jax.text.prompts import SYSTEM_ROLES, Positions, RagMethod
from grit_jax.text.tokenizer import Tokenizer

_MOST_PARTS = 2048  # messages of a conversation, and parts of a message
_ROLES = (*SYSTEM_ROLES, "user", "assistant")
_NO_TOOLS = "the model calls no tools"


def _role(value: Any) -> Any:
    if value not in _ROLES:
        raise ValueError(f"must be one of {', '.join(_ROLES)}; {_NO_TOOLS}")
    return value


def _text(content: Any) -> Any:
    """The text of a message's content, which may be in parts."""
    if not isinstance(content, list):
        return content
    if not 0 < len(content) <= _MOST_PARTS:
        raise ValueError(f"has {len(content)} parts; send 1 to {_MOST_PARTS}")
    texts = []
    for place, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise ValueError(f"part {place} is of type {str(kind)[:50]!r}; the model reads text only")
        if not isinstance(part.get("text"), str) or part.keys() - {"type", "text"}:
            raise ValueError(f'part {place} must be {{"type": "text", "text": ...}}')
        texts.append(part["text"])
    return "".join(texts)


class Message(Exact):
    """A turn of a conversation.

    Attributes:
      role: Who speaks.
      content: What is said; an assistant may say nothing.
      name: Not used.
      tool_calls: None.
      function_call: None.
      refusal: None.
      annotations: None.
      audio: None.
    """

    role: Annotated[str, BeforeValidator(_role)]
    content: Annotated[str | None, BeforeValidator(_text), Field(validate_default=True)] = None
    name: str | None = None
    tool_calls: Annotated[Any, only([], because=_NO_TOOLS)] = None
    function_call: Annotated[Any, only(because=_NO_TOOLS)] = None
    refusal: Annotated[Any, only("", because="the model reads no refusals")] = None
    annotations: Annotated[Any, only([], because="the model reads no annotations")] = None
    audio: Annotated[Any, only(because="the model reads text only")] = None

    @field_validator("content")
    @classmethod
    def _says_something(cls, content: str | None, found: ValidationInfo) -> str | None:
        if content is None and found.data.get("role", "assistant") != "assistant":
            raise ValueError("is missing; only an assistant's may be null")
        return content

    def turn(self) -> dict[str, str]:
        """The turn as the model's format takes it."""
        return {"role": self.role, "content": self.content or ""}


class Retrieval(Exact):
    """How an answer uses the documents of the server's store; see `Rag.prepare`.

    Attributes:
      method: How query and documents come to the model.
      k: How many documents are used.
      instruction: What the model is told about the query when it is embedded.
      positions: Of a cached text that comes after another.
    """

    method: RagMethod = "document_cache"
    k: Annotated[int, Field(ge=1, le=20)] = 1
    instruction: str = ""
    positions: Positions = "own"


class ChatRequest(WrittenRequest):
    """The request.

    Attributes:
      messages: The conversation: system or developer first, then user and assistant in turn. Where the last is the
        assistant's, the answer goes on from it.
      max_completion_tokens: The new name of `max_tokens`.
      logprobs: Whether log p of the tokens is told.
      top_logprobs: Likeliest tokens that are told with it.
      retrieval: How the last message is answered from documents; null answers the conversation by itself.
      metadata: Not used.
      safety_identifier: Not used.
      prompt_cache_key: Not used.
      parallel_tool_calls: Not used.
      response_format: Text.
      modalities: Text.
      audio: None.
      tools: None.
      tool_choice: None.
      functions: None.
      function_call: None.
      store: Nothing is stored.
      service_tier: The one there is.
      reasoning_effort: None.
      verbosity: The model's own.
    """

    messages: Annotated[list[Message], Field(min_length=1, max_length=_MOST_PARTS, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS)] | None = None
    retrieval: Retrieval | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    parallel_tool_calls: bool | None = None
    response_format: Annotated[Any, only({"type": "text"}, because="the model writes text of no set form")] = None
    modalities: Annotated[Any, only(["text"], because="the model writes text only")] = None
    audio: Annotated[Any, only(because="the model writes text only")] = None
    tools: Annotated[Any, only([], because=_NO_TOOLS)] = None
    tool_choice: Annotated[Any, only("none", "auto", because=_NO_TOOLS)] = None
    functions: Annotated[Any, only([], because=_NO_TOOLS)] = None
    function_call: Annotated[Any, only("none", "auto", because=_NO_TOOLS)] = None
    store: Annotated[Any, only(False, because="nothing is stored")] = None
    service_tier: Annotated[Any, only("auto", "default", because="there is one tier")] = None
    reasoning_effort: Annotated[Any, only("none", because="the model does not reason before it answers")] = None
    verbosity: Annotated[Any, only("medium", because="the model writes as much as it does")] = None

    @model_validator(mode="after")
    def _has_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is told with logprobs alone; send logprobs: true too")
        return self

    @property
    def turns(self) -> list[dict[str, str]]:
        """The conversation as the model's format takes it, without what the answer begins with."""
        turns = [message.turn() for message in self.messages]
        return turns[:-1] if self.messages[-1].role == "assistant" else turns

    @property
    def prefix(self) -> str:
        """What the answer begins with."""
        last = self.messages[-1].turn()
        return last["content"] if last["role"] == "assistant" else ""


class Chat:
    """The endpoint.

    Args:
      service: The model and its documents.
    """

    def __init__(self, service: Service):
        self._service = service
        # No more keys and values of documents are in memory than there are rows for.
        self._with_documents = FairSemaphore(service.limits.rows)

    async def __call__(self, body: bytes, caller: Caller) -> Response:
        """What the assistant says."""
        service = self._service
        request = await service.parse(ChatRequest, body)
        service.refuse_other_model(request.model)
        service.refuse_huge("".join(message.content or "" for message in request.messages), "the conversation")
        form = ChatForm(service.model.tokenizer, request.top_logprobs or 0)
        return await Answers(service, request, self._begun(request, caller), form, caller).response()

    @asynccontextmanager
    async def _begun(self, request: ChatRequest, caller: Caller) -> AsyncGenerator[Begun]:
        service = self._service
        most, wants = request.max_completion_tokens or request.max_tokens, bool(request.logprobs)
        if request.retrieval is None:
            (tokens,) = await asyncio.to_thread(service.model.prompt_tokens, [request.turns], prefix=request.prefix)
            yield begin(service, request, [tokens], max_tokens=most, logprobs=wants)
            return
        async with self._with_documents.room(caller):
            prefix, _, tokens, hits = await self._prepared(request.messages, request.retrieval, caller)
            more = {"documents": as_documents(hits)}
            yield begin(service, request, [tokens], max_tokens=most, logprobs=wants, prefix=prefix, more=more)

    async def _prepared(self, messages: Sequence[Message], retrieval: Retrieval, caller: Caller) -> Prepared:
        """What an answer from documents goes on from."""
        service = self._service
        rag = service.needed_rag()
        if len(messages) != 1 or messages[0].role != "user":
            raise RequestError(400, "messages: with retrieval a question is answered by itself; send one user message")
        query, how = messages[0].turn()["content"], retrieval.model_dump()
        prompts = await service.embedding_prompts([query], retrieval.instruction)  # refuses what is too long
        max_length = service.limits.max_length
        found = await service.scheduler.call(lambda: rag.prepare(query, **how, max_length=max_length), caller)
        if retrieval.method != "none":
            service.metrics.tokens.labels("embedded").inc(count_tokens(prompts))
        return found


class ChatForm:
    """Answers of a request.

    Args:
      tokenizer: The model's.
      top: Likeliest tokens that are told with each.
    """

    def __init__(self, tokenizer: Tokenizer, top: int):
        self._tokenizer, self._top = tokenizer, top
        self._begun: set[int] = set()

    def whole(self, piece: Piece) -> dict[str, Any]:
        """A choice of a response."""
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return {"message": message, **self._ending(piece)}

    def part(self, piece: Piece) -> dict[str, Any]:
        """A choice of an event; the first of each answer says who speaks, as clients join what all of them say."""
        role = {} if piece.index in self._begun else {"role": "assistant"}
        self._begun.add(piece.index)
        return {"delta": {**role, "content": piece.text}, **self._ending(piece)}

    def about(self, model: str, *, streams: bool) -> dict[str, Any]:
        """What a response begins with, and every event of it."""
        return protocol.about("chatcmpl", model, object=f"chat.completion{'.chunk' if streams else ''}")

    def _ending(self, piece: Piece) -> dict[str, Any]:
        logprobs = piece.logprobs and {"content": self._told_of(piece), "refusal": None}
        return {"index": piece.index, "finish_reason": piece.finish, "logprobs": logprobs}

    def _told_of(self, piece: Piece) -> list[dict[str, Any]]:
        return [
            self._told(token, chosen) | {"top_logprobs": [self._told(*pair) for pair in likeliest]}
            for token, chosen, likeliest in told_tokens(piece, self._top)
        ]

    def _told(self, token: int, value: float) -> dict[str, Any]:
        content = list(self._tokenizer.token_bytes(token))
        return {"token": token_text(self._tokenizer, token), "logprob": value, "bytes": content}
