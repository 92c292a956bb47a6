"""The endpoints that embed: `/v1/embeddings`, `/v1/rerank` and `/v1/search`."""

from __future__ import annotations

import asyncio
import base64
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from grit_jax.retrieval.retriever import Hit
from grit_jax.serve.fairness import Caller
from grit_jax.serve.protocol import MOST_INPUTS, Inputs, ModelRequest, StrictModel, response_head, usage
from grit_jax.serve.request_errors import RequestError, not_finite
from grit_jax.serve.service import Service, count_tokens

MOST_HITS = 1000  # documents of a search


class EmbeddingRequest(ModelRequest):
    """A request for vectors.

    Attributes:
      input: A text or several, or tokens of this model.
      encoding_format: How to send vectors.
      dimensions: Width of a vector; only the model's own.
      user: Not used.
      instruction: The texts' instruction.
      prompt_name: Name of an instruction that the server knows.
      truncate: Whether to cut texts that are too long instead of refusing them.
    """

    input: Inputs
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = None
    instruction: str | None = None
    prompt_name: str | None = None
    truncate: bool = False


class RerankDocument(StrictModel):
    """A document of a request."""

    text: str


class RerankRequest(ModelRequest):
    """A request to order documents by their cosine with a query.

    Attributes:
      query: The query.
      documents: The documents.
      top_n: Number of documents in the response; null for all.
      return_documents: Whether to return their texts.
      instruction: The query's instruction.
      truncate: Whether to cut texts that are too long instead of refusing them.
    """

    query: str
    documents: Annotated[list[str | RerankDocument], Field(min_length=1, max_length=MOST_INPUTS, fail_fast=True)]
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool = True
    instruction: str = ""
    truncate: bool = False

    @property
    def texts(self) -> list[str]:
        """The documents' texts."""
        return [one if isinstance(one, str) else one.text for one in self.documents]


class SearchRequest(ModelRequest):
    """A request for documents of the server's store.

    Attributes:
      model: The model, which may be left out.
      query: The query.
      k: Number of documents.
      instruction: The query's instruction.
    """

    model: str | None = None
    query: str
    k: Annotated[int, Field(ge=1, le=MOST_HITS)] = 10
    instruction: str = ""


async def embed(service: Service, request: EmbeddingRequest, caller: Caller) -> Mapping[str, Any]:
    """The vectors of a request."""
    if request.dimensions not in (None, embed_dim := service.model.embed_dim):
        message = f"dimensions: vectors of this model have {embed_dim}; leave it out"
        raise RequestError(400, message, param="dimensions")
    instruction = _instruction(service, request)
    texts = await asyncio.to_thread(_texts, service, request.input)
    prompts = await service.embedding_prompts(texts, instruction, truncate=request.truncate)
    vectors = await service.embed(prompts, caller)
    encode = _base64 if request.encoding_format == "base64" else np.ndarray.tolist
    data = ({"object": "embedding", "index": i, "embedding": encode(x)} for i, x in enumerate(vectors))
    return {"object": "list", "data": data, "model": service.name, "usage": usage(count_tokens(prompts))}


async def rerank(service: Service, request: RerankRequest, caller: Caller) -> Mapping[str, Any]:
    """The documents of a request in order."""
    query = await service.embedding_prompts([request.query], request.instruction, truncate=request.truncate)
    passages = await service.embedding_prompts(request.texts, "", truncate=request.truncate)
    vectors = await service.embed([*query, *passages], caller)
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    scores = vectors[1:] @ vectors[0]
    results = (
        {"index": index, "relevance_score": float(scores[index])}
        | ({"document": {"text": request.texts[index]}} if request.return_documents else {})
        for index in np.argsort(-scores, kind="stable")[: request.top_n].tolist()
    )
    head = response_head("rerank", service.name)
    return {**head, "results": results, "usage": usage(count_tokens([*query, *passages]))}


async def search(service: Service, request: SearchRequest, caller: Caller) -> Mapping[str, Any]:
    """The documents that answer a query."""
    retriever = service.require_rag().retriever
    prompts = await service.embedding_prompts([request.query], request.instruction)
    vectors = await service.embed(prompts, caller)
    best = await service.scheduler.call(lambda: retriever.best(vectors, request.k), caller)
    (hits,) = await asyncio.to_thread(retriever.hits, *best)
    found = {"object": "list", "model": service.name, "data": as_documents(hits)}
    return {**found, "usage": usage(count_tokens(prompts))}


def as_documents(hits: Sequence[Hit]) -> list[dict[str, Any]]:
    """Documents that a search found, best first.

    Raises:
      RequestError: A score is not finite.
    """
    if not all(math.isfinite(hit.score) for hit in hits):
        raise not_finite("a score of a document")
    return [
        {"rank": rank, "score": hit.score, **hit.document._asdict(), "same_text": hit.duplicates}
        for rank, hit in enumerate(hits, start=1)
    ]


def _texts(service: Service, inputs: Inputs) -> list[str]:
    decode = service.model.tokenizer.decode
    return [one if isinstance(one, str) else decode(one) for one in service.as_list(inputs)]


def _instruction(service: Service, request: EmbeddingRequest) -> str:
    name, known = request.prompt_name, service.instructions
    if name is None:
        return request.instruction or ""
    if request.instruction is not None:
        raise RequestError(400, "instruction and prompt_name: give one of them", param="prompt_name")
    if name not in known:
        message = f"prompt_name: {name[:100]!r} is not known; there are: {', '.join(known) or 'none'}"
        raise RequestError(400, message, param="prompt_name")
    return known[name]


def _base64(vector: np.ndarray) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
