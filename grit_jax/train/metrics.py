"""Where a run's numbers go: metrics.jsonl, trackers and the display; and model FLOPs for MFU."""

from __future__ import annotations

import importlib
import json
import os
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, Self

import jax
import rich.console
import rich.progress

from grit_jax import chips, files
from grit_jax.config import Config, InputError, LoggingConfig, TransformerConfig
from grit_jax.errors import install
from grit_jax.watch import folder
from grit_jax.watch.lines import LineWriter, read_lines

Values = Mapping[str, float]


def peak_flops(device: jax.Device) -> float | None:
    """Peak FLOP/s of a device, or None when it is not known."""
    return chips.peak_flops(device.device_kind)


def model_flops(
    architecture: TransformerConfig, *, tokens: float, tokens_through_head: float, attention_pairs: float
) -> float:
    """FLOPs of one step's matrix products, forward and backward, without recomputation or padding.

    Args:
      architecture: Resolved architecture.
      tokens: Tokens of all streams.
      tokens_through_head: Those of them that pass through the output head.
      attention_pairs: Visible (query, key) pairs.
    """
    heads = architecture.num_heads * architecture.head_dim
    kv_heads = architecture.num_kv_heads * architecture.head_dim
    # With experts: the router, and the MLPs that a token is sent to.
    mlps = architecture.experts_per_token if architecture.num_experts else 1
    widths = 2 * heads + 2 * kv_heads + 3 * mlps * architecture.mlp_dim + architecture.num_experts
    projections = architecture.embed_dim * widths
    layers = architecture.num_layers * (projections * tokens + 2 * heads * attention_pairs)
    return 6 * (layers + architecture.vocab_size * architecture.embed_dim * tokens_through_head)


# Packages of the trackers, by their keys in `logging`; the extra that brings one is called as the key.
_TRACKERS = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}


def check_trackers(config: LoggingConfig) -> list[str]:
    """The trackers that a config asks for beside metrics.jsonl, imported first where they will be used: on host 0.

    Raises:
      InputError: The package of one is not installed.
    """
    asked = [name for name in _TRACKERS if getattr(config, name)]
    if jax.process_index() == 0:
        for name in asked:
            _imported(name, getattr(config, name))
    return asked


def _imported(name: str, value: str | bool) -> Any:
    """The package of the tracker `logging.<name>=<value>`."""
    try:
        return importlib.import_module(_TRACKERS[name])
    except ImportError as error:
        setting = f"logging.{name}={json.dumps(value)}"
        raise InputError(f"{setting} needs {_TRACKERS[name]}, which cannot be imported; {install(name)}") from error


class Tracker(Protocol):
    """Takes the metrics of each step."""

    def log(self, step: int, values: Values) -> None:
        """Records one step."""

    def close(self) -> None:
        """Flushes what is buffered."""


class JsonlTracker:
    """metrics.jsonl: one object per step, with the `time` it was written, in seconds since 1970.

    On resume, steps after `resume_step` are cut off first.
    """

    def __init__(self, path: files.PathLike, *, resume_step: int):
        self._lines = LineWriter(path, keep=lambda line: line["step"] <= resume_step)

    def log(self, step: int, values: Values) -> None:
        """Records one step."""
        self._lines.write({"step": step, "time": time.time(), **values})

    def close(self) -> None:
        """Flushes what is buffered."""
        self._lines.close()


def read_metrics(path: files.PathLike) -> list[dict[str, float]]:
    """The objects of a metrics.jsonl, or of its parts in a bucket; numbers that were not finite are left out."""
    return read_lines(path)


class TensorBoardTracker:
    """Event files in the run folder."""

    def __init__(self, path: files.PathLike):
        self._writer = _imported("tensorboard", True).SummaryWriter(str(path))

    def log(self, step: int, values: Values) -> None:
        """Records one step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes what is buffered."""
        self._writer.close()


class WandbTracker:
    """A Weights & Biases run, resumed under the run folder's name."""

    def __init__(self, project: str, output: files.PathLike, config: str):
        name = run_name(output)
        place = None if files.is_bucket(output) else str(output)  # it writes to disks alone
        self._run = _imported("wandb", project).init(
            project=project, name=name, id=name, resume="allow", dir=place, config={"yaml": config}
        )

    def log(self, step: int, values: Values) -> None:
        """Records one step."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Flushes what is buffered."""
        self._run.finish()


class TrackioTracker:
    """A trackio run, resumed under the run folder's name."""

    def __init__(self, project: str, output: files.PathLike, config: str):
        self._trackio = _imported("trackio", project)
        self._trackio.init(project=project, name=run_name(output), resume="allow", config={"yaml": config})

    def log(self, step: int, values: Values) -> None:
        """Records one step."""
        self._trackio.log(dict(values), step=step)

    def close(self) -> None:
        """Flushes what is buffered."""
        self._trackio.finish()


def run_name(output: files.PathLike) -> str:
    """The name that trackers know a run by: its folder's."""
    return os.path.basename(os.path.normpath(os.fspath(output)))


@contextmanager
def make_trackers(
    config: LoggingConfig, output: files.PathLike, *, resume_step: int, resolved: str
) -> Generator[list[Tracker]]:
    """The trackers that a config asks for, metrics.jsonl always among them; closed at the end. Host 0 alone has any."""
    if jax.process_index() != 0:
        yield []
        return
    trackers: list[Tracker] = [JsonlTracker(files.join(output, folder.METRICS), resume_step=resume_step)]
    if config.tensorboard:
        trackers.append(TensorBoardTracker(files.join(output, folder.TENSORBOARD)))
    if config.wandb:
        trackers.append(WandbTracker(config.wandb, output, resolved))
    if config.trackio:
        trackers.append(TrackioTracker(config.trackio, output, resolved))
    try:
        yield trackers
    finally:
        for tracker in trackers:
            tracker.close()


class Display:
    """A live line on a terminal, a plain line every `logging.every` steps elsewhere, nothing on other hosts."""

    def __init__(self, config: Config, streams: Sequence[str], *, start: int):
        self._streams = streams
        self._every, self._steps = config.logging.every, config.train.steps
        self._started, self._start = time.monotonic(), start
        self._console = rich.console.Console(quiet=jax.process_index() != 0, highlight=False, soft_wrap=True)
        self._live = None
        if self._console.is_terminal:
            columns = ("{task.fields[losses]}", rich.progress.BarColumn(), rich.progress.MofNCompleteColumn())
            self._live = rich.progress.Progress(*columns, "{task.fields[speed]}", console=self._console)
            self._task = self._live.add_task("", total=self._steps, completed=start, losses="compiling", speed="")

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._live.stop()

    def say(self, text: str) -> None:
        """Prints a line above the live one."""
        self._console.print(text)

    def step(self, step: int, values: Values) -> None:
        """Shows the metrics of a step."""
        elapsed = time.monotonic() - self._started
        left = elapsed / max(1, step - self._start) * (self._steps - step)
        losses = "  ".join(f"{name} {values[f'loss/{name}']:.3f}" for name in self._streams)
        speed = f"{values['tokens_per_second']:,.0f} tokens/s  {left // 60:.0f}:{left % 60:02.0f} left"
        if self._live:
            self._live.update(self._task, completed=step, losses=losses, speed=speed)
        elif step % self._every == 0 or step in (self._start + 1, self._steps):
            self._console.print(f"step {step}/{self._steps}  {losses}  {speed}")
