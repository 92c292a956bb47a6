"""Reads JSON files of other programs, checking each key's type and range; errors name file, key and value."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

from grit_jax import files
from grit_jax.config.ranges import Range
from grit_jax.errors import InputError

REMEDY = "correct it or copy the file again"
SIZE = Range("must be from 1 to 2147483647", lambda value: 1 <= value < 1 << 31)

_NEEDED: Any = object()  # the default of a required key
_SHORT = reprlib.Repr()
_LONGEST_NAME = 120  # characters
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 60, 60


def shown(value: Any) -> str:
    """A value in an error message, cut to a few dozen characters."""
    return _SHORT.repr(value)


def named(name: str) -> str:
    """A name from a file in an error message; as in `shown` if it is long or not printable."""
    return name if name.isprintable() and len(name) <= _LONGEST_NAME else shown(name)


def parse(content: bytes, *, source: str) -> Section:
    """The object in a JSON file's content.

    Raises:
      InputError: It is empty, not UTF-8, not JSON, nested too deeply, or not an object.
    """
    try:
        values = json.loads(content.decode("utf-8-sig"))
    except RecursionError as error:
        raise InputError(f"{source}: cannot be read: it is nested too deeply; copy the file again") from error
    except ValueError as error:  # also for bytes that are not UTF-8, and numbers with thousands of digits
        reason = "it is empty" if not content.strip() else error
        raise InputError(f"{source}: cannot be read: {reason}; copy the file again") from error
    if not isinstance(values, dict):
        raise InputError(f"{source}: holds {shown(values)}, not an object with keys; copy the file again")
    return Section(values, source=source)


def read(path: files.PathLike) -> Section:
    """The object of a JSON file, on a disk or in a bucket.

    Raises:
      InputError: It is missing, cannot be read, or is not valid for `parse`.
    """
    try:
        files.refuse_special(path)
        content = files.read_bytes(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    if content is None:
        raise InputError(f"{path}: no such file")
    return parse(content, source=str(path))


class Section:
    """An object of a JSON file.

    A missing key takes its `default`, or is an error without one; `null=True` allows null.

    Attributes:
      values: Its keys and raw values.
      source: The file's name, for messages.
    """

    def __init__(self, values: Mapping[str, Any], *, source: str, prefix: str = ""):
        self.values, self.source, self._prefix = values, source, prefix

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def names(self) -> list[str]:
        """Its keys; checks that they hold whole characters."""
        for key in self.values:
            self._refuse_half_characters(key, key)
        return list(self.values)

    def error(self, key: str, problem: str) -> InputError:
        """The error for a key's value: file, key, value, then `problem`."""
        return InputError(f"{self.source}: {self._named(key)}={shown(self.values.get(key))} {problem}")

    def _named(self, key: str) -> str:
        return named(f"{self._prefix}{key}")

    def integer(self, key: str, allowed: Range = SIZE, *, default: Any = _NEEDED, null: bool = False) -> Any:
        """A whole number within a range."""
        return self._number(key, int, "a whole number", allowed, default, null)

    def number(self, key: str, allowed: Range, *, default: Any = _NEEDED, null: bool = False) -> Any:
        """A finite number within a range, as a float."""
        value = self._number(key, (int, float), "a number", allowed, default, null)
        return None if value is None else float(value)

    def flag(self, key: str, *, default: Any = _NEEDED) -> Any:
        """True or false."""
        return self._typed(key, bool, "true or false", default, False)

    def text(self, key: str, *, default: Any = _NEEDED, null: bool = False) -> Any:
        """A string of whole characters."""
        value = self._typed(key, str, "a string", default, null)
        self._refuse_half_characters(key, value)
        return value

    def choice(self, key: str, choices: Iterable[str], *, default: Any = _NEEDED) -> Any:
        """One of some strings."""
        value = self.text(key, default=default)
        if value not in choices:
            raise self.error(key, f"is not supported; supported are {', '.join(choices)}")
        return value

    def texts(self, key: str, *, default: Any = _NEEDED, null: bool = False) -> Any:
        """A list of strings."""
        value = self._typed(key, list, "a list of strings", default, null)
        for entry in value or ():
            if not isinstance(entry, str):
                raise self.error(key, f"must be a list of strings; {REMEDY}")
            self._refuse_half_characters(key, entry)
        return value

    def integers(self, key: str, allowed: Range, *, length: int | None = None) -> list[int]:
        """A list of whole numbers within a range, of `length` entries if given."""
        value = self._typed(key, list, "a list of whole numbers", _NEEDED, False)
        if any(type(entry) is not int or not allowed.holds(entry) for entry in value):
            raise self.error(key, f"must be a list of whole numbers, each of which {allowed.text}; {REMEDY}")
        if length is not None and len(value) != length:
            raise self.error(key, f"must have {length} entries; {REMEDY}")
        return value

    def section(self, key: str, *, default: Any = _NEEDED, null: bool = False) -> Any:
        """An object, as a Section."""
        value = self._typed(key, dict, "an object with keys", default, null)
        return Section(value, source=self.source, prefix=f"{self._prefix}{key}.") if isinstance(value, dict) else value

    def _typed(self, key: str, types: Any, what: str, default: Any, null: bool) -> Any:
        if key not in self.values:
            if default is _NEEDED:
                raise InputError(f"{self.source}: {self._named(key)} is missing; add it or copy the file again")
            return default
        value = self.values[key]
        if value is None and null:
            return None
        if not isinstance(value, types) or (isinstance(value, bool) and types is not bool):
            raise self.error(key, f"must be {what}{' or null' if null else ''}; {REMEDY}")
        return value

    def _number(self, key: str, types: Any, what: str, allowed: Range, default: Any, null: bool) -> Any:
        value = self._typed(key, types, what, default, null)
        if key in self.values and value is not None and (fault := allowed.fault(value)):
            raise self.error(key, f"{fault}; {'null is allowed too; ' if null else ''}{REMEDY}")
        return value

    def _refuse_half_characters(self, key: str, value: str | None) -> None:
        try:
            (value or "").encode()
        except UnicodeEncodeError as error:
            raise self.error(key, f"holds half of a surrogate pair, not a character; {REMEDY}") from error
