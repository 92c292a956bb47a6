"""Puts results of benchmarks into the documentation: tables between marks in a page, and drawings beside it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grit_jax import files
from grit_jax.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#2563a8", "#d97706", "#3f8f5f", "#8b5cf6")


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def print_tables(tables: Mapping[str, str]) -> None:
    """Prints each table under its name."""
    for name, table in tables.items():
        print(f"\n{name}\n\n{table}", end="")


def publish(page: Path, tables: Mapping[str, str], *paths: Path) -> None:
    """Puts tables into a page, and copies files and folders to the folder of its name beside it.

    Each table replaces the text between `<!-- NAME -->` and `<!-- end of NAME -->`.

    Raises:
      InputError: The page has no such marks; nothing is changed.
    """
    text = page.read_text()
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, found, rest = text.partition(begin)
        _, also_found, after = rest.partition(end)
        if not (found and also_found):
            raise InputError(f"{page}: has no marks for the table {name}; write {begin} and {end} into it")
        text = f"{before}{begin}\n\n{table}\n{end}{after}"
    files.write_text(page, text)
    folder = page.with_suffix("")
    folder.mkdir(exist_ok=True)
    for path in paths:
        if path.is_dir():
            shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
        else:
            shutil.copy(path, folder)


def draw_differences(panel: Any, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Draws relative differences with their intervals, each over its margin if it has one."""
    margins = [(row, 100 * one["margin"]) for row, one in enumerate(found.values()) if "margin" in one]
    for row, margin in margins:
        panel.fill_betweenx([row - 0.5, row + 0.5], -margin, margin, color="#dddddd", zorder=0, linewidth=0)
    for row, one in enumerate(found.values()):
        for bounds, width in ((one["interval"], 3), (one.get("run_interval"), 1)):
            if bounds:
                panel.plot([100 * bound for bound in bounds], [row, row], color=COLOURS[0], linewidth=width)
        panel.plot(100 * one["difference"], row, "o", color=COLOURS[0], markersize=8)
    panel.axvline(0, color="#888888", linewidth=1)
    panel.set(yticks=range(len(found)), yticklabels=list(found), ylim=(len(found) - 0.5, -0.5))
    panel.set_xlabel("relative difference, %" + (" (grey: margin)" if margins else ""))


def save_drawing(path: Path, drawing: Figure) -> None:
    """Writes a drawing, its panels without frames and with a light grid."""
    for panel in drawing.axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
    drawing.savefig(path, dpi=110)
