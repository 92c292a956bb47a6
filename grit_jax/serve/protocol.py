"""What clients send, and what they get: OpenAI's requests and responses, and ours for search and reranking.

A field that is not here is refused, so nothing that a client asks for is left out without a word.
"""

from __future__ import annotations

import base64
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Protocol, Self, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from grit_jax.model.decode import TOP_LOGPROBS, Logprobs
from grit_jax.prompts import Positions, RagMethod
from grit_jax.store.retriever import Hit
from grit_jax.tokenizer import Tokenizer

MOST_INPUTS = 2048  # texts of a request, as at OpenAI
MOST_FOUND = 1000  # documents of a search
_MOST_CHOICES = 16

T = TypeVar("T", bound=BaseModel)

Stop = str | Annotated[list[str], Field(max_length=4)] | None


class RequestError(Exception):
    """A request that is not answered.

    Args:
      status: Of HTTP.
      message: What is wrong, and the remedy.
      code: What programs tell it by.
    """

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code

    def content(self) -> dict[str, Any]:
        """The body of the response, in OpenAI's form."""
        kinds = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": None, "code": self.code}}


class Exact(BaseModel):
    """JSON whose types are exact, and whose unknown fields are errors; a field that is null is not there."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        return {key: value for key, value in given.items() if value is not None} if isinstance(given, dict) else given


class Strict(Exact):
    """A request to a model."""

    model: str


class EmbeddingRequest(Strict):
    """`POST /v1/embeddings`.

    Attributes:
      input: A text or several.
      encoding_format: How vectors are sent.
      dimensions: Numbers of a vector; only as many as the model gives.
      user: Not used.
      instruction: What the model is told about the texts.
      prompt_name: Name of an instruction that the server knows.
      truncate: Whether texts that are too long are cut, and not refused.
    """

    input: str | Annotated[list[str], Field(min_length=1, max_length=MOST_INPUTS)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = None
    instruction: str | None = None
    prompt_name: str | None = None
    truncate: bool = False

    @field_validator("input", mode="before")
    @classmethod
    def _no_tokens(cls, value: Any) -> Any:
        if isinstance(value, list) and value and not isinstance(value[0], str):
            raise ValueError("tokens are not taken, as clients may make them with another tokenizer; send texts")
        return value


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
      stream_options: How.
      user: Not used.
      frequency_penalty: 0.
      presence_penalty: 0.
      logit_bias: Nothing.
    """

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    n: Annotated[int, Field(ge=1, le=_MOST_CHOICES)] = 1
    stop: Stop = None
    seed: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @field_validator("frequency_penalty", "presence_penalty", mode="before")
    @classmethod
    def _whole(cls, value: Any) -> Any:
        return 0 if value == 0 and not isinstance(value, bool) else value

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class TextPart(Exact):
    """A piece of a message's content; images and sound have no place in the model."""

    type: Literal["text"]
    text: str


class Message(Exact):
    """A turn of a conversation.

    Attributes:
      role: Who speaks; the model's format has no system.
      content: What is said.
      name: Not used.
    """

    role: Literal["user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: str | None = None

    @field_validator("role", mode="before")
    @classmethod
    def _no_system(cls, value: Any) -> Any:
        if value in ("system", "developer"):
            raise ValueError(f"the model's format has no {value!r}; put it before the first user message's text")
        return value

    def turn(self) -> dict[str, str]:
        """The turn as the model's format takes it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": content}


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
    """`POST /v1/chat/completions`.

    Attributes:
      messages: The conversation, user and assistant in turn.
      max_completion_tokens: The new name of `max_tokens`.
      logprobs: Whether log p of the tokens is told.
      top_logprobs: Likeliest tokens that are told with it.
      response_format: Text.
      retrieval: How the last message is answered from documents; null answers the conversation by itself.
    """

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS)] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    retrieval: Retrieval | None = None

    @model_validator(mode="after")
    def _has_logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is told with logprobs alone; send logprobs: true too")
        return self


class CompletionRequest(WrittenRequest):
    """`POST /v1/completions`: texts that are continued as they are.

    Attributes:
      prompt: A text or several.
      max_tokens: Most tokens that are written.
      logprobs: Likeliest tokens that are told with each; null tells none.
      echo: Not offered.
      best_of: Not offered.
    """

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=MOST_INPUTS)]
    max_tokens: Annotated[int, Field(ge=1)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None


class RerankDocument(Exact):
    """A document of a reranking request."""

    text: str


class RerankRequest(Strict):
    """`POST /v1/rerank`: documents in the order of their cosine with a query.

    Attributes:
      query: What is asked.
      documents: What is put in order.
      top_n: How many are returned; null for all.
      return_documents: Whether their texts are returned.
      instruction: What the model is told about the query.
      truncate: Whether texts that are too long are cut, and not refused.
    """

    query: str
    documents: Annotated[list[str | RerankDocument], Field(min_length=1, max_length=MOST_INPUTS)]
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool = True
    instruction: str = ""
    truncate: bool = False

    @property
    def texts(self) -> list[str]:
        """What the documents say."""
        return [one if isinstance(one, str) else one.text for one in self.documents]


class SearchRequest(Exact):
    """`POST /v1/search`: documents of the server's store.

    Attributes:
      model: The model, which may be left out.
      query: What is asked.
      k: How many documents.
      instruction: What the model is told about the query.
    """

    model: str | None = None
    query: str
    k: Annotated[int, Field(ge=1, le=MOST_FOUND)] = 10
    instruction: str = ""


def parse(kind: type[T], body: bytes) -> T:
    """The request that a body holds.

    Raises:
      RequestError: It is no JSON, or not such a request; the message names the fields.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        found = [
            f"{'.'.join(map(str, one['loc'])) or 'body'}: {one['msg'].removeprefix('Value error, ')}"
            for one in error.errors(include_url=False, include_context=False, include_input=False)[:5]
        ]
        raise RequestError(400, "; ".join(found)) from error


def usage(read: int, written: int | None = None, cached: int = 0) -> dict[str, Any]:
    """Numbers of tokens that were read, `cached` of them from stored keys and values, and written."""
    if written is None:
        return {"prompt_tokens": read, "total_tokens": read}
    details = {"prompt_tokens_details": {"cached_tokens": cached}}
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written, **details}


