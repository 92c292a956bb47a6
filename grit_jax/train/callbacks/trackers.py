"""Where a run's metrics go: metrics.jsonl and trackers."""

from __future__ import annotations

import importlib
import json
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import jax

from grit_jax import files
from grit_jax.config import LoggingConfig, dump_config
from grit_jax.errors import InputError, install
from grit_jax.runs import folder
from grit_jax.runs.logs import LineWriter
from grit_jax.train.callbacks.callback import Callback, Run

Log = Callable[[int, Mapping[str, float]], None]  # takes a step and its metrics


class Trackers(Callback):
    """Hands the metrics of every step to the trackers of a config.

    Args:
      config: Names them.
    """

    def __init__(self, config: LoggingConfig):
        self._config = config

    @contextmanager
    def running(self, run: Run) -> Generator[None]:
        """Opens the trackers and closes them."""
        trainer = run.trainer
        resolved = dump_config(trainer.config)
        with open_trackers(self._config, trainer.folder, resume_step=run.start, resolved=resolved) as self._logs:
            yield

    def step_ended(self, run: Run, step: int, values: dict[str, float]) -> None:
        """Records one step."""
        for log in self._logs:
            log(step, values)


# The package of each tracker by its key in `logging`, which also names the extra that installs it.
_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}


def check_trackers(config: LoggingConfig) -> list[str]:
    """Names of a config's trackers. Host 0, the only one to use them, imports their packages.

    Raises:
      InputError: A tracker's package is not installed.
    """
    names = [name for name in _PACKAGES if getattr(config, name)]
    if jax.process_index() == 0:
        for name in names:
            _imported(name, config)
    return names


def _imported(name: str, config: LoggingConfig) -> Any:
    try:
        return importlib.import_module(_PACKAGES[name])
    except ImportError as error:
        setting = f"logging.{name}={json.dumps(getattr(config, name))}"
        raise InputError(f"{setting} needs {_PACKAGES[name]}, which cannot be imported; {install(name)}") from error


@contextmanager
def open_trackers(
    config: LoggingConfig, output: files.PathLike, *, resume_step: int, resolved: str
) -> Generator[list[Log]]:
    """Opens metrics.jsonl and the trackers of a config, on host 0 only, and closes them at the end.

    A line of metrics.jsonl has the `time` of writing, in seconds since 1970. Trackers resume the run by its folder's
    name.

    Args:
      config: Names the trackers.
      output: The run folder.
      resume_step: Later steps are cut off metrics.jsonl.
      resolved: The run's config, for trackers.
    """
    with ExitStack() as closing:
        first = jax.process_index() == 0
        yield list(_opened(config, output, resume_step, resolved, closing)) if first else []


def _opened(
    config: LoggingConfig, output: files.PathLike, resume_step: int, resolved: str, closing: ExitStack
) -> Iterator[Log]:
    lines = LineWriter(files.join(output, folder.METRICS), keep=lambda line: line["step"] <= resume_step)
    closing.callback(lines.close)
    yield lambda step, values: lines.write({"step": step, "time": time.time(), **values})
    if config.tensorboard:
        events = _imported("tensorboard", config).SummaryWriter(str(files.join(output, folder.TENSORBOARD)))
        closing.callback(events.close)

        def log_events(step: int, values: Mapping[str, float]) -> None:
            for name, value in values.items():
                events.add_scalar(name, value, step)

        yield log_events
    name = os.path.basename(os.path.normpath(os.fspath(output)))
    common = {"name": name, "resume": "allow", "config": {"yaml": resolved}}
    if config.wandb:
        directory = None if files.is_bucket(output) else str(output)  # it only writes to disks
        wandb_run = _imported("wandb", config).init(project=config.wandb, id=name, dir=directory, **common)
        closing.callback(wandb_run.finish)
        yield lambda step, values: wandb_run.log(dict(values), step=step)
    if config.trackio:
        trackio = _imported("trackio", config)
        trackio.init(project=config.trackio, **common)
        closing.callback(trackio.finish)
        yield lambda step, values: trackio.log(dict(values), step=step)
