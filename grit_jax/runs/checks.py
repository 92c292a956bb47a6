"""Checks, such as comparisons of numbers, and the lines that show them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import TypeVar

from grit_jax import files
from grit_jax.errors import InputError

T = TypeVar("T")

TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Check:
    """Outcome of a check.

    Attributes:
      target: What was checked.
      difference: Largest difference of the compared numbers; infinite if they cannot be compared.
      text: The outcome in words.
      tolerance: Largest difference that passes.
    """

    target: str
    difference: float
    text: str
    tolerance: float = TOLERANCE

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance; NaN is not."""
        return self.difference <= self.tolerance


def verdict(target: str, passed: bool, text: str) -> Check:
    """A check that compares no numbers."""
    return Check(target, 0.0 if passed else math.inf, text)


def checked(target: str, action: Callable[[], T], describe: Callable[[T], str]) -> tuple[Check, T | None]:
    """The check that an action succeeds, and its result; None if it refuses an input or cannot read it."""
    try:
        result = action()
        return verdict(target, True, describe(result)), result
    except (InputError, OSError, files.UnreachableError) as error:
        return verdict(target, False, str(error)), None


def print_checks(checks: Iterable[Check]) -> int:
    """Prints one line per check and returns the exit code."""
    failed = False
    for check in checks:
        failed |= not check.passed
        print(f"{'ok  ' if check.passed else 'FAIL'} {check.target}: {check.text}", flush=True)
    return int(failed)
