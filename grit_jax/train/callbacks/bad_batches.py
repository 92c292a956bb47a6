"""Bad steps: skipped updates and spikes."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager

import jax

from grit_jax import files
from grit_jax.runs import folder
from grit_jax.runs.logs import LineWriter, read_lines
from grit_jax.runs.spikes import WINDOW, Spikes
from grit_jax.train.callbacks.callback import Callback, Run


class BadBatches(Callback):
    """Announces bad steps, and writes their records to bad_batches.jsonl.

    Args:
      spike_threshold: Robust z-score at which a loss is a spike; None for no spikes.
      max_skipped: Skipped updates in a row that stop the run.
    """

    def __init__(self, spike_threshold: float | None, max_skipped: int):
        self._threshold, self._max_skipped = spike_threshold or math.inf, max_skipped

    @contextmanager
    def running(self, run: Run) -> Generator[None]:
        """Resumes from the run's logs, in process 0."""
        self._spikes, self._skipped, self._log = Spikes(self._threshold), 0, None
        if jax.process_index() == 0:
            for line in read_lines(files.join(run.trainer.folder, folder.METRICS))[-WINDOW:]:
                self._spikes.find(line)
            path = files.join(run.trainer.folder, folder.BAD_BATCHES)
            self._log = LineWriter(path, keep=lambda line: line["step"] <= run.start)
        try:
            yield
        finally:
            if self._log:
                self._log.close()

    def step_ended(self, run: Run, step: int, values: dict[str, float]) -> None:
        """Judges a step.

        Raises:
          FloatingPointError: The update is the last of `max_skipped` in a row to be skipped.
        """
        if not values["skipped"]:
            self._skipped = 0
            if spike := self._spikes.find(values):
                name, value, score = spike
                text = f"{name} is {value:.4g}, {score:.1f} deviations above the recent"
                self._announce(run, step, "spike", text, values)
            return
        self._skipped += 1
        values_now = f"loss is {values['loss']:g} and the gradient's norm {values['grad_norm']:g}"
        if math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"]):
            values_now += ", but the optimizer's update is not finite"
        self._announce(run, step, "not finite", f"{values_now}; the update is skipped", values)
        if self._skipped >= self._max_skipped:
            raise FloatingPointError(
                f"{self._skipped} updates in a row were skipped, up to step {step}, because loss, gradient or update "
                f"is not finite (train.max_skipped={self._max_skipped}); the records of these steps are "
                f"in {files.join(run.trainer.folder, folder.BAD_BATCHES)}: look at them, lower "
                "optimizer.learning_rate, or raise optimizer.epsilon; checkpoints hold the state before them"
            )

    def _announce(self, run: Run, step: int, reason: str, text: str, values: Mapping[str, float]) -> None:
        run.say(f"step {step}: {text} (records in {folder.BAD_BATCHES})")
        if self._log:
            kept = {name: values[name] for name in values if name.startswith("loss") or name == "grad_norm"}
            samples = [part._asdict() for part in run.trainer.data.samples(step - 1)]
            self._log.write({"step": step, "reason": reason, "text": text, **kept, "samples": samples})
