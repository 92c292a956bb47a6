"""The bar that commands show while they work."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager


@contextmanager
def progress_bar(what: str, total: int | None = None) -> Generator[Callable[[int], None]]:
    """A function that moves a bar on stderr; without a terminal there is none."""
    import rich.console
    import rich.progress

    columns = (rich.progress.TextColumn(what), rich.progress.BarColumn(), rich.progress.MofNCompleteColumn())
    console = rich.console.Console(stderr=True)
    with rich.progress.Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        yield lambda count: bar.advance(task, count)
