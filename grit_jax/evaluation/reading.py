"""Records of evaluation files, checked: JSONL and TSV, plain or gzipped."""

from __future__ import annotations

import math
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from grit_jax.config.jsonfile import named
from grit_jax.data.sources import packed_or_not
from grit_jax.data.text_files import read_cells, read_objects, sound
from grit_jax.errors import InputError

_TYPE_NAMES: dict[type, str] = {str: "a string", int: "a whole number", float: "a number", list: "a list"}


class EvaluationRecord(NamedTuple):
    """One line of an evaluation file.

    Attributes:
      where: File and line.
      values: Its keys and values.
    """

    where: str
    values: dict[str, Any]

    def get(self, key: str, *types: type) -> Any:
        """The value of a key; a string if no types are given.

        Raises:
          InputError: The key is missing, or its value has another type.
        """
        types = types or (str,)
        value = self.values.get(key)
        if isinstance(value, types) and not isinstance(value, bool):
            return value
        wanted = " or ".join(_TYPE_NAMES[each] for each in types)
        there = ", ".join(map(named, self.values))
        found = f"is {value!r:.60}" if key in self.values else f"is missing; there are {there:.300}"
        raise InputError(f"{self.where}: {key!r} {found}; it must be {wanted}")

    def strings(self, key: str) -> list[str]:
        """The value of a key that holds a non-empty list of strings.

        Raises:
          InputError: It holds something else.
        """
        values = self.get(key, list)
        if not values or not all(isinstance(value, str) for value in values):
            raise InputError(f"{self.where}: {key!r} is {values!r:.60}; it must be a list of strings, not empty")
        return values

    def one_or_more(self, key: str, *types: type) -> list[str]:
        """`strings`, or a list of the single value as text; errors as in `strings` and `get`."""
        return self.strings(key) if isinstance(self.values.get(key), list) else [str(self.get(key, *types))]

    def numbers(self, key: str) -> list[float]:
        """The value of a key that holds a list of finite numbers.

        Raises:
          InputError: It holds something else.
        """
        values = self.get(key, list)
        if not all(type(value) in (int, float) and math.isfinite(value) for value in values):
            raise InputError(f"{self.where}: {key!r} is {values!r:.60}; it must be a list of finite numbers")
        return values

    def number(self, key: str) -> float:
        """A finite number, or its text, as in TSV files.

        Raises:
          InputError: The value is something else.
        """
        value = self.get(key, str, int, float)
        try:
            found = float(value)
        except ValueError:
            found = math.nan
        if not math.isfinite(found):
            raise InputError(f"{self.where}: {key!r} is {value!r:.60}; it must be a finite number")
        return found


def existing(path: Path) -> Path:
    """The file, or the one with .gz.

    Raises:
      InputError: Neither exists.
    """
    file = packed_or_not(path)
    if not file.is_file():
        raise InputError(f"{path}: no such file, nor {path.name}.gz; correct the task's path")
    return file


def read_records(path: Path, *columns: str) -> list[EvaluationRecord]:
    """All records of a .jsonl or .tsv file, or of a .json file that holds a list, or of the file with .gz.

    Args:
      path: The file.
      columns: Columns that the header of a .tsv file must name.

    Raises:
      InputError: The file is missing, empty, malformed or of another type.
    """
    file = existing(path)
    suffix = Path(file.name.removesuffix(".gz")).suffix
    if suffix not in (".jsonl", ".json", ".tsv"):
        raise InputError(f"{file}: must end in .jsonl, .json or .tsv, or those with .gz")
    records = []
    for where, values in sound(read_cells(file, frozenset(columns)) if suffix == ".tsv" else read_objects(file)):
        if isinstance(values, list):
            raise InputError(f"{where}: the first row is no header; it must name {', '.join(columns)}, tabs between")
        records.append(EvaluationRecord(where, values))
    if not records:
        raise InputError(f"{file}: the file is empty; put records in it")
    return records


def split_by(groups: Sequence[Sized], values: np.ndarray) -> list[np.ndarray]:
    """Values of the members of all groups, [members, ...], as one array for each group."""
    return np.split(values, np.cumsum([len(group) for group in groups])[:-1])
