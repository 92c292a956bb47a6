"""Configs from YAML and `--section.key=value`, and back.

A config file holds one mapping per section of `Config`. Values on the command line override the file, and the file
overrides the defaults.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import textwrap
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from grit_jax import files
from grit_jax.config.settings import Config
from grit_jax.errors import InputError

T = TypeVar("T")

_LONGEST_MESSAGE = 500  # characters of a library's message, which may quote a whole value
_LARGEST = (1 << 63) - 1  # any whole number


def load_config(path: str | os.PathLike[str], overrides: list[str] | None = None) -> Config:
    """Reads a YAML config and applies `--section.key=value` overrides.

    Raises:
      InputError: Missing file, malformed YAML, unknown key (with a suggestion), or a value of the wrong type.
    """
    try:
        text = files.read_text(path)
    except OSError as error:
        raise InputError(f"config file {path}: {error.strerror or error}") from error
    if text is None:
        raise InputError(f"config file {path}: no such file")
    return parse_config(text, overrides, source=str(path))


def parse_config(text: str, overrides: list[str] | None = None, *, source: str = "config") -> Config:
    """Builds a `Config` from YAML text; see `load_config`."""
    import yaml

    mapping = parse_mapping(text, source=source)
    if _drop_removed(mapping, source):
        text = yaml.safe_dump(mapping)
    overrides = [override for override in overrides or [] if not _is_removed(override)]
    _check_keys(mapping, Config, source)
    for override in overrides:
        _check_override(override)

    import jsonargparse

    parser = _parser(Config, takes_file=True)
    try:
        namespace = parser.parse_args([f"--config={text}", *overrides] if mapping else overrides)
        sections = parser.instantiate(namespace)
        return Config(**{section.name: sections[section.name] for section in dataclasses.fields(Config)})
    except (jsonargparse.ArgumentError, ValueError, OverflowError) as error:
        blamed = source
        if overrides:
            parse_config(text, source=source)  # blames the file if the file alone is wrong
            blamed = "command line"
        raise InputError(f"{blamed}: {_one_line(error)}") from error


@functools.cache
def _parser(section: type, *, takes_file: bool = False) -> Any:
    """The parser of a section, cached as it takes longer to build than to use."""
    import jsonargparse

    parser = jsonargparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    if takes_file:
        parser.add_argument("--config", action="config")
    parser.add_class_arguments(section, None)
    return parser


def _one_line(error: Exception | str) -> str:
    return textwrap.shorten(str(error), _LONGEST_MESSAGE, placeholder=" ...")


def parse_mapping(text: str, *, source: str) -> dict[str, Any]:
    """The mapping in a YAML text; empty for an empty text.

    Raises:
      InputError: Malformed YAML, or not a mapping; the message starts with `source` and the line.
    """
    import yaml

    try:
        mapping = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark else source
        raise InputError(f"{where}: not valid YAML: {_one_line(getattr(error, 'problem', error))}") from error
    except (ValueError, RecursionError) as error:  # impossible dates, thousands of digits, deep nesting
        raise InputError(f"{source}: not valid YAML: {_one_line(error)}") from error
    if not isinstance(mapping, dict):
        raise InputError(f"{source}: expected a mapping of sections, found {type(mapping).__name__}")
    return mapping


def from_mapping(section: type[T], values: Mapping[str, Any], *, source: str) -> T:
    """A flat dataclass from keys and values read from YAML.

    Raises:
      InputError: Unknown key (with a suggestion), missing key, or a value of the wrong type.
    """
    _check_keys(dict(values), section, source)
    needed = [
        field.name for field in dataclasses.fields(section)  # ty: ignore[invalid-argument-type]
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]  # fmt: skip
    for name in needed:
        if name not in values:
            raise InputError(f"{source}: no key {name!r}; give all of {', '.join(needed)}")

    import jsonargparse

    try:
        return section(**vars(_parser(section).parse_object(dict(values))))
    except (jsonargparse.ArgumentError, ValueError) as error:
        raise InputError(f"{source}: {_one_line(error)}") from error


def dump_config(config: Config) -> str:
    """The config as YAML text that `parse_config` reads back to an equal `Config`."""
    import yaml

    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def config_differences(old: Config, new: Config, *, ignore: tuple[str, ...] = ()) -> list[str]:
    """Lines `key: old -> new` for every value that differs, except keys that start with one of `ignore`."""
    old_values, new_values = flat_values(old), flat_values(new)
    return [
        f"{key}: {old_values.get(key)!r} -> {new_values.get(key)!r}"
        for key in sorted(old_values | new_values)
        if old_values.get(key) != new_values.get(key) and not key.startswith(ignore)
    ]


def flat_values(config: Config) -> dict[str, Any]:
    """The values of all keys, such as `train.steps`."""
    return _flatten(dataclasses.asdict(config))


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _check_keys(mapping: dict[str, Any], section: type, source: str, prefix: str = "") -> None:
    for key, value in mapping.items():
        where, annotation = f"{prefix}{key}", _field_type(section, str(key), source, prefix)
        types = typing.get_args(annotation) or (annotation,)
        if value is None and type(None) not in types:
            raise InputError(f"{source}: {where} has no value; give it one, or remove the key")
        if isinstance(value, int) and not -_LARGEST <= value <= _LARGEST:
            raise InputError(f"{source}: {where} is a number beyond 64 bits; give a smaller one")
        is_list = typing.get_origin(annotation) is list
        for inner in filter(dataclasses.is_dataclass, types):
            if not is_list and value is not None:
                _check_section(value, inner, source, where)
            for index, entry in enumerate(value if is_list and isinstance(value, list) else ()):
                _check_section(entry, inner, source, f"{where}[{index}]", may_be_empty=False)


def _check_section(values: Any, section: Any, source: str, where: str, *, may_be_empty: bool = True) -> None:
    if not isinstance(values, dict) or not (values or may_be_empty):
        known = ", ".join(field.name for field in dataclasses.fields(section))
        raise InputError(f"{source}: {where} is {values!r:.60}; it must be a mapping with one of {known}")
    _check_keys(values, section, source, f"{where}.")


# Removed keys in configs of earlier runs: the value that equals today's behaviour (None: any value), and the reason.
_REMOVED = {
    "model.generative_attention": ("causal", "the generative pass is causal, or a token would see its own target"),
    "data.workers": None,
}


def _drop_removed(mapping: dict[str, Any], source: str) -> bool:
    """Removes keys in `_REMOVED` from a mapping, and returns whether there were any.

    Raises:
      InputError: Such a key has another value.
    """
    found = False
    for key in _REMOVED:
        section, name = key.split(".")
        values = mapping.get(section)
        if isinstance(values, dict) and name in values:
            _check_removed(key, values.pop(name), source)
            found = True
    return found


def _is_removed(override: str) -> bool:
    """Whether an override sets a removed key; raises as `_drop_removed` does."""
    key, _, value = override.removeprefix("--").partition("=")
    if key in _REMOVED:
        _check_removed(key, value, "command line")
    return key in _REMOVED


def _check_removed(key: str, value: Any, source: str) -> None:
    allowed, reason = _REMOVED[key] or (value, "")
    if value != allowed:
        raise InputError(f"{source}: {key}={value} is no longer possible: {reason}; remove the key")


def _check_override(override: str) -> None:
    name, separator, _ = override.partition("=")
    if not name.startswith("--") or not separator:
        raise InputError(f"cannot read {override!r}; write overrides as --section.key=value")
    section, prefix = Config, ""
    for key in name[2:].split("."):
        if not dataclasses.is_dataclass(section):
            return  # an entry of a mapping, such as data.num_samples
        section = _field_type(section, key, "command line", prefix)
        prefix += f"{key}."


def _field_type(section: type, key: str, source: str, prefix: str) -> Any:
    types = typing.get_type_hints(section)
    if key not in types:
        close = difflib.get_close_matches(key, types, n=1)
        hint = f"did you mean {prefix + close[0]!r}?" if close else f"known here: {', '.join(types)}"
        raise InputError(f"{source}: unknown key {prefix + key!r:.120}; {hint}")
    return types[key]
