"""Losses far above the recent ones."""

from __future__ import annotations

import collections
import math
import statistics
from collections.abc import Mapping

WINDOW = 64
_FEWEST = 16
_SCALE = 1.4826  # of the median absolute deviation, to the standard deviation of a normal distribution
_SMALLEST = 0.01  # scale, as a share of the median: smaller deviations of a loss that hardly moves mean nothing


def robust_z(value: float, window: collections.deque[float]) -> float:
    """(value - median) / (1.4826 * median absolute deviation), which one outlier in the window does not move."""
    middle = statistics.median(window)
    spread = _SCALE * statistics.median(abs(x - middle) for x in window)
    return (value - middle) / max(spread, _SMALLEST * abs(middle), 1e-9)


class Spikes:
    """Finds the first step of each spike.

    A batch of embedding data is compared with the last ones of its file if there are enough, and otherwise with those
    of all files.

    Args:
      threshold: Smallest robust z-score of a spike.
    """

    def __init__(self, threshold: float):
        self._threshold = threshold
        self._windows: dict[str, collections.deque[float]] = collections.defaultdict(
            lambda: collections.deque(maxlen=WINDOW)
        )
        self._spiking = False

    def find(self, values: Mapping[str, float]) -> tuple[str, float, float] | None:
        """Takes in a step's metrics.

        Returns:
          Name of the loss, its value and its score if the step is a spike and the one before was not.
        """
        found = None
        for stream in ("loss/embedding", "loss/generative"):
            value = values.get(stream, math.nan)
            if not math.isfinite(value):
                continue
            names = [stream]
            if stream == "loss/embedding":
                names += [name for name in values if name.startswith(f"{stream}/")]
            compared = self._windows[names[-1] if len(self._windows[names[-1]]) >= _FEWEST else stream]
            if len(compared) >= _FEWEST and (score := robust_z(value, compared)) >= self._threshold:
                found = found or (stream, value, score)
            for name in names:
                self._windows[name].append(value)
        first, self._spiking = found is not None and not self._spiking, found is not None
        return found if first else None
