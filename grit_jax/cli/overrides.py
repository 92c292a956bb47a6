"""What commands that take only some `--section.key=value` arguments refuse."""

from __future__ import annotations

from collections.abc import Sequence

from grit_jax.errors import InputError


def refuse_unknown(overrides: Sequence[str], command: str, *, known: str | None) -> None:
    """Returns where every override begins with `known`; None knows none.

    Raises:
      InputError: Another one is there.
    """
    unknown = [override for override in overrides if known is None or not override.startswith(known)]
    if unknown:
        raise InputError(f"{command} does not know {' '.join(unknown)}; see grit-jax {command} --help")
