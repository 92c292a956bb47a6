"""What a run says of itself while it goes on: numbers, time by cause, bad batches, spikes."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from grit_jax import files, sharding
from grit_jax.batch import Batch
from grit_jax.config import Config
from grit_jax.data.samples import FileSamples
from grit_jax.train.health import GRAM, health_figures
from grit_jax.train.metrics import Display, Tracker, model_flops, peak_flops, read_metrics
from grit_jax.train.step import TOKEN_LOSSES, Metrics
from grit_jax.watch import folder
from grit_jax.watch.goodput import Cause, Clock, goodput_of
from grit_jax.watch.lines import LineWriter, read_lines
from grit_jax.watch.spikes import WINDOW, Spikes
from grit_jax.watch.watchdog import Watchdog

_GOODPUT_SECONDS = 30.0  # between lines of goodput.jsonl


class Datasets(NamedTuple):
    """What the recorder asks of the data about a step, counted from 0.

    Attributes:
      samples: Its records by file.
      losses_by_file: Loss of each file, given the losses of its streams and of their tokens.
    """

    samples: Callable[[int], list[FileSamples]]
    losses_by_file: Callable[[int, dict[str, float], dict[str, np.ndarray]], dict[str, float]]


@dataclasses.dataclass
class _Unread:
    """A step that was started and is not logged yet; `seconds` are there once it has ended."""

    step: int
    metrics: Metrics
    details: Metrics
    waited: float
    extra: dict[str, float]
    seconds: float | None = None


class Recorder:
    """Turns the metrics of steps into numbers for people, one step late, so that devices never wait.

    A step's seconds go from the end of the step before it to its own, on the devices; what the loop does within `spent`
    is left out of them. A context manager: what it has is written at its end, whatever ends the run.

    Args:
      config: The run's settings.
      mesh: Its devices.
      output: The run folder.
      data: What the steps consist of.
      trackers: Where the numbers go.
      display: What is shown.
      began: When this session started, by `time.monotonic`.
      start: Updates done before it.

    Attributes:
      step_began: When the step in flight began, by `time.monotonic`: at the end of the one before, or of what was done
        between them.
      step_seconds: Seconds of the last step that has ended; None before the first.
    """

    def __init__(
        self,
        config: Config,
        mesh: jax.sharding.Mesh,
        output: files.PathLike,
        data: Datasets,
        trackers: list[Tracker],
        display: Display,
        *,
        began: float,
        start: int,
    ):
        self._config, self._output, self._data = config, output, data
        self._trackers, self._display, self._step = trackers, display, start
        self._whole = jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))
        peak = peak_flops(mesh.devices.flat[0])
        self._peak = peak and peak * mesh.size
        self._clock = Clock(began=began, from_step=start)
        self._watchdog = Watchdog(config.train.watchdog_seconds, files.join(output, folder.stacks(jax.process_index())))
        self._compiled: set[Any] = set()
        self._unread: _Unread | None = None
        self.step_began = began
        self.step_seconds: float | None = None
        self._waited, self._extra, self._skipped = 0.0, {}, 0
        self._spikes = Spikes(config.logging.spike_threshold or math.inf)
        self._logs: tuple[LineWriter, LineWriter] | None = None
        self._earlier: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        if jax.process_index() == 0:
            self._open()
        self._clock.add("startup", time.monotonic() - self._clock.began)
        self._watchdog.__enter__()
        self.step_began = time.monotonic()
        return self

    def __exit__(self, *exception: object) -> None:
        self._watchdog.__exit__(*exception)
        if self._logs:
            self._write_goodput()
            for log in self._logs:
                log.close()

    def _open(self) -> None:
        start = self._clock.from_step
        for line in read_metrics(files.join(self._output, folder.METRICS))[-WINDOW:]:
            self._spikes.find(line)
        path = files.join(self._output, folder.GOODPUT)
        newest = {line["session"]: line for line in read_lines(path)}
        self._earlier = list(newest.values())
        bad = LineWriter(files.join(self._output, folder.BAD_BATCHES), keep=lambda line: line["step"] <= start)
        self._logs = bad, LineWriter(path)
        self._write_goodput()

    @contextmanager
    def spent(self, cause: Cause, *, watched: bool = True) -> Generator[None]:
        """Counts the time inside for a cause, after the step in flight has ended.

        Without `watched` it may take any time.
        """
        self._await_step()
        with self._clock.spent(cause):
            if watched:
                self._watchdog.beat(f"{cause} after step {self._step}")
                yield
            else:
                with self._watchdog.paused():
                    yield
        self.step_began = time.monotonic()

    def _await_step(self) -> None:
        """Waits for the end of the step in flight, and takes its time."""
        if self._unread and self._unread.seconds is None:
            jax.block_until_ready(self._unread.metrics)
            ended = time.monotonic()
            self.step_seconds = self._unread.seconds = ended - self.step_began
            self.step_began = ended

    def next_batch(self, batches: Iterator[Batch]) -> Batch:
        """The next batch; time that the devices have nothing to do is counted as waiting for data."""
        self._watchdog.beat(f"the data of step {self._step + 1}")
        asked = time.monotonic()
        batch = next(batches)
        self._waited = time.monotonic() - asked
        running: Any = self._unread and self._unread.metrics["loss"]
        if running is None or running.is_ready():
            self._clock.add("data", self._waited)
        return batch

    @contextmanager
    def step(self, batch: Batch) -> Generator[None]:
        """Around the call of the compiled step, which compiles when the batch has a new shape."""
        self._step += 1
        shapes = tuple((name, stream.tokens.shape) for name, stream in batch.items())
        if shapes in self._compiled:
            self._watchdog.beat(f"step {self._step}")
            yield
            return
        self._compiled.add(shapes)
        with self.spent("compile", watched=False):
            yield

    def gradient_norms(self, measure: Callable[[Batch], jax.Array], batch: Batch) -> None:
        """Before a step: the norm of each objective's gradient and their ratio, where it is time for them."""
        every = self._config.logging.gradient_ratio_every
        if not every or (self._step + 1) % every or len(batch) < 2:
            return
        if self._unread:
            self.log(self.read())
        with self.spent("evaluation", watched=False):
            norms = {name: float(measure({name: stream})) for name, stream in batch.items()}
        first, second, *_ = norms.values()
        self._extra = {f"grad_norm/{name}": norm for name, norm in norms.items()}
        self._extra["grad_norm/ratio"] = first / second if second else math.inf

    def add(self, metrics: Metrics) -> None:
        """Takes the metrics of the step that was started, and logs those of the one before.

        Called before another step is started: what is gathered of this one would wait for the end of the other.
        """
        every = self._config.logging.details_every
        detailed = bool(every) and (self._step % every == 0 or self._step == 1)
        # Gathered in all processes, read in one.
        details = {name: self._whole(value) for name, value in metrics.items() if value.ndim and detailed}
        if self._unread:
            self.log(self.read())
        scalars = {name: value for name, value in metrics.items() if not value.ndim}
        self._unread = _Unread(self._step, scalars, details, self._waited, self._extra)
        self._extra = {}

    def read(self) -> dict[str, float]:
        """Waits for the metrics of the newest step that `add` took, and adds its speed and health."""
        self._await_step()
        assert self._unread
        step, seconds = self._unread.step, self._unread.seconds
        assert seconds is not None
        details = self._unread.details if jax.process_index() == 0 else {}
        found: dict[str, np.ndarray] = jax.device_get(self._unread.metrics | details)
        values = {name: value.item() for name, value in found.items() if not value.ndim} | self._unread.extra
        pairs, through_head = values.pop("attention_pairs"), values.pop("tokens_through_head")
        values |= {
            "tokens_per_second": values["tokens"] / seconds,
            "step_seconds": seconds,
            "data_wait_seconds": self._unread.waited,
        }
        if self._peak:
            flops = model_flops(
                self._config.model.architecture,
                tokens=values["tokens"],
                tokens_through_head=through_head,
                attention_pairs=pairs,
            )
            values["mfu"] = flops / seconds / self._peak
        losses = {name.removeprefix("loss/"): value for name, value in values.items() if name.startswith("loss/")}
        of_tokens = {name.removeprefix(TOKEN_LOSSES): x for name, x in found.items() if name.startswith(TOKEN_LOSSES)}
        by_file = self._data.losses_by_file(step - 1, losses, of_tokens)
        values |= {f"loss/{name}": value for name, value in by_file.items()}
        if GRAM in found:
            values |= health_figures(found[GRAM])
        return values

    def log(self, values: Mapping[str, float]) -> None:
        """Hands the numbers that `read` gave to the trackers and the display, and looks whether they are good.

        Raises:
          FloatingPointError: `train.max_skipped` updates in a row were skipped.
        """
        assert self._unread
        step, self._unread = self._unread.step, None
        if values["skipped"]:
            self._clock.add("skipped", values["step_seconds"])
        values = dict(values) | {"goodput": goodput_of([*self._earlier, self._clock.line(step)]).ratio}
        for tracker in self._trackers:
            tracker.log(step, values)
        self._display.step(step, values)
        if self._logs and time.time() - self._goodput_written > _GOODPUT_SECONDS:
            self._write_goodput()
        self._judge(step, values)

    def _judge(self, step: int, values: Mapping[str, float]) -> None:
        if not values["skipped"]:
            self._skipped = 0
            if spike := self._spikes.find(values):
                name, value, score = spike
                self._report(step, "spike", f"{name} is {value:.4g}, {score:.1f} deviations above the recent", values)
            return
        self._skipped += 1
        what = f"loss is {values['loss']:g} and the gradient's norm {values['grad_norm']:g}"
        if math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"]):
            what += ", but the optimizer's update is not finite"
        self._report(step, "not finite", f"{what}; the update is skipped", values)
        if self._skipped >= self._config.train.max_skipped:
            raise FloatingPointError(
                f"{self._skipped} updates in a row were skipped, up to step {step}, because loss, gradient or update "
                f"is not finite (train.max_skipped={self._config.train.max_skipped}); the records of these steps are "
                f"in {files.join(self._output, folder.BAD_BATCHES)}: look at them, lower optimizer.learning_rate, or "
                "raise optimizer.epsilon; checkpoints hold the state before them"
            )

    def _report(self, step: int, reason: str, text: str, values: Mapping[str, float]) -> None:
        self._display.say(f"step {step}: {text} (records in {folder.BAD_BATCHES})")
        if self._logs:
            kept = {name: values[name] for name in values if name.startswith("loss") or name == "grad_norm"}
            samples = [part._asdict() for part in self._data.samples(step - 1)]
            self._logs[0].write({"step": step, "reason": reason, "text": text, **kept, "samples": samples})

    def _write_goodput(self) -> None:
        assert self._logs
        self._logs[1].write(self._clock.line(self._step))
        self._goodput_written = time.time()
