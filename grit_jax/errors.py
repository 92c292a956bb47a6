"""Errors in a user's input, and helpers for their messages."""


class InputError(ValueError):
    """The user's input is wrong; the message names the fault and the remedy (exit code 2)."""


class NotFiniteError(InputError):
    """A model's results are not finite: its weights are damaged, or too large for the dtype it computes in."""


def listed(problems: list[str]) -> str:
    """The first problems, and how many more there are."""
    return "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")


def install(extra: str) -> str:
    """The command that adds an extra of this package, such as `serve`; the package is installed from its clone."""
    return f"pip install -c constraints.txt -e '.[{extra}]' (in the clone of grit_jax)"
