"""What a terminal shows of a run."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager

import jax
import rich.console
import rich.progress

from grit_jax.train.callbacks.callback import Callback, Run


class Display(Callback):
    """A live line on a terminal, a plain line every few steps elsewhere; on host 0 only.

    Args:
      every: Steps between plain lines.
    """

    def __init__(self, every: int):
        self._every = every
        self._console = rich.console.Console(quiet=jax.process_index() != 0, highlight=False, soft_wrap=True)

    @contextmanager
    def running(self, run: Run) -> Generator[None]:
        """Shows the live line."""
        self._started, self._live = time.monotonic(), None
        if not self._console.is_terminal:
            yield
            return
        columns = ("{task.fields[losses]}", rich.progress.BarColumn(), rich.progress.MofNCompleteColumn())
        self._live = rich.progress.Progress(*columns, "{task.fields[speed]}", console=self._console)
        steps = run.trainer.config.train.steps
        self._task = self._live.add_task("", total=steps, completed=run.start, losses="compiling", speed="")
        with self._live:
            yield

    def said(self, run: Run, text: str) -> None:
        """Prints a line above the live one."""
        self._console.print(text)

    def step_ended(self, run: Run, step: int, values: dict[str, float]) -> None:
        """Shows the metrics of a step."""
        elapsed, steps = time.monotonic() - self._started, run.trainer.config.train.steps
        left = elapsed / max(1, step - run.start) * (steps - step)
        losses = "  ".join(f"{name} {values[f'loss/{name}']:.3f}" for name in run.trainer.streams)
        speed = f"{values['tokens_per_second']:,.0f} tokens/s  {left // 60:.0f}:{left % 60:02.0f} left"
        if self._live:
            self._live.update(self._task, completed=step, losses=losses, speed=speed)
        elif run.reached(step, self._every) or step == run.start + 1:
            self._console.print(f"step {step}/{steps}  {losses}  {speed}")
