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
from grit_jax.runs.goodput import Goodput, goodput_of
from grit_jax.runs.lock import Writer, read_writer
from grit_jax.runs.logs import read_lines

RECENT = 20  # steps whose mean is shown
_RECENT_OF_FILE = 5  # of its losses, which are further apart
_PACE = 50  # steps whose pace tells the time left
_SILENT_SECONDS = 120.0  # without a step that are worth a word
_HEALTH = ("alignment", "uniformity", "mean_cosine", "effective_rank")


@dataclasses.dataclass(frozen=True)
class Status:
    """State of a run.

    Attributes:
      folder: The run folder.
      step: Last step in the log; 0 before the first.
      steps: Steps that the run is to do; None without a config.
      recent: Means of the metrics over the last `RECENT` steps that have them; of validation, scorecard
        and health, the last ones.
      goodput: Where the time went.
      checkpoint: Step of the newest complete checkpoint.
      writer: Who holds the folder, dead or alive.
      skipped: Updates skipped in all.
      spikes: Spikes, `step` and `text` of each.
      seconds_left: At the pace of the last steps, evaluations and saving included; None where there is no pace yet.
      idle_seconds: Since the last line of the log.
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
        """Whether a process works on the run."""
        return self.writer is not None and self.writer.alive

    @property
    def done(self) -> bool:
        """Whether all steps are done."""
        return self.steps is not None and self.step >= self.steps


def read_status(path: files.PathLike) -> Status:
    """Reads a run folder.

    Raises:
      InputError: It is none.
    """
    lines = read_lines(files.join(path, folder.METRICS))
    config = files.join(path, folder.CONFIG)
    there = files.read_text(config) is not None
    writer = read_writer(path)
    if not there and not lines and writer is None:
        raise InputError(f"{path} is no run folder: no {folder.CONFIG}, no {folder.METRICS}; name a train.output")
    times = read_lines(files.join(path, folder.GOODPUT))
    step = int(lines[-1]["step"]) if lines else 0
    steps = load_config(config).train.steps if there else None
    bad = read_lines(files.join(path, folder.BAD_BATCHES))
    return Status(
        folder=str(path),
        step=step,
        steps=steps,
        recent=_recent(lines),
        goodput=goodput_of(times),
        checkpoint=folder.last_checkpoint(path),
        writer=writer,
        skipped=sum(int(line.get("skipped", 0)) for line in lines),
        spikes=[{"step": line["step"], "text": line["text"]} for line in bad if line["reason"] == "spike"],
        seconds_left=_seconds_left(lines, times, steps),
        idle_seconds=time.time() - lines[-1]["time"] if lines and "time" in lines[-1] else None,
    )


def as_lines(status: Status) -> Iterator[str]:
    """The status for people."""
    recent = status.recent
    share = f" of {status.steps:,} ({status.step / status.steps:.0%})" if status.steps else ""
    yield f"{status.folder}: step {status.step:,}{share}{_outlook(status)}"

    def line(name: str, text: str) -> str:
        return f"  {name:<11}{text}"

    if status.writer is None:
        yield line("writer", "none")
    else:
        yield line("writer", f"{'alive' if status.alive else 'dead'}: {status.writer}")
    losses = [
        f"{name} {recent[f'loss/{name}']:.4f}" for name in ("embedding", "generative") if f"loss/{name}" in recent
    ]
    if losses:
        yield line("losses", f"{'  '.join(losses)}  (means of the last {RECENT} steps)")
    held_out = [
        f"{name} {recent[f'validation/loss/{name}']:.4f}"
        for name in ("embedding", "generative")
        if f"validation/loss/{name}" in recent
    ]
    if held_out:
        yield line("held out", "  ".join(held_out))
    if card := scores([recent]):
        yield line("scorecard", "  ".join(f"{name.removeprefix('scorecard/')} {recent[name]:.4f}" for name in card))
    for stream in ("embedding", "generative"):
        worst = sorted(datasets(recent, stream).items(), key=lambda item: -item[1])
        if len(worst) > 1:
            shown = ", ".join(f"{name} {value:.4f}" for name, value in worst[:8])
            yield line("datasets", f"{stream}, highest loss first: {shown}{' ...' if len(worst) > 8 else ''}")
    if "grad_norm" in recent:
        ratio = f", embedding : generative {recent['grad_norm/ratio']:.2f}" if "grad_norm/ratio" in recent else ""
        yield line("gradient", f"norm {recent['grad_norm']:.3f}{ratio}, learning rate {recent['learning_rate']:.2e}")
    if "tokens_per_second" in recent:
        mfu = f", MFU {recent['mfu']:.1%}" if "mfu" in recent else ""
        yield line("speed", f"{recent['tokens_per_second']:,.0f} tokens/s, {recent['step_seconds']:.3g} s a step{mfu}")
    health = [
        f"{name.replace('_', ' ')} {recent[f'embedding/{name}']:.3g}"
        for name in _HEALTH
        if f"embedding/{name}" in recent
    ]
    if health:
        yield line("embeddings", ", ".join(health))
    if wall := status.goodput.wall_seconds:
        spent = sorted(status.goodput.seconds.items(), key=lambda item: -item[1])
        causes = [
            f"{cause} {seconds / wall:.1%}" for cause, seconds in spent if cause != "useful" and seconds / wall >= 5e-4
        ]
        sessions = f", {status.goodput.sessions} sessions" if status.goodput.sessions > 1 else ""
        text = f"{status.goodput.ratio:.1%} of {duration(wall)}{sessions}"
        yield line("goodput", ": ".join([text, ", ".join(causes)] if causes else [text]))
    yield line("checkpoint", "none yet" if status.checkpoint is None else f"step {status.checkpoint:,}")
    if status.skipped:
        yield line("skipped", f"{status.skipped:,} updates, not finite; their records are in {folder.BAD_BATCHES}")
    for spike in status.spikes[-3:]:
        yield line("spike", f"step {spike['step']:,}: {spike['text']}")
    if len(status.spikes) > 3:
        yield line("", f"and {len(status.spikes) - 3} earlier spikes, see {folder.BAD_BATCHES}")


def as_json(status: Status) -> dict[str, Any]:
    """The status as JSON values."""
    more = {"alive": status.alive, "done": status.done}
    goodput = {"ratio": status.goodput.ratio, "wall_seconds": status.goodput.wall_seconds}
    fields = dataclasses.asdict(status)
    return fields | more | {"goodput": fields["goodput"] | goodput}


def datasets(values: Mapping[str, Any], stream: str) -> dict[str, float]:
    """Of a step's metrics, the loss of each file of a stream by its name."""
    start = f"loss/{stream}/"
    return {name.removeprefix(start): value for name, value in values.items() if name.startswith(start)}


