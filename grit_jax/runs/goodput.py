"""Where a run's time goes, over all its sessions: useful steps against everything else.

A session is one process's work on a run, from start to end. It appends its seconds by cause to `goodput.jsonl`, whose
lines add up to the run's.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

Cause = Literal[
    "useful",  # steps that count
    "startup",  # opening data and model before the first step of the run
    "compile",  # compiling the step
    "data",  # devices waiting for a batch
    "checkpoint",  # saving, as long as steps wait for it
    "evaluation",  # evaluation and gradient norms
    "skipped",  # steps whose update was not finite
    "restart",  # opening data, model and checkpoint again, and repeated steps
    "down",  # no process running, between an end and the next start
]
CAUSES: tuple[Cause, ...] = get_args(Cause)


class Clock:
    """The seconds of one session by cause; the rest is useful.

    Args:
      began: When the session started, by `time.monotonic`.
      from_step: Updates done before it.
    """

    def __init__(self, *, began: float, from_step: int):
        self.began, self.from_step = began, from_step
        self.session = time.time() - (time.monotonic() - began)
        self._spent: dict[str, float] = {}
        self._inside = 0.0  # seconds already counted within the open `spent`

    @contextmanager
    def spent(self, cause: Cause) -> Generator[None]:
        """Counts the time inside for a cause, except time counted within for another."""
        outer, self._inside = self._inside, 0.0
        begun = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - begun
            self._spent[cause] = self._spent.get(cause, 0.0) + seconds - self._inside
            self._inside = outer + seconds

    def add(self, cause: Cause, seconds: float) -> None:
        """Counts past seconds for a cause."""
        self._spent[cause] = self._spent.get(cause, 0.0) + seconds
        self._inside += seconds

    def line(self, step: int) -> dict[str, Any]:
        """The line of `goodput.jsonl` for the session so far."""
        total = time.monotonic() - self.began
        useful = max(0.0, total - sum(self._spent.values()))
        return {
            "session": self.session,
            "time": time.time(),
            "from_step": self.from_step,
            "step": step,
            "seconds": {"useful": useful, **self._spent},
        }


@dataclasses.dataclass(frozen=True)
class Goodput:
    """Where the time of a run went.

    Attributes:
      seconds: Seconds by cause.
      sessions: Number of processes that worked on the run.
    """

    seconds: Mapping[str, float]
    sessions: int

    @property
    def wall_seconds(self) -> float:
        """Seconds from the first start to the last line of a log."""
        return sum(self.seconds.values())

    @property
    def ratio(self) -> float:
        """Useful seconds over wall seconds; 0 before there are any."""
        return self.seconds.get("useful", 0.0) / self.wall_seconds if self.wall_seconds else 0.0


def goodput_of(lines: Iterable[Mapping[str, Any]]) -> Goodput:
    """Adds up the sessions of a run.

    Steps that a later session repeats are lost: their share of the first session's useful time counts as `restart`,
    like the time before the first step of a session that resumes.
    """
    newest = {line["session"]: line for line in lines}
    sessions = [newest[session] for session in sorted(newest)]
    total: dict[str, float] = dict.fromkeys(CAUSES, 0.0)
    for number, line in enumerate(sessions):
        spent = dict(line["seconds"])
        resumed = min((later["from_step"] for later in sessions[number + 1 :]), default=line["step"])
        done = line["step"] - line["from_step"]
        lost = min(done, max(0, line["step"] - resumed))
        if done > 0:
            wasted = spent.get("useful", 0.0) * lost / done
            spent["useful"] = spent.get("useful", 0.0) - wasted
            spent["restart"] = wasted
        if number:
            spent["restart"] = spent.get("restart", 0.0) + spent.pop("startup", 0.0)
            total["down"] += max(0.0, line["session"] - sessions[number - 1]["time"])
        for cause, seconds in spent.items():
            total[cause] = total.get(cause, 0.0) + seconds
    return Goodput(total, len(sessions))
