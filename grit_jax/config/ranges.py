"""Which numbers a setting may have, and the message that says so."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

from grit_jax.errors import InputError


class Range(NamedTuple):
    """The numbers that a setting may have.

    Attributes:
      text: What is asked of them, such as `must be positive`.
      holds: Whether a finite number is one of them.
    """

    text: str
    holds: Callable[[float], bool]

    def fault(self, value: float) -> str | None:
        """What is asked of a number that is not in the range, or not finite; None for one that is in it."""
        if not isinstance(value, int) and not math.isfinite(value):  # an int may be too large for a float
            return FINITE.text
        return None if self.holds(value) else self.text


FINITE = Range("must be a finite number", lambda value: True)
POSITIVE = Range("must be positive", lambda value: value > 0)
NOT_NEGATIVE = Range("must be 0 or more", lambda value: value >= 0)
SHARE = Range("must be from 0 to 1", lambda value: 0 <= value <= 1)
BELOW_ONE = Range("must be 0 or more, and less than 1", lambda value: 0 <= value < 1)
SEED = Range("must be from 0 to 4294967295", lambda value: 0 <= value < 1 << 32)  # JAX's random keys have 32 bits
# Timers of Python and of JAX take no more.
SECONDS = Range("must be positive and at most 1000000000", lambda value: 0 < value <= 1_000_000_000)


def require(key: str, value: float | None, allowed: Range, remedy: str = "") -> None:
    """Returns where a setting's value is in its range or left out; else the remedy stands behind the error.

    Raises:
      InputError: The value is outside of the range, infinite or not a number.
    """
    if value is not None and (fault := allowed.fault(value)):
        raise InputError(f"{key}={value} {fault}{remedy and '; '}{remedy}")


def require_positive(key: str, value: float | None, remedy: str = "") -> None:
    """`require` with the range `POSITIVE`."""
    require(key, value, POSITIVE, remedy)


def require_fields(section: str, settings: Any, **ranges: Range) -> None:
    """Returns where the named fields of a dataclass are in their ranges, and its other numbers are finite.

    Raises:
      InputError: A field is not; the message names it under `section`.
    """
    kinds = typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name in ranges or isinstance(value, float):
            optional = type(None) in typing.get_args(kinds[field.name])
            remedy = "null is allowed too" if optional else ""
            require(f"{section}.{field.name}", value, ranges.get(field.name, FINITE), remedy)
