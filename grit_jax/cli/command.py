"""How commands declare themselves, and arguments and helpers that several share."""

from __future__ import annotations

import argparse
import dataclasses
import textwrap
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from grit_jax.config.ranges import POSITIVE, Range, require
from grit_jax.errors import InputError

_DOCUMENT_WIDTH = 100  # characters


class Argument(NamedTuple):
    """An argument of a command: parameters of `ArgumentParser.add_argument`, and the range of a number."""

    names: tuple[str, ...]
    options: dict[str, Any]
    allowed: Range | None

    def check(self, args: argparse.Namespace) -> None:
        """Checks a parsed value; raises `InputError` if it is out of range."""
        if self.allowed:
            (name,) = self.names
            require(name, getattr(args, name.lstrip("-").replace("-", "_")), self.allowed)


def argument(*names: str, allowed: Range | None = None, **options: Any) -> Argument:
    """Declares an argument."""
    return Argument(names, options, allowed)


def flag(name: str, help: str) -> Argument:
    """Declares an argument without a value."""
    return argument(name, action="store_true", help=help)


def repeated(name: str, metavar: str, help: str) -> Argument:
    """Declares an argument that may be repeated; without it the list is empty."""
    return argument(name, action="append", default=[], metavar=metavar, help=f"{help}; may be repeated")


def number(name: str, metavar: str, help: str, default: float | None = None, allowed: Range = POSITIVE) -> Argument:
    """Declares a number of its default's type, which the help shows; a whole number without a default."""
    shown = help if default is None else f"{help} (%(default)s)"
    kind = int if default is None else type(default)
    return argument(name, type=kind, default=default, metavar=metavar, allowed=allowed, help=shown)


@dataclasses.dataclass
class Command:
    """A command, or a tool of a command.

    Attributes:
      help: What it does, in a line.
      run: Takes its arguments and returns the exit code; None for a command that only has tools.
      arguments: Its arguments; those in a tuple exclude each other.
      overrides: Prefix of the `--section.key=value` arguments that it takes, such as `--mesh.`; empty for any, None for
        none. `run` gets them as `args.overrides`.
      tools: Its sub-commands by name.
      examples: Sample calls for its help, one per line.
    """

    help: str
    run: Callable[[argparse.Namespace], int] | None = None
    arguments: Sequence[Argument | tuple[Argument, ...]] = ()
    overrides: str | None = None
    tools: Mapping[str, Command] = dataclasses.field(default_factory=dict)
    examples: str = ""

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        """Adds its arguments and tools to a parser."""
        for entry in self.arguments:
            alone = isinstance(entry, Argument)
            group = parser if alone else parser.add_mutually_exclusive_group()
            for one in [entry] if alone else entry:
                group.add_argument(*one.names, **one.options)
        if self.tools:
            tools = parser.add_subparsers(dest="tool", metavar="TOOL", required=True)
            for name, tool in self.tools.items():
                tool.add_to(tools.add_parser(name, help=tool.help, description=tool.help, allow_abbrev=False))

    def execute(self, args: argparse.Namespace, overrides: list[str], name: str) -> int:
        """Checks parsed and leftover arguments, and runs the command, or the tool that they name.

        Raises:
          InputError: A number is out of range, or an argument is unknown.
        """
        if self.tools:
            return self.tools[args.tool].execute(args, overrides, f"{name} {args.tool}")
        if unknown := [text for text in overrides if self.overrides is None or not text.startswith(self.overrides)]:
            raise InputError(f"{name} does not know {' '.join(unknown)}; see grit-jax {name} --help")
        for entry in self.arguments:
            for one in [entry] if isinstance(entry, Argument) else entry:
                one.check(args)
        assert self.run
        args.overrides = overrides
        return self.run(args)


def command(
    help: str, *arguments: Argument | tuple[Argument, ...], overrides: str | None = None, examples: str = ""
) -> Callable[[Callable[[argparse.Namespace], int]], Command]:
    """Turns the function that runs a command into a `Command`."""
    return lambda run: Command(help, run, arguments, overrides, examples=examples)


MODEL = argument("model", metavar="MODEL", help="run folder, checkpoint or Hugging Face folder")
MODEL_OF_STORE = argument("model", metavar="MODEL", help="the model that made the store")
STORE = argument("store", metavar="STORE", help="folder from grit-jax index")
RUN = argument("run", metavar="RUN", help="run folder, on a disk or in a bucket")
STEP = argument("--step", type=int, metavar="N", help="checkpoint of a run (default: the newest)")
QUERY_INSTRUCTION = argument("--instruction", default="", help="instruction of the queries; read, not pooled")
STOP = repeated("--stop", "TEXT", "end before this text")
JSON = flag("--json", "print one JSON object and nothing else")


def refuse_empty(queries: Iterable[str]) -> None:
    """Raises `InputError` if a query is blank."""
    for query in queries:
        if not query.strip():
            raise InputError(f"query {query!r} is empty; leave it out")


def shortened(text: str) -> str:
    """As much of a text's beginning as fits on a line."""
    return textwrap.shorten(text, _DOCUMENT_WIDTH, placeholder=" ...")


@contextmanager
def progress_bar(what: str, total: int | None = None) -> Generator[Callable[[int], None]]:
    """Yields a function that advances a bar on stderr; shows none if that is not a terminal."""
    import rich.console
    import rich.progress

    columns = (rich.progress.TextColumn(what), rich.progress.BarColumn(), rich.progress.MofNCompleteColumn())
    console = rich.console.Console(stderr=True)
    with rich.progress.Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        yield lambda count: bar.advance(task, count)
