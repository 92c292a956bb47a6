"""A hook of mkdocs that writes the reference of the commands from their parsers.

A line `::: commands` in a page becomes a section for every command. Parsers are made without JAX.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_MARKER = "::: commands"
_COLUMNS = 98  # that fit between both columns of the site on a desktop


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replaces the marker."""
    return markdown.replace(_MARKER, "\n".join(_sections())) if _MARKER in markdown else markdown


def _sections() -> Iterator[str]:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    os.environ["COLUMNS"] = str(_COLUMNS)  # what argparse wraps its help to

    from grit_jax.cli.main import make_parser

    parser = make_parser()
    yield from _section("grit-jax", parser, level=2)
    for name, command in _commands(parser):
        yield from _section(f"grit-jax {name}", command, level=2)
        for tool, sub_command in _commands(command):
            yield from _section(f"grit-jax {name} {tool}", sub_command, level=3)


def _commands(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.items()


def _section(name: str, parser: argparse.ArgumentParser, *, level: int) -> Iterator[str]:
    text = re.sub(r"\x1b\[[0-9;]*m", "", parser.format_help())  # newer Pythons colour it on a terminal
    text = "\n".join(map(_wrapped, text.rstrip().splitlines()))
    yield f"{'#' * level} {name}\n\n```text\n{text}\n```\n"


def _wrapped(line: str) -> str:
    """A line of the help; a command that is too long goes on in the next line, before an option."""
    if len(line) <= _COLUMNS or not line.startswith("  grit-jax "):
        return line
    end = line.rindex(" --", 0, _COLUMNS - len(" \\"))
    return f"{line[:end]} \\\n     {line[end:]}"
