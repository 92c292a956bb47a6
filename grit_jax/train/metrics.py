"""Where a run's numbers go: metrics.jsonl, trackers and the display; and model FLOPs for MFU."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, Self

import jax
import rich.console
import rich.progress

from grit_jax import chips
from grit_jax.config import Config, InputError, LoggingConfig, TransformerConfig

Values = Mapping[str, float]


def peak_flops(device: jax.Device) -> float | None:
    """Peak FLOP/s of a device, or None when it is not known."""
    return chips.peak_flops(device.device_kind)


def model_flops(
    architecture: TransformerConfig, *, tokens: float, generative_tokens: float, attention_pairs: float
) -> float:
    """FLOPs of one step's matrix products, forward and backward, without recomputation or padding.

    Args:
      architecture: Resolved architecture.
      tokens: Tokens of both streams.
      generative_tokens: Tokens of the generative stream, which also pass through the output head.
      attention_pairs: Visible (query, key) pairs.
    """
    heads = architecture.num_heads * architecture.head_dim
    kv_heads = architecture.num_kv_heads * architecture.head_dim
    # With experts: the router, and the MLPs that a token is sent to.
    mlps = architecture.experts_per_token if architecture.num_experts else 1
    widths = 2 * heads + 2 * kv_heads + 3 * mlps * architecture.mlp_dim + architecture.num_experts
    projections = architecture.embed_dim * widths
    layers = architecture.num_layers * (projections * tokens + 2 * heads * attention_pairs)
    return 6 * (layers + architecture.vocab_size * architecture.embed_dim * generative_tokens)


class Tracker(Protocol):
    """Takes the metrics of each step."""

    def log(self, step: int, values: Values) -> None:
        """Records one step."""

    def close(self) -> None:
        """Flushes what is buffered."""


class JsonlTracker:
    """metrics.jsonl: one object per step; on resume, steps after `resume_step` are cut off first."""

    def __init__(self, path: Path, *, resume_step: int):
        kept = [line for line in read_metrics(path) if line["step"] <= resume_step] if path.exists() else []
        self._file = path.open("w")
        for line in kept:
            self._write(line)

    def log(self, step: int, values: Values) -> None:
        """Records one step."""
        self._write({"step": step, **values})

    def _write(self, line: Mapping[str, float]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Flushes what is buffered."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The objects of a metrics.jsonl; a last line cut short by a crash is left out."""
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


class TensorBoardTracker:
    """Event files in the run folder."""

    def __init__(self, folder: Path):
        try:
            import tensorboardX
        except ImportError as error:
            raise InputError(
                "logging.tensorboard=true needs tensorboardX; pip install 'grit-jax[tensorboard]'"
            ) from error
        self._writer = tensorboardX.SummaryWriter(str(folder))

    def log(self, step: int, values: Values) -> None:
        """Records one step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes what is buffered."""
        self._writer.close()


class WandbTracker:
    """A Weights & Biases run, resumed under the run folder's name."""

    def __init__(self, project: str, folder: Path, config: str):
        try:
            import wandb  # ty: ignore[import-not-found]  # an extra that the tests do without
        except ImportError as error:
            raise InputError(f"logging.wandb={project!r} needs wandb; pip install 'grit-jax[wandb]'") from error
        self._run = wandb.init(
            project=project, name=folder.name, id=folder.name, resume="allow", dir=str(folder), config={"yaml": config}
        )

    def log(self, step: int, values: Values) -> None:
        """Records one step."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Flushes what is buffered."""
        self._run.finish()


@contextmanager
def make_trackers(config: LoggingConfig, folder: Path, *, resume_step: int, resolved: str) -> Generator[list[Tracker]]:
    """The trackers that a config asks for, metrics.jsonl always among them; closed at the end. Host 0 alone has any."""
    if jax.process_index() != 0:
        yield []
        return
    trackers: list[Tracker] = [JsonlTracker(folder / "metrics.jsonl", resume_step=resume_step)]
    if config.tensorboard:
        trackers.append(TensorBoardTracker(folder / "tensorboard"))
    if config.wandb:
        trackers.append(WandbTracker(config.wandb, folder, resolved))
    try:
        yield trackers
    finally:
        for tracker in trackers:
            tracker.close()


class Display:
    """A live line on a terminal, a plain line every `logging.every` steps elsewhere, nothing on other hosts."""

    def __init__(self, config: Config, *, start: int):
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
        names = {"loss/embedding": "embedding", "loss/generative": "generative"}
        losses = "  ".join(f"{short} {values[name]:.3f}" for name, short in names.items() if name in values)
        speed = f"{values['tokens_per_second']:,.0f} tokens/s  {left // 60:.0f}:{left % 60:02.0f} left"
        if self._live:
            self._live.update(self._task, completed=step, losses=losses, speed=speed)
        elif step % self._every == 0 or step in (self._start + 1, self._steps):
            self._console.print(f"step {step}/{self._steps}  {losses}  {speed}")
