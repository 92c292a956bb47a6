"""Where a run's numbers go: metrics.jsonl and trackers."""

from __future__ import annotations

import importlib
import json
import os
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import jax

from grit_jax import files
from grit_jax.config import LoggingConfig, dump_config
from grit_jax.errors import InputError, install
from grit_jax.runs import folder
from grit_jax.runs.lines import LineWriter
from grit_jax.train.callbacks.base import Callback, Run

Values = Mapping[str, float]


class Trackers(Callback):
    """Hands the numbers of every step to the trackers of a config.

    Args:
      config: Names them.
    """

    def __init__(self, config: LoggingConfig):
        self._config = config

    @contextmanager
    def running(self, run: Run) -> Generator[None]:
        """Opens the trackers and closes them."""
        resolved = dump_config(run.trainer.config)
        with make_trackers(
            self._config, run.trainer.folder, resume_step=run.start, resolved=resolved
        ) as self._trackers:
            yield

    def step_ended(self, run: Run, step: int, values: dict[str, float]) -> None:
        """Records one step."""
        for tracker in self._trackers:
            tracker.log(step, values)


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
