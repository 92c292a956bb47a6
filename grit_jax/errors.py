"""What is wrong with what a user gave."""


class InputError(ValueError):
    """Something the user gave is wrong; the message names it and the remedy (exit code 2)."""


def install(extra: str) -> str:
    """The command that adds an extra of this package, such as `serve`; the package is installed from its clone."""
    return f"pip install -c constraints.txt -e '.[{extra}]' (in the clone of grit_jax)"
