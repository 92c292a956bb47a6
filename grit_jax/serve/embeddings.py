"""`POST /v1/embeddings`: texts to vectors."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from grit_jax.serve import protocol
from grit_jax.serve.errors import RequestError
from grit_jax.serve.fairness import Caller
from grit_jax.serve.service import Service, count_tokens


class EmbeddingRequest(protocol.Strict):
    """The request.

    Attributes:
      input: A text or several, or the tokens of this model that stand for them.
      encoding_format: How vectors are sent.
      dimensions: Numbers of a vector; only as many as the model gives.
      user: Not used.
      instruction: What the model is told about the texts.
      prompt_name: Name of an instruction that the server knows.
      truncate: Whether texts that are too long are cut, and not refused.
    """

    input: protocol.Inputs
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = None
    instruction: str | None = None
    prompt_name: str | None = None
    truncate: bool = False


class Embeddings:
    """The endpoint.

    Args:
      service: The model.
      instructions: Instructions by name.
    """

    def __init__(self, service: Service, instructions: Mapping[str, str]):
        self._service, self._instructions = service, instructions

    async def __call__(self, body: bytes, caller: Caller) -> Mapping[str, Any]:
        """The vectors that a request asks for."""
        service = self._service
        request = await service.parse(EmbeddingRequest, body)
        service.refuse_other_model(request.model)
        if request.dimensions not in (None, embed_dim := service.model.embed_dim):
            raise RequestError(
                400, f"dimensions: vectors of this model have {embed_dim}; leave it out", param="dimensions"
            )
        instruction = self._instruction(request)
        texts = await asyncio.to_thread(service.texts, request.input)
        prompts = await service.embedding_prompts(texts, instruction, truncate=request.truncate)
        vectors = await service.embed(prompts, caller)
        encode = _base64 if request.encoding_format == "base64" else np.ndarray.tolist
        data = ({"object": "embedding", "index": i, "embedding": encode(x)} for i, x in enumerate(vectors))
        usage = protocol.usage(count_tokens(prompts))
        return {"object": "list", "data": data, "model": service.name, "usage": usage}

    def _instruction(self, request: EmbeddingRequest) -> str:
        if request.prompt_name is None:
            return request.instruction or ""
        if request.instruction is not None:
            raise RequestError(400, "instruction and prompt_name: give one of them", param="prompt_name")
        if request.prompt_name not in self._instructions:
            names = ", ".join(self._instructions) or "none"
            raise RequestError(
                400, f"prompt_name: {request.prompt_name[:100]!r} is not known; there are: {names}", param="prompt_name"
            )
        return self._instructions[request.prompt_name]


def _base64(vector: np.ndarray) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
