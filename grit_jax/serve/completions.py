"""The endpoint `/v1/completions`: continues raw texts."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from grit_jax.inference.decode import TOP_LOGPROBS
from grit_jax.serve.choices import Choices, Form, GenerationRequest, Piece, plan
from grit_jax.serve.endpoint import Result
from grit_jax.serve.fairness import Caller
from grit_jax.serve.protocol import Inputs, only
from grit_jax.serve.service import Service


class CompletionRequest(GenerationRequest):
    """A completion request.

    Attributes:
      prompt: A text or several, or tokens of this model.
      max_tokens: Most new tokens of a choice.
      logprobs: Number of likeliest tokens to return with each; null for no log p.

    The other fields may only ask for the server's behaviour.
    """

    prompt: Inputs
    max_tokens: Annotated[int, Field(ge=1)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS)] | None = None
    echo: Annotated[Any, only(False, because="the prompt is not repeated")] = None
    best_of: Annotated[Any, only(1, because="all choices are returned")] = None
    suffix: Annotated[Any, only("", because="a text is continued at its end")] = None


async def complete(service: Service, request: CompletionRequest, caller: Caller) -> Result:
    """The continuations of a request's texts."""
    prompts = await asyncio.to_thread(_prompts, service, request.prompt)
    logprobs = request.logprobs is not None
    planned = plan(service, request, prompts, max_tokens=request.max_tokens, logprobs=logprobs)
    form = CompletionForm(service.model.tokenizer, request.logprobs or 0)
    return await Choices(service, request, nullcontext(planned), form, caller).result()


def _prompts(service: Service, inputs: Inputs) -> list[np.ndarray]:
    """The tokens of each input, after BOS; tokens that begin with BOS get no second one."""
    found = service.as_list(inputs)
    for index, one in enumerate(found):
        if isinstance(one, str):
            service.refuse_huge(one, f"prompt {index}")
    texts = iter(service.model.prompt_tokens([one for one in found if isinstance(one, str)], raw=True))
    bos = service.model.tokenizer.bos_id
    return [
        next(texts) if isinstance(one, str) else np.array([*[bos] * (bos not in (None, one[0])), *one], np.int32)
        for one in found
    ]


class CompletionForm(Form):
    """The choices of a completion."""

    id_prefix = "cmpl"
    object = "text_completion", "text_completion"

    def choice(self, piece: Piece) -> dict[str, Any]:
        """A choice of a response."""
        logprobs = piece.logprobs and self._logprobs(piece)
        return {"index": piece.index, "text": piece.text, "finish_reason": piece.finish, "logprobs": logprobs}

    def delta(self, piece: Piece, *, first: bool) -> dict[str, Any]:
        """A choice of an event."""
        return self.choice(piece)

    def _logprobs(self, piece: Piece) -> dict[str, Any]:
        tokens = self.token_logprobs(piece)
        return {
            "tokens": [self.token_text(token) for token, *_ in tokens],
            "token_logprobs": [value for _, value, _ in tokens],
            "top_logprobs": [{self.token_text(token): value for token, value in likeliest} for *_, likeliest in tokens],
        }
