"""A training run, from config to last checkpoint."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import grain
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from grit_jax import files
from grit_jax.checkpoints.checkpoint import CheckpointMetadata
from grit_jax.checkpoints.opening import load_params, open_model
from grit_jax.config import Config, dump_config
from grit_jax.data.batch import Batch
from grit_jax.data.pipeline import Pipeline
from grit_jax.errors import InputError
from grit_jax.inference.model import GritModel
from grit_jax.model.adapter import base_fingerprint
from grit_jax.model.pretrained import AdapterMetadata, Pretrained
from grit_jax.model.transformer import Params, abstract_params, init_params
from grit_jax.parallel import distributed, sharding
from grit_jax.parallel.distributed import JointStop
from grit_jax.parallel.execution import execution
from grit_jax.parallel.memory import ran_out
from grit_jax.parallel.sole_writer import refuse_other_writers
from grit_jax.runs import folder
from grit_jax.runs.preemption import preemption_notices
from grit_jax.text.tokenizer import Tokenizer
from grit_jax.train.callbacks import Callback, make_callbacks
from grit_jax.train.callbacks.callback import Run
from grit_jax.train.callbacks.trackers import check_trackers
from grit_jax.train.memory import lack_of_memory, rows_at_once
from grit_jax.train.objectives import trained_objectives
from grit_jax.train.objectives.objective import Objective
from grit_jax.train.resolve import check_folder, embedding_changes, host_facts, resolve_tokenizer, resolved
from grit_jax.train.resume import newest_state, taken_over
from grit_jax.train.setup import Setup, option_problem, set_up
from grit_jax.train.state import TrainState, new_state, shardings_of
from grit_jax.train.step import make_eval_step, make_gradient_norm
from grit_jax.train.stopping import stop_signals, wait_for_turn


def _open(
    config: Config, objectives: Sequence[Objective]
) -> tuple[Config, Pretrained | None, Tokenizer, Mesh, Setup, list[str]]:
    """Opens what a config refers to: the resolved config, `model.init`, and what follows from both."""
    check_trackers(config.logging)
    pretrained = open_model(config.model.init).merged() if config.model.init else None
    tokenizer = resolve_tokenizer(config, pretrained)
    config = resolved(config, pretrained, tokenizer)
    changes = embedding_changes(config, pretrained) if pretrained else []
    mesh = sharding.make_mesh(config.mesh)
    setup = set_up(config, mesh, objectives)
    check_folder(config)
    return config, pretrained, tokenizer, mesh, setup, changes


class Trainer:
    """One run: the constructor sets everything up, restoring the run folder's newest checkpoint if there is one.

    Args:
      config: The run's settings.
      scorecard: Measures the model as `config.scorecard` says; None if that names no suite.
      callbacks: Added to those of every run.
      streams: Objectives to train, each with its stream; None for those of `train.mode`.

    Attributes:
      config: The resolved config.
      tokenizer: The model's tokenizer.
      mesh: The device mesh.
      data: The batches.
      streams: Names of the streams that are trained.
      callbacks: The run's callbacks, in the order of `make_callbacks`; remove one before `fit` to leave it out.
      state: Parameters and optimizer state; `fit` replaces it with every step.

    Raises:
      InputError: The config, the data or the run folder is not usable, or no device holds the state; nothing is
        written.
    """

    def __init__(
        self,
        config: Config,
        scorecard: Callable[[GritModel], Mapping[str, float]] | None = None,
        callbacks: Sequence[Callback] = (),
        streams: Sequence[Objective] | None = None,
    ):
        if config.scorecard.suite and scorecard is None:
            raise InputError(f"scorecard.suite={config.scorecard.suite}: nothing measures it; give Trainer a scorecard")
        began = time.monotonic()
        self.folder = epath.Path(config.train.output)
        objectives = trained_objectives(config) if streams is None else streams
        opened = distributed.in_every_process(lambda: _open(config, objectives))
        config, pretrained, self.tokenizer, self.mesh, setup, self._changes = opened
        self.config = config
        distributed.require_same(host_facts(config, self.tokenizer))
        refuse_other_writers(self.folder)
        self.streams = setup.objective.names
        self._train_step = setup.train_step
        self._eval_step = make_eval_step(setup.objective)
        gradient_norm = make_gradient_norm(setup.objective)
        self.callbacks = make_callbacks(
            config, began=began, gradient_norm=gradient_norm, scorecard=scorecard, own=callbacks
        )
        trained, share = [objective.stream for objective in objectives], sharding.host_share(self.mesh)
        self.data = distributed.in_every_process(lambda: Pipeline(config, self.tokenizer, trained, host_share=share))
        distributed.require_same(self.data.host_facts())
        self._objectives, self._abstract, self._rows = setup.objective.objectives, setup.abstract, {}
        self._partition = setup.partition
        with self._explained(), jax.set_mesh(self.mesh):
            initial, self._adapter = self._initial(setup, pretrained) if setup.partition.frozen_apart else (None, None)
            base = (self._adapter, initial.frozen) if initial and self._adapter else None
            restored, self._damaged = newest_state(
                self.folder, setup.abstract, setup.partition, self.data.fingerprint, base
            )
            self.state = restored or initial or self._initial(setup, pretrained)[0]

    def _initial(self, setup: Setup, pretrained: Pretrained | None) -> tuple[TrainState, AdapterMetadata | None]:
        """The state before the first step, and the base of the run's adapters."""
        placed, key = shardings_of(setup.abstract), jax.random.key(self.config.train.seed)
        params, adapter = ({}, None) if pretrained is None else self._pretrained(pretrained, setup)
        new = {path: split for path, split in flatten_dict(placed.params).items() if path not in params}
        if new:
            params |= jax.jit(functools.partial(self._drawn, tuple(new)), out_shardings=new)(key)
        make_state = jax.jit(new_state, static_argnums=(1, 2), donate_argnums=0, out_shardings=placed)
        return make_state(unflatten_dict(params), setup.optimizer, setup.partition), adapter

    def _pretrained(
        self, pretrained: Pretrained, setup: Setup
    ) -> tuple[dict[tuple[str, ...], jax.Array], AdapterMetadata | None]:
        """The parameters of `model.init` that the run has too, by path, in the state's dtypes; the base of adapters."""
        wanted = flatten_dict(setup.abstract.params)
        dtypes = {wanted[path].dtype for path in flatten_dict(abstract_params(pretrained.model)) if path in wanted}
        params = load_params(pretrained, self.mesh, dtypes.pop() if len(dtypes) == 1 else jnp.float32)
        adapter = None
        if setup.partition.frozen_apart:
            found = base_fingerprint(pretrained, params)
            adapter = AdapterMetadata(str(self.config.model.init), found, self.config.lora)
        loaded = {path: leaf for path, leaf in flatten_dict(params).items() if path in wanted}
        return {path: leaf.astype(wanted[path].dtype) for path, leaf in loaded.items()}, adapter

    def _drawn(self, paths: Sequence[tuple[str, ...]], key: jax.Array) -> dict[tuple[str, ...], jax.Array]:
        """New parameters at some paths."""
        model = self.config.model
        drawn = flatten_dict(init_params(model.architecture, key, model.embedding.projection_dim, self.config.lora))
        return {path: drawn[path].astype(flatten_dict(self._abstract.params)[path].dtype) for path in paths}

    @contextmanager
    def _explained(self) -> Generator[None]:
        """Around the devices' work: says what to change where they lack memory, or the compiler refuses an option."""
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            problem = option_problem(error, self.config.model)
            if problem is None and ran_out(error):
                problem = lack_of_memory(error, self.config.model, self._abstract, self.mesh, self._rows)
            if problem is None:
                raise
            raise InputError(problem) from error

    def _rows_at_once(self, batch: Batch) -> dict[str, int]:
        """Rows of a device that pass through the model at once, by stream."""
        shards = sharding.axis_size(self.mesh, "batch")
        return {
            each.name: rows_at_once(each.stream, len(each.inputs(batch[each.name]).tokens), shards)
            for each in self._objectives
            if each.name in batch
        }

    @property
    def stored_params(self) -> Params:
        """The parameters that the run's checkpoints hold."""
        return self._partition.stored(self.state)

    @property
    def step(self) -> int:
        """Updates done."""
        return int(self.state.step)

    def fit(self) -> bool:
        """Trains up to `train.steps`, saving on the way.

        Returns:
          True if all steps are done, False if a signal or a preemption notice stopped the run after a last checkpoint.

        Raises:
          FloatingPointError: Loss, gradient or update was not finite `train.max_skipped` times in a row.
          InputError: Another process writes to the run folder, a device's memory is too small, or the compiler refuses
            an option of `model.compiler_options`.
        """
        config, start = self.config, self.step
        if start >= config.train.steps:
            return True
        self.folder.mkdir(parents=True, exist_ok=True)
        with (
            self._explained(),
            taken_over(self.folder, start, self._damaged, self.metadata(start)) as (writer, moved),
            stop_signals() as signalled,
            preemption_notices(signalled) if config.train.preemption_notices else nullcontext(),
            JointStop(signalled) as stop,
            jax.set_mesh(self.mesh),
            Run(self, proceed=stop.proceed, confirm=writer.confirm).watched() as run,
        ):
            if jax.process_index() == 0:
                files.write_text(self.folder / folder.CONFIG, dump_config(config))
            for line in (*self.data.summary(), *moved, *([f"resumed from step {start}"] if start else self._changes)):
                run.say(line)
            batches = self.batches(start)
            for _ in range(start, config.train.steps):
                writer.check()
                batch = sharding.place_batch(self.mesh, run.next_batch(batches))
                self._rows = self._rows_at_once(batch)
                wait_for_turn(run.meter.running, run.meter.ends, signalled)
                if not stop.proceed():
                    break
                with run.computing(batch):
                    self.state, metrics = self._train_step(self.state, batch)
                writer.check()  # again, in case the process was paused during the step: what follows is written
                run.started(metrics)
        return self.step == config.train.steps

    def batches(self, start: int) -> Iterator[Batch]:
        """The batches from step `start` on, counted from 0, which a thread makes two steps ahead."""
        steps = grain.MapDataset.range(start, self.config.train.steps).map(lambda step: self.data.batch(int(step)))
        return iter(steps.to_iter_dataset(read_options=grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))

    def evaluate(self) -> dict[str, float]:
        """Mean loss per query and per scored token on `data.validation`; empty without validation data."""
        totals: dict[str, np.ndarray] = {}
        with jax.set_mesh(self.mesh):
            for batch in self.data.validation_batches():
                found = self._eval_step(self.state.params, sharding.place_batch(self.mesh, batch))
                losses, weights = jax.device_get(found)
                for name, loss in losses.items():
                    totals[name] = totals.get(name, 0.0) + np.array([loss, weights[name]], np.float64)
        return {f"validation/{name}": float(loss / weight) for name, (loss, weight) in totals.items()}

    def model(self) -> GritModel:
        """The model as it is now; use it before the next `fit`, which takes its memory."""
        return GritModel(
            self.state.params,
            self.config.model.architecture,
            self.config.model.embedding,
            self.tokenizer,
            mesh=self.mesh,
            execution=execution(self.config.model, sharding.platform(self.mesh)),
            lora=self.config.lora,
        )

    def metadata(self, step: int) -> CheckpointMetadata:
        """Metadata of a step's checkpoint."""
        return CheckpointMetadata(
            architecture=self.config.model.architecture,
            embedding=self.config.model.embedding,
            tokenizer_files=self.tokenizer.files(),
            config=dump_config(self.config),
            data={"step": step, "fingerprint": self.data.fingerprint},
            adapter=self._adapter,
        )