def scores(lines: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names of the scorecard's metrics that lines have: those of whole skills last."""
    names = dict.fromkeys(name for line in lines for name in line if name.startswith("scorecard/"))
    return sorted(names, key=lambda name: name.removeprefix("scorecard/") in ("embedding", "generative", "both"))


def duration(seconds: float) -> str:
    """A length of time in its two largest units."""
    minutes, hours = seconds / 60, seconds / 3600
    if seconds < 60:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{int(minutes)} min {seconds % 60:.0f} s"
    return f"{int(hours)} h {int(minutes % 60)} min" if hours < 48 else f"{int(hours // 24)} d {int(hours % 24)} h"


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
    """Means over the last steps; what not every step has is the last value, a file's loss the mean of its last ones."""
    means: dict[str, float] = {}
    if not lines:
        return means
    window = lines[-RECENT:]
    values: dict[str, list[float]] = {}
    for line in lines:
        for name, value in line.items():
            values.setdefault(name, []).append(value)
    for name, found in values.items():
        if name in ("step", "time"):
            continue
        rare = name.startswith(("validation/", "scorecard/", "embedding/", "grad_norm/"))
        per_file = name.startswith(("loss/embedding/", "loss/generative/"))
        if rare:
            means[name] = found[-1]
        elif per_file:
            means[name] = statistics.fmean(found[-_RECENT_OF_FILE:])
        elif of_window := [line[name] for line in window if name in line]:
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
