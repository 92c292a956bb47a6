"""`POST /v1/search`: documents of the server's store."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from grit_jax.retrieval.retriever import Hit
from grit_jax.serve import protocol
from grit_jax.serve.errors import not_finite
from grit_jax.serve.fairness import Caller
from grit_jax.serve.service import Service, count_tokens

MOST_FOUND = 1000  # documents


class SearchRequest(protocol.Exact):
    """The request.

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


class Search:
    """The endpoint.

    Args:
      service: The model and its documents.
    """

    def __init__(self, service: Service):
        self._service = service

    async def __call__(self, body: bytes, caller: Caller) -> Mapping[str, Any]:
        """The documents that a request asks for."""
        service = self._service
        request = await service.parse(SearchRequest, body)
        service.refuse_other_model(request.model or service.name)
        retriever = service.needed_rag().retriever
        prompts = await service.embedding_prompts([request.query], request.instruction)
        vectors = await service.embed(prompts, caller)
        best = await service.scheduler.call(lambda: retriever.best(vectors, request.k), caller)
        (hits,) = await asyncio.to_thread(retriever.hits, *best)
        read = count_tokens(prompts)
        return {"object": "list", "model": service.name, "data": as_documents(hits), "usage": protocol.usage(read)}


def as_documents(hits: Sequence[Hit]) -> list[dict[str, Any]]:
    """Documents that were found, best first.

    Raises:
      RequestError: A score is not finite.
    """
    if not all(math.isfinite(hit.score) for hit in hits):
        raise not_finite("a score of a document")
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
