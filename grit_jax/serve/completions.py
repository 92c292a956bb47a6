"""`POST /v1/completions`: texts that are continued as they are."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from grit_jax.inference.decode import TOP_LOGPROBS
from grit_jax.serve import protocol
from grit_jax.serve.answers import Answers, Piece, WrittenRequest, begin, token_text, told_tokens
from grit_jax.serve.endpoint import Response
from grit_jax.serve.fairness import Caller
from grit_jax.serve.protocol import only
from grit_jax.serve.service import Service
from grit_jax.text.tokenizer import Tokenizer


class CompletionRequest(WrittenRequest):
    """The request.

    Attributes:
      prompt: A text or several, or the tokens of this model that stand for them.
      max_tokens: Most tokens that are written.
      logprobs: Likeliest tokens that are told with each; null tells none.
      echo: Not offered.
      best_of: Not offered.
      suffix: Not offered.
    """

    prompt: protocol.Inputs
    max_tokens: Annotated[int, Field(ge=1)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS)] | None = None
    echo: Annotated[Any, only(False, because="the prompt is not repeated")] = None
    best_of: Annotated[Any, only(1, because="every answer that is written is told")] = None
    suffix: Annotated[Any, only("", because="a text is continued at its end")] = None


class Completions:
    """The endpoint.

    Args:
      service: The model.
    """

    def __init__(self, service: Service):
        self._service = service

    async def __call__(self, body: bytes, caller: Caller) -> Response:
        """What comes after the texts of a request."""
        service = self._service
        request = await service.parse(CompletionRequest, body)
        service.refuse_other_model(request.model)
        prompts = await asyncio.to_thread(self._prompts, request.prompt)
        begun = begin(service, request, prompts, max_tokens=request.max_tokens, logprobs=request.logprobs is not None)
        form = CompletionForm(service.model.tokenizer, request.logprobs or 0)
        return await Answers(service, request, nullcontext(begun), form, caller).response()

    def _prompts(self, inputs: protocol.Inputs) -> list[np.ndarray]:
        """What is read: a text after BOS; tokens too, unless BOS is the first of them."""
        model, separate = self._service.model, self._service.separate(inputs)
        for place, one in enumerate(separate):
            if isinstance(one, str):
                self._service.refuse_huge(one, f"prompt {place}")
        texts = iter(model.prompt_tokens([one for one in separate if isinstance(one, str)], raw=True))
        bos = model.tokenizer.bos_id
        return [
            next(texts) if isinstance(one, str) else np.array([*[bos] * (bos not in (None, one[0])), *one], np.int32)
            for one in separate
        ]


class CompletionForm:
    """Answers of a request; arguments as of `ChatForm`."""

    def __init__(self, tokenizer: Tokenizer, top: int):
        self._tokenizer, self._top = tokenizer, top

    def whole(self, piece: Piece) -> dict[str, Any]:
        """A choice of a response."""
        logprobs = piece.logprobs and self._told_of(piece)
        return {"index": piece.index, "text": piece.text, "finish_reason": piece.finish, "logprobs": logprobs}

    part = whole

    def about(self, model: str, *, streams: bool) -> dict[str, Any]:
        """What a response begins with, and every event of it."""
        return protocol.about("cmpl", model, object="text_completion")

    def _told_of(self, piece: Piece) -> dict[str, Any]:
        told = told_tokens(piece, self._top)
        return {
            "tokens": [self._text(token) for token, *_ in told],
            "token_logprobs": [chosen for _, chosen, _ in told],
            "top_logprobs": [{self._text(token): value for token, value in likeliest} for *_, likeliest in told],
        }

    def _text(self, token: int) -> str:
        return token_text(self._tokenizer, token)
