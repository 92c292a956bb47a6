"""Rows of evaluation files, checked: JSONL and TSV, plain or gzipped."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from grit_jax.config.jsonfile import named
from grit_jax.data.text_files import read_cells, read_objects, sound
from grit_jax.errors import InputError

_NAMES: dict[type, str] = {str: "a string", int: "a whole number", float: "a number", list: "a list"}


class Row(NamedTuple):
    """One row.

    Attributes:
      where: File and line.
      values: Its keys and values.
    """

    where: str
    values: dict[str, Any]

    def get(self, key: str, *kinds: type) -> Any:
        """The value of a key.

        Raises:
          InputError: There is none, or it is of none of the kinds.
        """
        kinds = kinds or (str,)
        value = self.values.get(key)
        if isinstance(value, kinds) and not isinstance(value, bool):
            return value
        wanted = " or ".join(_NAMES[kind] for kind in kinds)
        there = ", ".join(map(named, self.values))
        found = f"is {value!r:.60}" if key in self.values else f"is missing; there are {there:.300}"
        raise InputError(f"{self.where}: {key!r} {found}; it must be {wanted}")

    def strings(self, key: str) -> list[str]:
        """The value of a key that holds a list of strings.

        Raises:
          InputError: It holds something else.
        """
        values = self.get(key, list)
        if not values or not all(isinstance(value, str) for value in values):
            raise InputError(f"{self.where}: {key!r} is {values!r:.60}; it must be a list of strings, not empty")
        return values

    def numbers(self, key: str) -> list[float]:
        """The value of a key that holds a list of finite numbers.

        Raises:
          InputError: It holds something else.
        """
        values = self.get(key, list)
        if not all(type(value) in (int, float) and math.isfinite(value) for value in values):
            raise InputError(f"{self.where}: {key!r} is {values!r:.60}; it must be a list of finite numbers")
        return values


def existing(path: Path) -> Path:
    """The file, or the one with .gz.

    Raises:
      InputError: Neither is there.
    """
    packed = path.with_name(f"{path.name}.gz")
    for candidate in (path, packed):
        if candidate.is_file():
            return candidate
    raise InputError(f"{path}: no such file, nor {packed.name}; correct the task's path")


def read_rows(path: Path, *columns: str) -> list[Row]:
    """All rows of a .jsonl or .tsv file, or of a .json file that holds a list; or of the one with .gz.

    Args:
      path: The file.
      columns: Columns that a .tsv file must have, by its header.

    Raises:
      InputError: It is missing, of another kind, empty or malformed.
    """
    file = existing(path)
    kind = Path(file.name.removesuffix(".gz")).suffix
    if kind not in (".jsonl", ".json", ".tsv"):
        raise InputError(f"{file}: must end in .jsonl, .json or .tsv, or those with .gz")
    rows = []
    for where, values in sound(read_cells(file, frozenset(columns)) if kind == ".tsv" else read_objects(file)):
        if isinstance(values, list):
            raise InputError(f"{where}: the first row is no header; it must name {', '.join(columns)}, tabs between")
        rows.append(Row(where, values))
    if not rows:
        raise InputError(f"{file}: the file is empty; put rows in it")
    return rows


def number(row: Row, key: str) -> float:
    """A finite number, which a TSV file holds as text.

    Raises:
      InputError: It is none.
    """
    value = row.get(key, str, int, float)
    with contextlib.suppress(ValueError):
        if math.isfinite(found := float(value)):
            return found
    raise InputError(f"{row.where}: {key!r} is {value!r:.60}; it must be a finite number")


def by_row(values: np.ndarray, rows: Sequence[Sized]) -> list[np.ndarray]:
    """Values of all rows' things, [things, ...], as one array for each row."""
    return np.split(values, np.cumsum([len(row) for row in rows])[:-1])
