"""Logs of a run: one JSON object per line, in one file on a disk, in parts in a bucket.

An object store cannot append: there `metrics.jsonl` is `metrics-000000.jsonl`, `metrics-000001.jsonl` and so on, and
the newest is written again to grow. Readers accept both forms, even mixed.
"""

from __future__ import annotations

import io
import json
import math
import re
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from grit_jax import files

PART_LINES = 500
PART_SECONDS = 10.0  # between writes of the newest part

Line = Mapping[str, Any]


class LineWriter:
    """Appends to a log; in a bucket a thread writes the new lines every few seconds.

    Args:
      path: Name of the log, which ends in `.jsonl`.
      keep: Whether an earlier line stays; one cut short by a crash never does.
    """

    def __init__(self, path: files.PathLike, *, keep: Callable[[Line], bool] = lambda line: True):
        _cut(path, keep)
        self._writer = _PartWriter(path) if files.is_bucket(path) else _FileWriter(Path(path))

    def write(self, line: Line) -> None:
        """Appends a line; infinities and NaN become null."""
        self._writer.write(_encode(line))

    def close(self) -> None:
        """Writes the remaining lines."""
        self._writer.close()


def read_lines(path: files.PathLike) -> list[dict[str, Any]]:
    """The objects of a log, in order, without null values and lines cut short by a crash; a missing log is empty."""
    return [line for lines in _read_all(path).values() for line in lines]


class _FileWriter:
    """Creates the file with its first line, and syncs every line to the disk."""

    def __init__(self, path: Path):
        self._path = path
        self._file: io.FileIO | None = None

    def write(self, text: str) -> None:
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("ab", buffering=0)
        file, rest = self._file, text.encode()

        def append() -> None:
            nonlocal rest
            while rest:  # continue a failed write from what the disk has
                rest = rest[file.write(rest) :]

        files.retrying(self._path, append)

    def close(self) -> None:
        if self._file:
            self._file.close()


class _PartWriter:
    """Writes parts in a thread, so that only `close` waits for the network."""

    def __init__(self, path: files.PathLike):
        self._path = path
        numbers = [number for name in _part_names(path) if (number := _part_number(path, name)) is not None]
        self._number = max(numbers, default=-1) + 1
        self._lines: list[str] = []
        self._written = 0  # lines of this part already written
        self._lock, self._wake, self._closed = threading.Lock(), threading.Event(), False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name=f"log {path}", daemon=True)
        self._thread.start()

    def write(self, text: str) -> None:
        with self._lock:
            self._lines.append(text)

    def close(self) -> None:
        self._closed = True
        self._wake.set()
        self._thread.join()
        if self._error:
            raise self._error

    def _run(self) -> None:
        last = False
        while not last:
            self._wake.wait(PART_SECONDS)
            last = self._closed  # read before the lines, as more may come during the write
            try:
                self._flush()
                self._error = None
            except (OSError, files.UnreachableError) as error:  # the next turn tries again, with more lines
                self._error = error

    def _flush(self) -> None:
        while True:
            with self._lock:
                lines = self._lines[:PART_LINES]
            if len(lines) > self._written:
                files.write_text(_part(self._path, self._number), "".join(lines))
                self._written = len(lines)
            if len(lines) < PART_LINES:
                return
            with self._lock:
                del self._lines[:PART_LINES]
            self._number, self._written = self._number + 1, 0


def _encode(line: Line) -> str:
    def finite(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps({key: finite(value) for key, value in line.items()}, ensure_ascii=False) + "\n"


def _part(path: files.PathLike, number: int) -> str:
    return f"{str(path).removesuffix('.jsonl')}-{number:06d}.jsonl"


def _split(path: files.PathLike) -> tuple[str, str]:
    folder, _, name = str(path).rpartition("/")
    return folder or ".", name


def _part_number(path: files.PathLike, name: str) -> int | None:
    found = re.fullmatch(rf"{re.escape(_split(path)[1].removesuffix('.jsonl'))}-(\d{{6,}})\.jsonl", name)
    return found and int(found[1])


def _part_names(path: files.PathLike) -> list[str]:
    """Names of the existing parts, by number."""
    found = [name for name in files.names(_split(path)[0]) if _part_number(path, name) is not None]
    return sorted(found, key=lambda name: _part_number(path, name) or 0)


def _read_all(path: files.PathLike) -> dict[str, list[dict[str, Any]]]:
    """The lines of each file of the log, in order."""
    folder, _ = _split(path)
    paths = [str(path), *(files.join(folder, name) for name in _part_names(path))]
    with ThreadPoolExecutor(16) as pool:
        texts = dict(zip(paths, pool.map(files.read_text, paths)))
    return {path: _decode(text) for path, text in texts.items() if text is not None}


def _decode(text: str) -> list[dict[str, Any]]:
    lines = []
    for line in text.split("\n"):
        try:
            row = json.loads(line) if line else None
        except ValueError:  # cut short by a crash
            continue
        if row is not None:
            lines.append({key: value for key, value in row.items() if value is not None})
    return lines


def _cut(path: files.PathLike, keep: Callable[[Line], bool]) -> None:
    """Removes lines; an interruption loses no line to keep."""
    for name, lines in _read_all(path).items():
        kept = "".join(_encode(line) for line in lines if keep(line))
        if kept == files.read_text(name):
            continue
        if kept or not files.is_bucket(path):
            files.write_text(name, kept)
        else:
            files.remove(name)
