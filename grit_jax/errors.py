"""What is wrong with what a user gave."""


class InputError(ValueError):
    """Something the user gave is wrong; the message names it and the remedy (exit code 2)."""


class NotFiniteError(InputError):
    """What a model computes is not finite: its weights are damaged, or too large for the type it computes in."""


def listed(problems: list[str]) -> str:
    """The first problems, and how many more there are."""
    return "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")


def install(extra: str) -> str:
    """The command that adds an extra of this package, such as `serve`; the package is installed from its clone."""
    return f"pip install -c constraints.txt -e '.[{extra}]' (in the clone of grit_jax)"
