"""Fields that requests and responses of all endpoints share, and how a body becomes a request.

Unknown fields are refused, and so are values that the model cannot honour: nothing that a client asks for is silently
ignored. A null field counts as left out. A parsed body can be many times as large as its bytes, and slow to parse, so
its values are counted in the bytes first.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from grit_jax.errors import listed
from grit_jax.serve.request_errors import RequestError

MOST_INPUTS = 2048  # texts of a request, as at OpenAI
_MOST_VALUES = 400_000  # the most tokens as ids, and the values around them
_MOST_KEYS = 20_000  # in all objects
_DEEPEST = 32
_LONGEST_NUMBER = 64  # characters
_LONG_NUMBER = re.compile(rb"[-+.0-9eE]{%d}" % (_LONGEST_NUMBER + 1))
_MOST_ERRORS = 5  # in a message
_LONGEST_PATH = 100  # characters of a field's path in a message

_Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]
_Several = Field(min_length=1, max_length=MOST_INPUTS, fail_fast=True)


def _input_tag(value: Any) -> str | None:
    if isinstance(value, str):
        return "text"
    if not isinstance(value, list):
        return None
    return {str: "texts", int: "tokens", list: "token lists"}.get(type(value[0] if value else ""))


# One input or several: texts, or ids of this model's tokens.
Inputs = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[str], _Several, Tag("texts")]
    | Annotated[_Tokens, Tag("tokens")]
    | Annotated[list[_Tokens], _Several, Tag("token lists")],
    Discriminator(
        _input_tag,
        custom_error_type="input",
        custom_error_message="must be a text, a list of texts, token ids, or a list of lists of token ids",
    ),
]


class StrictModel(BaseModel):
    """JSON with exact types and no unknown fields; null fields count as left out."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        return {key: value for key, value in given.items() if value is not None} if isinstance(given, dict) else given


class ModelRequest(StrictModel):
    """A request to a model."""

    model: str | None  # required, and so never null


T = TypeVar("T", bound=ModelRequest)


def only(*values: Any, because: str) -> AfterValidator:
    """Accepts only values that ask for the server's behaviour.

    Args:
      *values: These values.
      because: Why no others are possible.
    """

    def check(value: Any) -> Any:
        if not any(type(value) is type(one) and value == one for one in values):
            raise ValueError(f"{because}; leave it out")
        return value

    return AfterValidator(check)


def usage(read: int, written: int | None = None, cached: int = 0) -> dict[str, Any]:
    """Numbers of tokens read (`cached` of them from stored keys and values) and written."""
    if written is None:
        return {"prompt_tokens": read, "total_tokens": read}
    details = {"prompt_tokens_details": {"cached_tokens": cached}}
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written, **details}


def response_head(prefix: Literal["chatcmpl", "cmpl", "rerank"], model: str) -> dict[str, Any]:
    """The first fields of responses; `prefix` begins the id."""
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}


def parse(request_type: type[T], body: bytes) -> T:
    """The request of a body.

    Raises:
      RequestError: The body is not JSON, or not a valid request; the message names the fields.
    """
    _check_bounds(body)
    try:
        return request_type.model_validate_json(body)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)
        messages = [f"{_path(one) or 'body'}: {_message(one)}" for one in errors]
        raise RequestError(400, listed(messages, most=_MOST_ERRORS), param=_path(errors[0]) or None) from None


def _path(error: Mapping[str, Any]) -> str:
    return ".".join(map(str, error["loc"]))[:_LONGEST_PATH]


def _message(error: Mapping[str, Any]) -> str:
    if error["type"] == "extra_forbidden":
        return "is not known here; leave it out"
    return error["msg"].removeprefix("Value error, ")


def _check_bounds(body: bytes) -> None:
    """Refuses JSON that would take long to parse, judged by the bytes outside its strings.

    Raises:
      RequestError: It has too many values, is too deep, or has too long a number.
    """
    most_quotes = 2 * (_MOST_VALUES + _MOST_KEYS)
    # Without escapes, every second piece between quotes is outside a string.
    pieces = body.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"', most_quotes)
    outside = b"".join(pieces[::2])
    num_values = outside.count(b",") + outside.count(b"[") + outside.count(b"{")
    for is_too_much, what in (
        (lambda: len(pieces) > most_quotes or num_values > _MOST_VALUES, f"over {_MOST_VALUES} values"),
        (lambda: outside.count(b":") > _MOST_KEYS, f"over {_MOST_KEYS} keys"),
        (lambda: _depth(outside) > _DEEPEST, f"over {_DEEPEST} lists and objects within each other"),
        (lambda: _LONG_NUMBER.search(outside), f"a number of over {_LONGEST_NUMBER} characters"),
    ):
        if is_too_much():
            raise RequestError(400, f"body: has {what}; send less at a time", "too_large")


def _depth(outside: bytes) -> int:
    characters = np.frombuffer(outside, np.uint8)
    opens, closes = (np.isin(characters, np.frombuffer(some, np.uint8)) for some in (b"[{", b"]}"))
    steps = opens.astype(np.int8) - closes.astype(np.int8)
    return int(np.cumsum(steps[steps != 0], dtype=np.int32).max(initial=0))
