"""Ranges of numeric settings, and the messages of values outside them."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

from grit_jax.errors import InputError


class Range(NamedTuple):
    """The numbers that a setting may have; `require_fields` checks those in the metadata of annotations.

    Attributes:
      text: The requirement, such as `must be positive`.
      holds: Whether a finite number meets it.
    """

    text: str
    holds: Callable[[float], bool]

    def __repr__(self) -> str:
        return self.text

    def fault(self, value: float) -> str | None:
        """The requirement that a number fails, be it only finiteness; None for a number in the range."""
        if not isinstance(value, int) and not math.isfinite(value):  # an int may be too large for a float
            return FINITE.text
        return None if self.holds(value) else self.text


FINITE = Range("must be a finite number", lambda value: True)
POSITIVE = Range("must be positive", lambda value: value > 0)
NOT_NEGATIVE = Range("must be 0 or more", lambda value: value >= 0)
SHARE = Range("must be from 0 to 1", lambda value: 0 <= value <= 1)
BELOW_ONE = Range("must be 0 or more, and less than 1", lambda value: 0 <= value < 1)
SEED = Range("must be from 0 to 4294967295", lambda value: 0 <= value < 1 << 32)  # JAX's random keys have 32 bits
# Python's and JAX's timers take no more.
SECONDS = Range("must be positive and at most 1000000000", lambda value: 0 < value <= 1_000_000_000)

PositiveInt = Annotated[int, POSITIVE]
PositiveFloat = Annotated[float, POSITIVE]
NonNegativeInt = Annotated[int, NOT_NEGATIVE]
NonNegativeFloat = Annotated[float, NOT_NEGATIVE]
Share = Annotated[float, SHARE]
Fraction = Annotated[float, BELOW_ONE]
Seed = Annotated[int, SEED]


def require(key: str, value: float | None, allowed: Range, remedy: str = "") -> None:
    """Checks that a setting's value is None or in its range.

    Raises:
      InputError: It is out of range, infinite or not a number; the message ends with the remedy.
    """
    if value is not None and (fault := allowed.fault(value)):
        raise InputError(f"{key}={value} {fault}{remedy and '; '}{remedy}")


def require_positive(key: str, value: float | None, remedy: str = "") -> None:
    """`require` with the range `POSITIVE`."""
    require(key, value, POSITIVE, remedy)


def require_fields(section: str, settings: Any) -> None:
    """Checks that the annotations of a dataclass allow its fields' values: their `Literal` or range, and finite floats.

    Args:
      section: Prefix of the keys in messages.
      settings: The dataclass.

    Raises:
      InputError: A value is not allowed.
    """
    for name, annotation in typing.get_type_hints(type(settings), include_extras=True).items():
        key, value = f"{section}.{name}", getattr(settings, name)
        is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
        members = typing.get_args(annotation) if is_union else (annotation,)
        choices = [
            choice for member in members if typing.get_origin(member) is Literal for choice in typing.get_args(member)
        ]
        if choices and value not in choices:
            raise InputError(f"{key}={value!r} is not one of {', '.join(choices)}")
        annotated = [allowed for member in members for allowed in getattr(member, "__metadata__", ())]
        allowed = next(iter(annotated), FINITE)
        if allowed is not FINITE or isinstance(value, float):
            require(key, value, allowed, "null is allowed too" if types.NoneType in members else "")
