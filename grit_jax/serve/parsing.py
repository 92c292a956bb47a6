"""From the bytes of a request to what they ask for.

What a parser makes of a body can be many times as large as the body, and take many times as long as a text of that
size. So its values are counted in the bytes first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError

from grit_jax.serve.errors import RequestError

T = TypeVar("T", bound=BaseModel)

MOST_TOKENS = 300_000  # of the texts of a request, as at OpenAI
_MOST_VALUES = 400_000  # so many tokens as ids, and what is around them
_MOST_KEYS = 20_000  # of all objects
_DEEPEST = 32
_LONGEST_NUMBER = 64  # characters

_LONG_NUMBER = re.compile(rb"[-+.0-9eE]{%d}" % (_LONGEST_NUMBER + 1))
_MOST_ERRORS = 5  # that a client is told
_LONGEST_PLACE = 100  # characters of it


def parse(kind: type[T], body: bytes) -> T:
    """The request that a body holds.

    Raises:
      RequestError: It is no JSON, or not such a request; the message names the fields.
    """
    _check_bounds(body)
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)
        told = [f"{_place(one) or 'body'}: {_what(one)}" for one in errors[:_MOST_ERRORS]]
        if len(errors) > _MOST_ERRORS:
            told.append(f"and {len(errors) - _MOST_ERRORS} more")
        raise RequestError(400, "; ".join(told), param=_place(errors[0]) or None) from None


def _place(error: Mapping[str, Any]) -> str:
    return ".".join(map(str, error["loc"]))[:_LONGEST_PLACE]


def _what(error: Mapping[str, Any]) -> str:
    if error["type"] == "extra_forbidden":
        return "is not known here; leave it out"
    return error["msg"].removeprefix("Value error, ")


def _check_bounds(body: bytes) -> None:
    """Refuses JSON that would take long to parse, by what is outside of its strings.

    Raises:
      RequestError: It has too many values, is too deep, or has a number that is too long.
    """
    most_quotes = 2 * (_MOST_VALUES + _MOST_KEYS)
    # With nothing escaped, every second piece between quotes is outside of a string.
    pieces = body.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"', most_quotes)
    outside = b"".join(pieces[::2])
    num_values = outside.count(b",") + outside.count(b"[") + outside.count(b"{")
    if len(pieces) > most_quotes or num_values > _MOST_VALUES:
        raise _too_much(f"over {_MOST_VALUES} values")
    if outside.count(b":") > _MOST_KEYS:
        raise _too_much(f"over {_MOST_KEYS} keys")
    if _depth(outside) > _DEEPEST:
        raise _too_much(f"over {_DEEPEST} lists and objects within each other")
    if _LONG_NUMBER.search(outside):
        raise _too_much(f"a number of over {_LONGEST_NUMBER} characters")


def _depth(outside: bytes) -> int:
    characters = np.frombuffer(outside, np.uint8)
    opens, closes = (np.isin(characters, np.frombuffer(some, np.uint8)) for some in (b"[{", b"]}"))
    steps = opens.astype(np.int8) - closes.astype(np.int8)
    return int(np.cumsum(steps[steps != 0], dtype=np.int32).max(initial=0))


def _too_much(what: str) -> RequestError:
    return RequestError(400, f"body: has {what}; send less at a time", "too_large")
