"""How a run is doing, from its folder alone."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from grit_jax import files
from grit_jax.config import load_config
from grit_jax.errors import InputError
from grit_jax.runs import folder
from grit_jax.runs.goodput import Goodput
from grit_jax.runs.history import STREAMS, duration, file_losses, read_history, scorecard_names
from grit_jax.runs.lock import Writer, read_writer

RECENT = 20  # steps whose mean is shown
_RECENT_OF_FILE = 5  # losses of a file, which are further apart
_PACE = 50  # steps whose pace gives the time left
_SILENT_SECONDS = 120.0  # without a step after which a run counts as silent
_HEALTH = ("alignment", "uniformity", "mean_cosine", "effective_rank")


@dataclasses.dataclass(frozen=True)
class Status:
    """State of a run.

    Attributes:
      folder: The run folder.
      step: Last step in the log; 0 before the first.
      steps: Steps of the whole run; None without a config.
      recent: Means of the metrics over the last `RECENT` steps that have them; the last values of validation, scorecard
        and health.
      goodput: Where the time went.
      checkpoint: Step of the newest complete checkpoint.
      writer: The process that holds the folder, dead or alive.
      skipped: Skipped updates.
      spikes: Spikes, `step` and `text` of each.
      seconds_left: Time left at the pace of the last steps, including evaluations and saving; None without a pace.
      idle_seconds: Time since the last line of the log.
    """

    folder: str
    step: int
    steps: int | None
    recent: Mapping[str, float]
    goodput: Goodput
    checkpoint: int | None
    writer: Writer | None
    skipped: int
    spikes: Sequence[Mapping[str, Any]]
    seconds_left: float | None
    idle_seconds: float | None

    @property
    def alive(self) -> bool:
        """Whether a process is working on the run."""
        return self.writer is not None and self.writer.alive

    @property
    def done(self) -> bool:
        """Whether all steps are done."""
        return self.steps is not None and self.step >= self.steps


def read_status(path: files.PathLike) -> Status:
    """Reads a run folder.

    Raises:
      InputError: It is not a run folder.
    """
    history = read_history(path)
    lines = history.metrics
    config = files.join(path, folder.CONFIG)
    there = files.read_text(config) is not None
    writer = read_writer(path)
    if not there and not lines and writer is None:
        raise InputError(f"{path} is not a run folder: no {folder.CONFIG}, no {folder.METRICS}; name a train.output")
    steps = load_config(config).train.steps if there else None
    spikes = [line for line in history.bad_batches if line["reason"] == "spike"]
    return Status(
        folder=str(path),
        step=int(lines[-1]["step"]) if lines else 0,
        steps=steps,
        recent=_recent(lines),
        goodput=history.goodput,
        checkpoint=folder.last_checkpoint(path),
        writer=writer,
        skipped=sum(int(line.get("skipped", 0)) for line in lines),
        spikes=[{"step": spike["step"], "text": spike["text"]} for spike in spikes],
        seconds_left=_seconds_left(lines, history.times, steps),
        idle_seconds=time.time() - lines[-1]["time"] if lines and "time" in lines[-1] else None,
    )


def as_lines(status: Status) -> Iterator[str]:
    """The status as lines of text."""
    share = f" of {status.steps:,} ({status.step / status.steps:.0%})" if status.steps else ""
    yield f"{status.folder}: step {status.step:,}{share}{_outlook(status)}"
    for name, text in _sections(status):
        yield f"  {name:<11}{text}"


def _sections(status: Status) -> Iterator[tuple[str, str]]:
    recent = status.recent

    def shown(prefix: str, names: Iterable[str], spec: str = ".4f") -> list[str]:
        found = [(name.replace("_", " "), recent[prefix + name]) for name in names if prefix + name in recent]
        return [f"{name} {value:{spec}}" for name, value in found]

    life = "alive" if status.alive else "dead"
    yield "writer", f"{life}: {status.writer}" if status.writer else "none"
    if losses := shown("loss/", STREAMS):
        yield "losses", f"{'  '.join(losses)}  (means of the last {RECENT} steps)"
    if held_out := shown("validation/loss/", STREAMS):
        yield "held out", "  ".join(held_out)
    if card := scorecard_names([recent]):
        yield "scorecard", "  ".join(f"{name} {recent[f'scorecard/{name}']:.4f}" for name in card)
    for stream in STREAMS:
        worst = sorted(file_losses(recent, stream).items(), key=lambda item: -item[1])
        if len(worst) > 1:
            highest = ", ".join(f"{name} {value:.4f}" for name, value in worst[:8])
            yield "datasets", f"{stream}, highest loss first: {highest}{' ...' if len(worst) > 8 else ''}"
    if "grad_norm" in recent:
        ratio = f", embedding : generative {recent['grad_norm/ratio']:.2f}" if "grad_norm/ratio" in recent else ""
        yield "gradient", f"norm {recent['grad_norm']:.3f}{ratio}, learning rate {recent['learning_rate']:.2e}"
    if "tokens_per_second" in recent:
        mfu = f", MFU {recent['mfu']:.1%}" if "mfu" in recent else ""
        yield "speed", f"{recent['tokens_per_second']:,.0f} tokens/s, {recent['step_seconds']:.3g} s a step{mfu}"
    if health := shown("embedding/", _HEALTH, ".3g"):
        yield "embeddings", ", ".join(health)
    if wall := status.goodput.wall_seconds:
        spent = sorted(status.goodput.seconds.items(), key=lambda item: -item[1])
        causes = [
            f"{cause} {seconds / wall:.1%}" for cause, seconds in spent if cause != "useful" and seconds / wall >= 5e-4
        ]
        sessions = f", {status.goodput.sessions} sessions" if status.goodput.sessions > 1 else ""
        text = f"{status.goodput.ratio:.1%} of {duration(wall)}{sessions}"
        yield "goodput", ": ".join([text, ", ".join(causes)] if causes else [text])
    yield "checkpoint", "none yet" if status.checkpoint is None else f"step {status.checkpoint:,}"
    if status.skipped:
        yield "skipped", f"{status.skipped:,} updates, not finite; their records are in {folder.BAD_BATCHES}"
    for spike in status.spikes[-3:]:
        yield "spike", f"step {spike['step']:,}: {spike['text']}"
    if len(status.spikes) > 3:
        yield "", f"and {len(status.spikes) - 3} earlier spikes, see {folder.BAD_BATCHES}"


def as_json(status: Status) -> dict[str, Any]:
    """The status as JSON values."""
    fields = dataclasses.asdict(status)
    goodput = {"ratio": status.goodput.ratio, "wall_seconds": status.goodput.wall_seconds}
    return fields | {"alive": status.alive, "done": status.done, "goodput": fields["goodput"] | goodput}


def _outlook(status: Status) -> str:
    if status.done:
        return ", done"
    if not status.alive:
        since = f", last line {duration(status.idle_seconds)} ago" if status.idle_seconds is not None else ""
        return f", not running{since}"
    if status.seconds_left is None:
        return ", starting"
    idle = status.idle_seconds or 0.0
    silent = f", silent for {duration(idle)}" if idle > _SILENT_SECONDS else ""
    return f", {duration(status.seconds_left)} left{silent}"


def _recent(lines: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over the last steps; the last value of rare metrics, and the mean of a file's last losses."""
    values: dict[str, list[float]] = {}
    for line in lines:
        for name, value in line.items():
            values.setdefault(name, []).append(value)
    means: dict[str, float] = {}
    for name, found in values.items():
        if name in ("step", "time"):
            continue
        if name.startswith(("validation/", "scorecard/", "embedding/", "grad_norm/")):
            means[name] = found[-1]
        elif name.startswith(("loss/embedding/", "loss/generative/")):
            means[name] = statistics.fmean(found[-_RECENT_OF_FILE:])
        elif of_window := [line[name] for line in lines[-RECENT:] if name in line]:
            means[name] = of_window[-1] if name in ("learning_rate", "goodput") else statistics.fmean(of_window)
    if means.keys() >= {"tokens", "step_seconds"}:
        means["tokens_per_second"] = means["tokens"] / means["step_seconds"]
    return means


def _seconds_left(
    lines: Sequence[Mapping[str, float]], times: Sequence[Mapping[str, Any]], steps: int | None
) -> float | None:
    session = times[-1]["session"] if times else -math.inf
    mine = [line for line in lines[-_PACE:] if line.get("time", -math.inf) > session]
    if steps is None or len(mine) < 2:
        return None
    pace = (mine[-1]["time"] - mine[0]["time"]) / (mine[-1]["step"] - mine[0]["step"])
    return max(0.0, (steps - mine[-1]["step"]) * pace)
