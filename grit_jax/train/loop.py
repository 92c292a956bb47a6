"""A training run, from config to last checkpoint."""

from __future__ import annotations

import dataclasses
import math
import signal
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np

from grit_jax import sharding
from grit_jax.checkpoint import CheckpointMetadata, Checkpoints
from grit_jax.config import Config, InputError, TransformerConfig, config_differences, dump_config, load_config
from grit_jax.data.pipeline import Pipeline
from grit_jax.loading import open_model, open_tokenizer
from grit_jax.model.pretrained import Pretrained
from grit_jax.model.transformer import init_params
from grit_jax.tokenizer import Tokenizer
from grit_jax.train.metrics import Display, Tracker, make_trackers, model_flops, peak_flops
from grit_jax.train.setup import Setup, row_multiples, set_up
from grit_jax.train.state import TrainState, new_state, shardings_of
from grit_jax.train.step import Metrics, make_eval_step

# What may differ between a run folder's config and the one that resumes it.
_MAY_DIFFER = ("train.steps", "train.output", "loss.negatives", "mesh.", "logging.")


class Trainer:
    """One run: the constructor sets everything up, restoring the run folder's newest checkpoint if there is one.

    Attributes:
      config: The resolved config.
      tokenizer: The model's tokenizer.
      mesh: The device mesh.
      data: The batches.
      state: Parameters and optimizer state; `fit` replaces it with every step.

    Raises:
      InputError: The config, the data or the run folder is not usable; nothing has been written then.
    """

    def __init__(self, config: Config):
        pretrained = open_model(config.model.init) if config.model.init else None
        self.tokenizer = _tokenizer(config, pretrained)
        architecture = _architecture(config, pretrained, self.tokenizer)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, architecture=architecture))
        self.config = config
        self.mesh = sharding.make_mesh(config.mesh)
        self.folder = Path(config.train.output)
        setup = set_up(config, self.mesh)
        _check_folder(config, self.folder)
        self._train_step = setup.train_step
        self._eval_step = make_eval_step(setup.objective)
        self.data = Pipeline(
            config,
            self.tokenizer,
            row_multiples=row_multiples(config, self.mesh),
            host_share=sharding.host_share(self.mesh),
        )
        self._checkpoints = Checkpoints(self.folder / "checkpoints", keep=config.checkpoint)
        with jax.set_mesh(self.mesh):
            self.state = self._restored(setup.abstract) or self._initial(setup, pretrained)

    def _restored(self, abstract: TrainState) -> TrainState | None:
        steps = self._checkpoints.steps()
        if not steps:
            return None
        if self._checkpoints.metadata(steps[-1]).data["fingerprint"] != self.data.fingerprint:
            raise InputError(
                f"{self.folder}: data.train is not what this run was trained on (its files changed); "
                "put the files back, or start again in another train.output"
            )
        params, opt_state = self._checkpoints.restore(steps[-1], abstract.params, abstract.opt_state)
        return TrainState(jax.device_put(np.int32(steps[-1]), abstract.step.sharding), params, opt_state)

    def _initial(self, setup: Setup, pretrained: Pretrained | None) -> TrainState:
        placed, config = shardings_of(setup.abstract), self.config
        init = jax.jit(init_params, static_argnums=(0, 2), out_shardings=placed.params)
        key = jax.random.key(config.train.seed)
        if pretrained is None:
            params = init(config.model.architecture, key, config.model.embedding.projection_dim)
        else:
            params = pretrained.load(placed.params)
        return jax.jit(new_state, static_argnums=1, donate_argnums=0, out_shardings=placed)(params, setup.optimizer)

    @property
    def step(self) -> int:
        """Updates done."""
        return int(self.state.step)

    def fit(self) -> bool:
        """Trains up to `train.steps`, saving on the way.

        Returns:
          True when all steps are done, False when SIGTERM or SIGINT ended the run after a last checkpoint.

        Raises:
          FloatingPointError: The loss is not finite; the newest checkpoint is from before that.
        """
        config, start = self.config, self.step
        if start >= config.train.steps:
            return True
        self.folder.mkdir(parents=True, exist_ok=True)
        resolved = dump_config(config)
        if jax.process_index() == 0:
            (self.folder / "config.yaml").write_text(resolved)
        with (
            make_trackers(config.logging, self.folder, resume_step=start, resolved=resolved) as trackers,
            Display(config, start=start) as display,
            _stop_signals() as stop,
            jax.set_mesh(self.mesh),
        ):
            for line in self.data.report():
                display.say(line)
            if start:
                display.say(f"resumed from step {start}")
            recorder = _Recorder(config, self.mesh, trackers, display)
            batches = self.data.batches(start)
            unread: tuple[int, Metrics, float] | None = None  # read one step late, so that devices never wait
            for step in range(start + 1, config.train.steps + 1):
                asked = time.monotonic()
                batch = next(batches)
                waited = time.monotonic() - asked
                self.state, metrics = self._train_step(self.state, sharding.place_batch(self.mesh, batch))
                if unread:
                    recorder.log(unread[0], recorder.read(*unread))
                unread = (step, metrics, waited)
                last = step == config.train.steps or stop.is_set()
                evaluate = last or (config.train.eval_every and step % config.train.eval_every == 0)
                save = last or step % config.checkpoint.every == 0
                if evaluate or save:
                    values, unread = recorder.read(*unread), None
                    if evaluate and not stop.is_set():
                        values |= self.evaluate()
                    recorder.log(step, values)
                    if save:
                        self._save(step)
                    recorder.restart_clock()
                if last:
                    break
            self._checkpoints.wait()
        return self.step == config.train.steps

    def evaluate(self) -> dict[str, float]:
        """Losses on `data.validation`: mean per query and mean per scored token; empty without validation data."""
        totals: dict[str, float] = {}
        with jax.set_mesh(self.mesh):
            for batch in self.data.validation_batches():
                sums = self._eval_step(self.state.params, sharding.place_batch(self.mesh, batch))
                for name, value in jax.device_get(sums).items():
                    totals[name] = totals.get(name, 0.0) + float(value)
        return {
            f"validation/{name}": total / totals[f"weight/{name.removeprefix('loss/')}"]
            for name, total in totals.items()
            if name.startswith("loss/")
        }

    def _save(self, step: int) -> None:
        metadata = CheckpointMetadata(
            architecture=self.config.model.architecture,
            embedding=self.config.model.embedding,
            tokenizer_files=self.tokenizer.files(),
            config=dump_config(self.config),
            data={"step": step, "fingerprint": self.data.fingerprint},
        )
        self._checkpoints.save(step, self.state.params, self.state.opt_state, metadata)


