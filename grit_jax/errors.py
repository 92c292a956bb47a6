"""What is wrong with what a user gave."""

from collections.abc import Sequence


class InputError(ValueError):
    """Something the user gave is wrong; the message names it and the remedy (exit code 2)."""


class NotFiniteError(InputError):
    """What a model computes is not finite: its weights are damaged, or too large for the type it computes in."""


def listed(items: Sequence[str], *, separator: str = "; ", most: int = 8) -> str:
    """The first `most` items, and how many more there are."""
    more = [f"and {len(items) - most} more"] if len(items) > most else []
    return separator.join([*items[:most], *more])


def install(extra: str) -> str:
    """The command that adds an extra of this package, such as `serve`; the package is installed from its clone."""
    return f"pip install -c constraints.txt -e '.[{extra}]' (in the clone of grit_jax)"
