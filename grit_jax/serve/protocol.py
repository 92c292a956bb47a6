"""What requests and responses of all endpoints have in common.

A field that is not known is refused, and so is a value that the model cannot follow: nothing that a client asks for is
left out without a word. A field that is null is as if it were left out.
"""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

MOST_INPUTS = 2048  # texts of a request, as at OpenAI

_Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]
_Several = Field(min_length=1, max_length=MOST_INPUTS, fail_fast=True)


def _kind_of_input(value: Any) -> str | None:
    first = value[0] if isinstance(value, list) and value else ""
    kinds = {str: "texts", int: "tokens", list: "token lists"} if isinstance(value, list) else {}
    return "text" if isinstance(value, str) else kinds.get(type(first))


# One input or several: texts, or ids of this model's tokens.
Inputs = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[str], _Several, Tag("texts")]
    | Annotated[_Tokens, Tag("tokens")]
    | Annotated[list[_Tokens], _Several, Tag("token lists")],
    Discriminator(
        _kind_of_input,
        custom_error_type="input",
        custom_error_message="must be a text, a list of texts, token ids, or a list of lists of token ids",
    ),
]


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


def only(*values: Any, because: str) -> AfterValidator:
    """Takes a field where it asks for what happens anyway, and refuses it otherwise.

    Args:
      *values: What it may be.
      because: Why it can be nothing else.
    """

    def check(value: Any) -> Any:
        if not any(type(value) is type(one) and value == one for one in values):
            raise ValueError(f"{because}; leave it out")
        return value

    return AfterValidator(check)


def usage(read: int, written: int | None = None, cached: int = 0) -> dict[str, Any]:
    """Numbers of tokens that were read, `cached` of them from stored keys and values, and written."""
    if written is None:
        return {"prompt_tokens": read, "total_tokens": read}
    details = {"prompt_tokens_details": {"cached_tokens": cached}}
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written, **details}


def about(kind: Literal["chatcmpl", "cmpl", "rerank"], model: str, **more: Any) -> dict[str, Any]:
    """What every response of a kind begins with."""
    return {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model, **more}
