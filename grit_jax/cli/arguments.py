"""What several commands ask of their arguments."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterable

from grit_jax.config.ranges import require_positive
from grit_jax.errors import InputError

_WIDTH = 100  # characters of a document that are shown


def refuse_not_positive(args: argparse.Namespace, *names: str) -> None:
    """Returns where each of these arguments is over 0 or left out.

    Raises:
      InputError: One is not.
    """
    for name in names:
        require_positive(f"--{name.replace('_', '-')}", getattr(args, name))


def refuse_empty(queries: Iterable[str]) -> None:
    """Returns where every query says something.

    Raises:
      InputError: One does not.
    """
    for query in queries:
        if not query.strip():
            raise InputError(f"query {query!r} is empty; leave it out")


def shortened(text: str) -> str:
    """As much of a text as a line shows."""
    return textwrap.shorten(text, _WIDTH, placeholder=" ...")