class _Recorder:
    """Turns a step's metrics into numbers for the trackers and the display."""

    def __init__(self, config: Config, mesh: jax.sharding.Mesh, trackers: list[Tracker], display: Display):
        self._architecture, self._trackers, self._display = config.model.architecture, trackers, display
        peak = peak_flops(mesh.devices.flat[0])
        self._peak = peak and peak * mesh.size
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves the time since the last step out of the next one's."""
        self._read = time.monotonic()

    def read(self, step: int, metrics: Metrics, waited: float) -> dict[str, float]:
        """Waits for a step's metrics and adds its speed."""
        values = {name: value.item() for name, value in jax.device_get(metrics).items()}
        seconds = time.monotonic() - self._read
        self.restart_clock()
        if not math.isfinite(values["loss"]):
            raise FloatingPointError(
                f"loss is {values['loss']} at step {step}; checkpoints before this step are good: "
                "look at the data or lower optimizer.learning_rate"
            )
        pairs, generative = values.pop("attention_pairs"), values.pop("tokens/generative")
        values |= {
            "tokens_per_second": values["tokens"] / seconds,
            "step_seconds": seconds,
            "data_wait_seconds": waited,
        }
        if self._peak:
            flops = model_flops(
                self._architecture, tokens=values["tokens"], generative_tokens=generative, attention_pairs=pairs
            )
            values["mfu"] = flops / seconds / self._peak
        return values

    def log(self, step: int, values: dict[str, float]) -> None:
        """Hands a step's numbers to the trackers and the display."""
        for tracker in self._trackers:
            tracker.log(step, values)
        self._display.step(step, values)


@contextmanager
def _stop_signals() -> Generator[threading.Event]:
    """An event that SIGTERM and SIGINT set; a second signal acts as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    old = {}

    def handle(number, frame):
        stop.set()
        signal.signal(number, old[number])

    for number in (signal.SIGTERM, signal.SIGINT):
        old[number] = signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _tokenizer(config: Config, pretrained: Pretrained | None) -> Tokenizer:
    if pretrained is None:
        return open_tokenizer(config.model.tokenizer or "bytes")
    if config.model.tokenizer:
        named = open_tokenizer(config.model.tokenizer)
        if named.fingerprint != pretrained.tokenizer.fingerprint:
            raise InputError(
                f"model.tokenizer={config.model.tokenizer!r} is not the tokenizer of model.init={config.model.init!r}; "
                "remove model.tokenizer, the model's own is used then"
            )
    return pretrained.tokenizer


def _architecture(config: Config, pretrained: Pretrained | None, tokenizer: Tokenizer) -> TransformerConfig:
    """The architecture of `model.init`, which `model.architecture` may repeat, or the one from scratch."""
    given = config.model.architecture
    if pretrained is None:
        return given.resolve(tokenizer.vocab_size)
    found = pretrained.architecture.resolve(tokenizer.vocab_size)
    if given != TransformerConfig() and (given := given.resolve(tokenizer.vocab_size)) != found:
        names = [field.name for field in dataclasses.fields(found)]
        differences = [
            f"{name}={getattr(given, name)!r}, there {getattr(found, name)!r}"
            for name in names
            if getattr(given, name) != getattr(found, name)
        ]
        raise InputError(
            f"model.architecture is not that of model.init={config.model.init!r} ({'; '.join(differences)}); "
            "correct it or leave it out"
        )
    return found


def _check_folder(config: Config, folder: Path) -> None:
    saved = folder / "config.yaml"
    if not saved.exists() or not (folder / "checkpoints").exists():
        return
    changed = config_differences(load_config(saved), config, ignore=_MAY_DIFFER)
    if changed:
        raise InputError(
            f"{folder} holds a run with another config ({'; '.join(changed)}); "
            "put these values back to resume it, or choose another train.output"
        )
