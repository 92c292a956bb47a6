"""The endpoint `/v1/chat/completions`: continues a conversation, or answers a question from documents."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from grit_jax.inference.decode import TOP_LOGPROBS
from grit_jax.retrieval.rag import Prepared
from grit_jax.serve.choices import Choices, Form, GenerationRequest, Piece, Planned, plan
from grit_jax.serve.embeddings import as_documents
from grit_jax.serve.endpoint import Result
from grit_jax.serve.fairness import Caller
from grit_jax.serve.protocol import StrictModel, only
from grit_jax.serve.request_errors import RequestError
from grit_jax.serve.service import Service, count_tokens
from grit_jax.text.prompts import SYSTEM_ROLES, Positions, RagMethod

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
    for index, part in enumerate(content):
        part_type = part.get("type") if isinstance(part, dict) else None
        if part_type != "text":
            raise ValueError(f"part {index} is of type {str(part_type)[:50]!r}; the model reads text only")
        if not isinstance(part.get("text"), str) or part.keys() - {"type", "text"}:
            raise ValueError(f'part {index} must be {{"type": "text", "text": ...}}')
        texts.append(part["text"])
    return "".join(texts)


class Message(StrictModel):
    """A turn of a conversation.

    Attributes:
      role: Who speaks.
      content: The text; may be null for an assistant.
      name: Not used; the other fields must be empty.
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
        """The turn in the model's format."""
        return {"role": self.role, "content": self.content or ""}


class Retrieval(StrictModel):
    """How an answer uses documents from the server's store; see `Rag.prepare`.

    Attributes:
      method: How query and documents reach the model.
      k: Number of documents.
      instruction: The query's instruction for its embedding.
      positions: Positions of a cached text after another.
    """

    method: RagMethod = "document_cache"
    k: Annotated[int, Field(ge=1, le=20)] = 1
    instruction: str = ""
    positions: Positions = "own"


class ChatRequest(GenerationRequest):
    """A chat request.

    Attributes:
      messages: The conversation: system or developer first, then user and assistant in turn. The completion
        continues the last message if that is the assistant's.
      max_completion_tokens: The new name of `max_tokens`.
      logprobs: Whether to return the tokens' log p.
      top_logprobs: Number of likeliest tokens to return with each.
      retrieval: How to answer the message from documents; null continues the conversation.

    Fields from `metadata` to `parallel_tool_calls` are not used; later ones may only ask for the server's behaviour.
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
    response_format: Annotated[Any, only({"type": "text"}, because="the model cannot be held to a format")] = None
    modalities: Annotated[Any, only(["text"], because="the model writes text only")] = None
    audio: Annotated[Any, only(because="the model writes text only")] = None
    tools: Annotated[Any, only([], because=_NO_TOOLS)] = None
    tool_choice: Annotated[Any, only("none", "auto", because=_NO_TOOLS)] = None
    functions: Annotated[Any, only([], because=_NO_TOOLS)] = None
    function_call: Annotated[Any, only("none", "auto", because=_NO_TOOLS)] = None
    store: Annotated[Any, only(False, because="nothing is stored")] = None
    service_tier: Annotated[Any, only("auto", "default", because="there is one tier")] = None
    reasoning_effort: Annotated[Any, only("none", because="the model does not reason before it answers")] = None
    verbosity: Annotated[Any, only("medium", because="the model has no levels of verbosity")] = None

    @model_validator(mode="after")
    def _has_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs; send logprobs: true too")
        return self

    @property
    def turns(self) -> list[dict[str, str]]:
        """The conversation in the model's format, without the `prefix`."""
        turns = [message.turn() for message in self.messages]
        return turns[:-1] if self.messages[-1].role == "assistant" else turns

    @property
    def prefix(self) -> str:
        """The beginning of the completion."""
        last = self.messages[-1].turn()
        return last["content"] if last["role"] == "assistant" else ""


async def chat(service: Service, request: ChatRequest, caller: Caller) -> Result:
    """The assistant's next turn."""
    service.refuse_huge("".join(message.content or "" for message in request.messages), "the conversation")
    form = ChatForm(service.model.tokenizer, request.top_logprobs or 0)
    return await Choices(service, request, _planned(service, request, caller), form, caller).result()


@asynccontextmanager
async def _planned(service: Service, request: ChatRequest, caller: Caller) -> AsyncGenerator[Planned]:
    planning = functools.partial(
        plan, service, request,
        max_tokens=request.max_completion_tokens or request.max_tokens, logprobs=bool(request.logprobs),
    )  # fmt: skip
    if request.retrieval is None:
        yield planning(await asyncio.to_thread(service.model.prompt_tokens, [request.turns], prefix=request.prefix))
        return
    async with service.rag_rows.room(caller):
        prefix, _, tokens, hits = await _prepared(service, request.messages, request.retrieval, caller)
        yield planning([tokens], prefix=prefix, fields={"documents": as_documents(hits)})


async def _prepared(service: Service, messages: Sequence[Message], retrieval: Retrieval, caller: Caller) -> Prepared:
    """The prompt of an answer from documents."""
    rag = service.require_rag()
    if len(messages) != 1 or messages[0].role != "user":
        raise RequestError(400, "messages: with retrieval the question must stand alone; send one user message")
    query, how = messages[0].turn()["content"], retrieval.model_dump()
    prompts = await service.embedding_prompts([query], retrieval.instruction)  # refuses a query that is too long
    max_length = service.limits.max_length
    found = await service.scheduler.call(lambda: rag.prepare(query, **how, max_length=max_length), caller)
    if retrieval.method != "none":
        service.counters.tokens.labels("embedded").inc(count_tokens(prompts))
    return found


class ChatForm(Form):
    """The choices of a chat completion."""

    id_prefix = "chatcmpl"
    object = "chat.completion", "chat.completion.chunk"

    def choice(self, piece: Piece) -> dict[str, Any]:
        """A choice of a response."""
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return {"message": message, **self._ending(piece)}

    def delta(self, piece: Piece, *, first: bool) -> dict[str, Any]:
        """A choice of an event; only the first has the role, because clients join the deltas."""
        role = {"role": "assistant"} if first else {}
        return {"delta": {**role, "content": piece.text}, **self._ending(piece)}

    def _ending(self, piece: Piece) -> dict[str, Any]:
        logprobs = piece.logprobs and {"content": self._logprobs(piece), "refusal": None}
        return {"index": piece.index, "finish_reason": piece.finish, "logprobs": logprobs}

    def _logprobs(self, piece: Piece) -> list[dict[str, Any]]:
        return [
            self._logprob(token, value) | {"top_logprobs": [self._logprob(*pair) for pair in likeliest]}
            for token, value, likeliest in self.token_logprobs(piece)
        ]

    def _logprob(self, token: int, value: float) -> dict[str, Any]:
        content = list(self.tokenizer.token_bytes(token))
        return {"token": self.token_text(token), "logprob": value, "bytes": content}
