"""The numbers of a run, read from the logs in its folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from grit_jax import files
from grit_jax.runs import folder
from grit_jax.runs.goodput import Goodput, goodput_of
from grit_jax.runs.logs import read_lines

STREAMS = ("embedding", "generative")

Lines = Sequence[Mapping[str, Any]]


class History(NamedTuple):
    """The logs of a run so far, one mapping per line.

    Attributes:
      metrics: Metrics of each step.
      bad_batches: Skipped updates and spikes.
      times: Seconds by cause, for each session.
    """

    metrics: Lines
    bad_batches: Lines
    times: Lines

    @property
    def goodput(self) -> Goodput:
        """Where the time went."""
        return goodput_of(self.times)


def read_history(run: files.PathLike) -> History:
    """Reads the logs of a run folder; missing ones are empty."""
    return History(*(read_lines(files.join(run, log)) for log in (folder.METRICS, folder.BAD_BATCHES, folder.GOODPUT)))


def series(lines: Lines, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the lines that have a metric."""
    found = [(line["step"], line[name]) for line in lines if name in line]
    steps, values = zip(*found) if found else ((), ())
    return np.array(steps, float), np.array(values, float)


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean of each value and up to `width - 1` values before it."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def file_losses(values: Mapping[str, Any], stream: str) -> dict[str, float]:
    """The loss of each file of a stream, by its name, among a step's metrics."""
    start = f"loss/{stream}/"
    return {name.removeprefix(start): value for name, value in values.items() if name.startswith(start)}


def scorecard_names(lines: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names of the scorecard's metrics in some lines, without `scorecard/`; those of whole skills come last."""
    found = dict.fromkeys(name for line in lines for name in line if name.startswith("scorecard/"))
    names = [name.removeprefix("scorecard/") for name in found]
    return sorted(names, key=lambda name: name in (*STREAMS, "both"))


def duration(seconds: float) -> str:
    """A length of time in its two largest units."""
    minutes, hours = seconds / 60, seconds / 3600
    if seconds < 60:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{int(minutes)} min {seconds % 60:.0f} s"
    return f"{int(hours)} h {int(minutes % 60)} min" if hours < 48 else f"{int(hours // 24)} d {int(hours % 24)} h"
