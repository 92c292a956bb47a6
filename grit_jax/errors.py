"""Errors in a user's input, and helpers for their messages."""

from collections.abc import Sequence


class InputError(ValueError):
    """The user's input is wrong; the message names the fault and the remedy (exit code 2)."""


class NotFiniteError(InputError):
    """A model's results are not finite: its weights are damaged, or too large for the dtype it computes in."""


def listed(items: Sequence[str], *, separator: str = "; ", most: int = 8) -> str:
    """The first `most` items, and how many more there are."""
    more = [f"and {len(items) - most} more"] if len(items) > most else []
    return separator.join([*items[:most], *more])


def install(extra: str) -> str:
    """The command that adds an extra of this package, such as `serve`; the package is installed from its clone."""
    return f"pip install -c constraints.txt -e '.[{extra}]' (in the clone of grit_jax)"