def about(kind: Literal["chatcmpl", "cmpl", "rerank"], model: str, **more: Any) -> dict[str, Any]:
    """What every response of a kind begins with."""
    return {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model, **more}


def embeddings(vectors: np.ndarray, form: Literal["float", "base64"], model: str, read: int) -> dict[str, Any]:
    """The response of `/v1/embeddings`; base64 is of little-endian float32."""

    def encoded(vector: np.ndarray) -> Any:
        if form == "float":
            return vector.tolist()
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()

    data = [{"object": "embedding", "index": i, "embedding": encoded(vector)} for i, vector in enumerate(vectors)]
    return {"object": "list", "data": data, "model": model, "usage": usage(read)}


def documents(hits: Sequence[Hit]) -> list[dict[str, Any]]:
    """Documents that were found, best first."""
    return [
        {
            "rank": rank,
            "score": hit.score,
            "id": hit.document.id,
            "title": hit.document.title,
            "text": hit.document.text,
            "same_text": hit.duplicates,
        }
        for rank, hit in enumerate(hits, start=1)
    ]


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


class ChatForm:
    """Answers of one request to `/v1/chat/completions`.

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
        return about("chatcmpl", model, object=f"chat.completion{'.chunk' if streams else ''}")

    def _ending(self, piece: Piece) -> dict[str, Any]:
        logprobs = piece.logprobs and {"content": self._told_of(piece), "refusal": None}
        return {"index": piece.index, "finish_reason": piece.finish, "logprobs": logprobs}

    def _told_of(self, piece: Piece) -> list[dict[str, Any]]:
        return [
            self._told(token, chosen) | {"top_logprobs": [self._told(*pair) for pair in likeliest]}
            for token, chosen, likeliest in _told_tokens(piece, self._top)
        ]

    def _told(self, token: int, value: float) -> dict[str, Any]:
        content = self._tokenizer.token_bytes(token)
        return {"token": _text(content), "logprob": value, "bytes": list(content)}


class CompletionForm:
    """Answers of `/v1/completions`; arguments as of `ChatForm`."""

    def __init__(self, tokenizer: Tokenizer, top: int):
        self._tokenizer, self._top = tokenizer, top

    def whole(self, piece: Piece) -> dict[str, Any]:
        """A choice of a response."""
        logprobs = piece.logprobs and self._told_of(piece)
        return {"index": piece.index, "text": piece.text, "finish_reason": piece.finish, "logprobs": logprobs}

    part = whole

    def about(self, model: str, *, streams: bool) -> dict[str, Any]:
        """What a response begins with, and every event of it."""
        return about("cmpl", model, object="text_completion")

    def _told_of(self, piece: Piece) -> dict[str, Any]:
        told = _told_tokens(piece, self._top)
        return {
            "tokens": [self._text(token) for token, *_ in told],
            "token_logprobs": [chosen for _, chosen, _ in told],
            "top_logprobs": [{self._text(token): value for token, value in likeliest} for *_, likeliest in told],
        }

    def _text(self, token: int) -> str:
        return _text(self._tokenizer.token_bytes(token))


def _text(content: bytes) -> str:
    r"""The text of a token; bytes that are a part of a character only are told as `bytes:\xf0\x9f`, as at OpenAI."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def _told_tokens(piece: Piece, top: int) -> list[tuple[int, float, list[tuple[int, float]]]]:
    """Each token, its log p, and the likeliest tokens with theirs."""
    if piece.logprobs is None:
        return []
    chosen, likeliest, values = (x.tolist() for x in piece.logprobs)
    pairs = [list(zip(*both, strict=True))[:top] for both in zip(likeliest, values, strict=True)]
    return list(zip(piece.tokens.tolist(), chosen, pairs, strict=True))


def instruction_of(request: EmbeddingRequest, known: Mapping[str, str]) -> str:
    """What the model is told about a request's texts.

    Raises:
      RequestError: The name is not known, or there are two instructions.
    """
    if request.prompt_name is None:
        return request.instruction or ""
    if request.instruction is not None:
        raise RequestError(400, "instruction and prompt_name: give one of them")
    if request.prompt_name not in known:
        names = ", ".join(known) or "none"
        raise RequestError(400, f"prompt_name: {request.prompt_name!r} is not known; there are: {names}")
    return known[request.prompt_name]
