"""`POST /v1/rerank`: documents in the order of their cosine with a query."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from grit_jax.serve import protocol
from grit_jax.serve.fairness import Caller
from grit_jax.serve.service import Service, count_tokens


class RerankDocument(protocol.Exact):
    """A document of a request."""

    text: str


class RerankRequest(protocol.Strict):
    """The request.

    Attributes:
      query: What is asked.
      documents: What is put in order.
      top_n: How many are returned; null for all.
      return_documents: Whether their texts are returned.
      instruction: What the model is told about the query.
      truncate: Whether texts that are too long are cut, and not refused.
    """

    query: str
    documents: Annotated[
        list[str | RerankDocument], Field(min_length=1, max_length=protocol.MOST_INPUTS, fail_fast=True)
    ]
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool = True
    instruction: str = ""
    truncate: bool = False

    @property
    def texts(self) -> list[str]:
        """What the documents say."""
        return [one if isinstance(one, str) else one.text for one in self.documents]


class Rerank:
    """The endpoint.

    Args:
      service: The model.
    """

    def __init__(self, service: Service):
        self._service = service

    async def __call__(self, body: bytes, caller: Caller) -> Mapping[str, Any]:
        """The documents of a request in order."""
        service = self._service
        request = await service.parse(RerankRequest, body)
        service.refuse_other_model(request.model)
        query = await service.embedding_prompts([request.query], request.instruction, truncate=request.truncate)
        passages = await service.embedding_prompts(request.texts, "", truncate=request.truncate)
        vectors = await service.embed([*query, *passages], caller)
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        scores = vectors[1:] @ vectors[0]
        order = np.argsort(-scores, kind="stable")[: request.top_n].tolist()
        results = (
            {"index": place, "relevance_score": float(scores[place])}
            | ({"document": {"text": request.texts[place]}} if request.return_documents else {})
            for place in order
        )
        read = count_tokens([*query, *passages])
        return protocol.about("rerank", service.name, results=results, usage=protocol.usage(read))
