"""Comparisons of numbers: what one found, whether that is good enough, and the line that says so."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Check:
    """Outcome of one comparison.

    Attributes:
      target: What was compared.
      difference: Largest difference; infinite where the numbers cannot be compared.
      text: The same in words.
      tolerance: Largest difference that passes.
    """

    target: str
    difference: float
    text: str
    tolerance: float = TOLERANCE

    @property
    def passed(self) -> bool:
        """Whether the difference is tolerated; NaN is not."""
        return self.difference <= self.tolerance


def verdict(target: str, passed: bool, text: str) -> Check:
    """A check that is no comparison of numbers."""
    return Check(target, 0.0 if passed else math.inf, text)


def print_checks(checks: Iterable[Check]) -> int:
    """Prints one line per check and returns the exit code."""
    failed = False
    for check in checks:
        failed |= not check.passed
        print(f"{'ok  ' if check.passed else 'FAIL'} {check.target}: {check.text}", flush=True)
    return int(failed)
