"""Checkpoints on disk: Orbax folders, one per step, each complete in itself."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from os import PathLike
from typing import Any, cast

import jax
import jax.numpy as jnp
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import v1 as ocp

from grit_jax import files
from grit_jax.checkpoints import integrity
from grit_jax.config import CheckpointConfig, EmbeddingConfig, LoRAConfig, TransformerConfig
from grit_jax.errors import InputError, listed
from grit_jax.model.adapter import on_base
from grit_jax.model.lora import NO_ADAPTERS
from grit_jax.model.pretrained import AdapterMetadata, Pretrained
from grit_jax.model.transformer import Params, abstract_model, abstract_params
from grit_jax.parallel.memory import ran_out
from grit_jax.runs import folder as run_folder
from grit_jax.text.tokenizer import Tokenizer

# The parts of a checkpoint, which can be read one by one.
_PARAMS, _OPTIMIZER = "params", "optimizer"
_METRICS = ("metrics", "metrics")  # path in a checkpoint where Orbax writes its metrics


@dataclasses.dataclass(frozen=True)
class CheckpointMetadata:
    """The content of a checkpoint besides its arrays.

    Attributes:
      architecture: Resolved shape of the model.
      embedding: How its vectors are made.
      tokenizer_files: `Tokenizer.files` of its tokenizer.
      config: Resolved config of the run as YAML; None for an imported model.
      data: Position in the training data.
      merged: How a merged model was made, as `merging.merge` records it; empty for any other.
      adapter: The base of the parameters, which are then adapters and what else was trained; None for a whole model.
    """

    architecture: TransformerConfig
    embedding: EmbeddingConfig
    tokenizer_files: dict[str, str]
    config: str | None = None
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    merged: dict[str, Any] = dataclasses.field(default_factory=dict)
    adapter: AdapterMetadata | None = None

    def as_json(self) -> dict[str, Any]:
        """JSON values, without `adapter` for a whole model."""
        values = dataclasses.asdict(self)
        return values if self.adapter else {key: value for key, value in values.items() if key != "adapter"}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> CheckpointMetadata:
        """The inverse of `as_json`."""
        nested: dict[str, Any] = {
            "architecture": TransformerConfig(**stored["architecture"]),
            "embedding": EmbeddingConfig(**stored["embedding"]),
        }
        if adapter := stored.get("adapter"):
            nested["adapter"] = AdapterMetadata(**adapter | {"lora": LoRAConfig(**adapter["lora"])})
        return cls(**stored | nested)


class DamagedCheckpointError(OSError):
    """A checkpoint cannot be read; those of other steps may be intact."""


class Checkpoints:
    """The checkpoints of a folder.

    Args:
      folder: Holds one sub-folder per step; created by the first writer.
      keep: Which checkpoints to keep; None keeps all.
      timeout_seconds: How long the processes of a run wait for each other while saving; None for Orbax's default.
      read_only: Whether to write and remove nothing: half a checkpoint may be a live run's save in progress.
      confirm: Called in process 0 when a checkpoint is written but not committed; raises to prevent the commit.
    """

    def __init__(
        self,
        folder: str | PathLike[str],
        *,
        keep: CheckpointConfig | None = None,
        timeout_seconds: int | None = None,
        read_only: bool = False,
        confirm: Callable[[], None] = lambda: None,
    ):
        self.folder = epath.Path(folder) if files.is_bucket(folder) else epath.Path(folder).resolve()
        self._saver = None if read_only else _saver(self.folder, keep, timeout_seconds)
        self._confirm = confirm
        self._saving: tuple[int, Any, contextlib.ExitStack] | None = None
        self._checked: dict[int, str | None] = {}  # what `check_digests` has returned, by step

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        return sorted(run_folder.checkpoint_steps(self.folder))

    def save(
        self,
        step: int,
        params: Params,
        opt_state: Any | None,
        metadata: CheckpointMetadata,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Starts saving. Once this returns, the arrays may be overwritten; once `wait` returns, they are on disk.

        If the step already has a complete checkpoint, nothing is saved: replacing it would first delete it, and a crash
        would leave neither. The step may be lower than existing ones.

        Args:
          step: Step of this state.
          params: Parameters.
          opt_state: State of the optimizer; None saves only parameters.
          metadata: The metadata.
          metrics: Metrics by which the best checkpoints are chosen.

        Raises:
          OSError: The previous save failed, for example because the disk is full.
        """
        assert self._saver, "opened for reading only"
        self.wait()
        if run_folder.is_complete(self.folder / str(step)):
            return
        parts = {_PARAMS: params} | ({} if opt_state is None else {_OPTIMIZER: opt_state})
        about, ranked_by = metadata.as_json(), cast(Any, metrics and dict(metrics))
        # Without `force` Orbax refuses steps below the newest one. `overwrite`, with nothing to delete here, keeps it
        # from reading when every checkpoint was made, which fails if one is damaged.
        save = functools.partial(
            self._saver.save_checkpointables_async,
            metrics=ranked_by, custom_metadata=about, force=True, overwrite=True,
        )  # fmt: skip
        with contextlib.ExitStack() as committing:
            committing.enter_context(integrity.committing(self.folder / str(step), about, self._confirm))
            response = self._guarded(step, lambda: save(step, parts))
            self._saving = step, response, committing.pop_all()

    def wait(self) -> None:
        """Waits for the save in progress.

        Raises:
          OSError: It failed; earlier checkpoints are untouched.
        """
        if self._saving:
            (step, response, committing), self._saving = self._saving, None
            with committing:
                self._guarded(step, response.result)

    def close(self) -> None:
        """Waits, then closes the folder."""
        self.wait()
        if self._saver:
            self._saver.close()

    def _guarded(self, step: int, save):
        try:
            return save()
        except Exception as error:  # orbax and tensorstore raise many types
            reason = " ".join(str(error).split())
            steps = self.steps()
            kept = f"the last good checkpoint is step {steps[-1]}" if steps else "no checkpoint is kept yet"
            raise OSError(
                f"{self.folder}: saving step {step} failed ({reason[:300]}); {kept}: make room and run again"
            ) from error

    def metadata(self, step: int) -> CheckpointMetadata:
        """The metadata of the checkpoint of `step`.

        Raises:
          DamagedCheckpointError: It cannot be read.
        """
        with self._readable(step):
            digest = self._check_digests(step)
            stored: Any = ocp.checkpointables_metadata(self.folder / str(step)).custom_metadata
            integrity.check_metadata(stored, digest)
            return CheckpointMetadata.from_json(stored)

    def parameter_names(self, step: int) -> frozenset[str]:
        """Dotted paths of the parameters in the checkpoint of `step`.

        Raises:
          DamagedCheckpointError: It cannot be read.
        """
        with self._readable(step):
            self._check_digests(step)
            stored: Any = ocp.checkpointables_metadata(self.folder / str(step)).metadata
            return frozenset(flatten_dict(stored[_PARAMS], sep="."))

    def restore(self, step: int, params: Params, opt_state: Any) -> tuple[Params, Any]:
        """Reads parameters and optimizer state.

        Args:
          step: Which checkpoint.
          params: Tree of ShapeDtypeStructs with shardings; parameters without one are not read, and come back as `...`.
          opt_state: The same for the optimizer; None skips it.

        Raises:
          InputError: The checkpoint has other keys or shapes; the message lists them.
          DamagedCheckpointError: It cannot be read.
        """
        wanted = {_PARAMS: params} | ({} if opt_state is None else {_OPTIMIZER: opt_state})
        with self._readable(step):
            self._check_digests(step)
            stored = ocp.checkpointables_metadata(self.folder / str(step)).metadata
            stored = {part: stored[part] for part in wanted}
            if unread := [part for part in stored if stored[part] is None]:  # Orbax only warns
                raise ValueError(f"the content of {', '.join(unread)} cannot be read")
        for part, tree in wanted.items():
            _check_matches(f"{self.folder / str(step)}: {part}", stored[part], tree)
        asked = jax.tree.map(lambda leaf: ocp.PLACEHOLDER if leaf.sharding is None else leaf, wanted)
        with self._readable(step):
            loaded = ocp.load_checkpointables(self.folder / str(step), asked)
            return loaded[_PARAMS], loaded.get(_OPTIMIZER)

    def _check_digests(self, step: int) -> str | None:
        if step not in self._checked:
            self._checked[step] = integrity.check_digests(self.folder / str(step))
        return self._checked[step]

    @contextlib.contextmanager
    def _readable(self, step: int) -> Generator[None]:
        jax.devices()  # if JAX cannot use the platform, fail here and not as damage
        try:
            yield
        except Exception as error:  # orbax, tensorstore and json raise many types
            if ran_out(error):
                raise
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            others = ", ".join(str(other) for other in self.steps() if other != step) or "none"
            raise DamagedCheckpointError(
                f"{self.folder / str(step)}: the checkpoint is damaged ({reason}); other steps: {others}"
            ) from error


def _saver(folder: epath.Path, keep: CheckpointConfig | None, timeout_seconds: int | None) -> ocp.training.Checkpointer:
    """Orbax's checkpointer: it removes half-written checkpoints and reads none, as they may be damaged."""
    context = None
    if timeout_seconds is not None:
        context = ocp.Context()
        context.asynchronous.timeout_secs = timeout_seconds
    return ocp.training.Checkpointer(
        str(folder), preservation_policy=_Kept(folder, keep) if keep else None, context=context,
        cleanup_tmp_directories=True, lightweight_initialize=True,
    )  # fmt: skip


class _Kept:
    """Orbax's preservation policy for `CheckpointConfig`; reads the metrics of existing checkpoints when created."""

    def __init__(self, folder: epath.Path, keep: CheckpointConfig):
        self._keep = keep
        there = run_folder.checkpoint_steps(folder) if keep.keep_best else ()
        self._metrics = {step: _read_metrics(folder / str(step)) for step in there}

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Whether each checkpoint stays; it has a `step` and, if this process saved it, `metrics`."""
        keep, steps = self._keep, sorted(checkpoint.step for checkpoint in checkpoints)
        kept = set(steps[-keep.keep :])
        if keep.keep_every:
            kept |= {step for step in steps if step % keep.keep_every == 0}
        if keep.keep_best:
            sign = 1 if keep.best_is == "largest" else -1
            values = {checkpoint.step: self._value(checkpoint) for checkpoint in checkpoints}
            ranked = sorted((sign * value, step) for step, value in values.items() if value is not None)
            kept |= {step for _, step in ranked[-keep.keep_best :]}
        return [checkpoint.step in kept for checkpoint in checkpoints]

    def _value(self, checkpoint: Any) -> float | None:
        metrics = checkpoint.metrics or self._metrics.get(checkpoint.step, {})
        value = metrics.get(self._keep.best_metric)
        return value if isinstance(value, int | float) and math.isfinite(value) else None


def _read_metrics(checkpoint: epath.Path) -> dict[str, Any]:
    """The metrics of a checkpoint; empty if there are none, or they are damaged."""
    try:
        found = json.loads(files.read_text(files.join(checkpoint, *_METRICS)) or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _check_matches(where: str, stored: Any, wanted: Any) -> None:
    def shapes(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        # Tuples come back from disk as lists and named tuples as dicts, so only names are compared.
        return {jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape) for path, leaf in leaves}

    there, asked = shapes(stored), shapes(wanted)
    problems = [f"{name} is missing" for name in asked if name not in there]
    problems += [f"{name} is not expected" for name in there if name not in asked]
    problems += [
        f"{name} is {there[name]}, not {asked[name]}" for name in asked if there.get(name, asked[name]) != asked[name]
    ]
    if problems:
        raise InputError(
            f"{where}: not a checkpoint of this model ({listed(problems)}); use the config it was made with"
        )


def _locate(path: epath.Path) -> tuple[epath.Path, int | None] | None:
    """The folder of checkpoints that `path` means, and the step if it names one; None if it is neither."""
    if files.is_folder(path / run_folder.CHECKPOINTS):
        return path / run_folder.CHECKPOINTS, None
    if path.name.isdigit() and files.is_folder(path / _PARAMS):
        return path.parent, int(path.name)
    if any(name.isdigit() and files.is_folder(path / name / _PARAMS) for name in files.names(path)):
        return path, None
    return None


def is_checkpoint(path: str | PathLike[str]) -> bool:
    """Whether `path` is a run folder, a folder of checkpoints or one checkpoint."""
    return _locate(epath.Path(path)) is not None


def _listed(path: str | PathLike[str]) -> tuple[epath.Path, list[int], int | None]:
    """A folder of checkpoints, its complete steps, and the step if `path` names one."""
    located = _locate(epath.Path(path))
    if located is None:
        raise InputError(f"{path}: no checkpoint there; name a run folder, a folder of checkpoints or one checkpoint")
    folder, named = located
    steps = Checkpoints(folder, read_only=True).steps()
    if not steps:
        raise InputError(f"{path}: no complete checkpoint there; the run has not saved one yet")
    return folder, steps, named


def find_checkpoint(path: str | PathLike[str], step: int | None = None) -> epath.Path:
    """One checkpoint of a run folder or a folder of checkpoints, the newest by default; a single one is itself.

    Raises:
      InputError: There is no such checkpoint.
    """
    folder, steps, named = _listed(path)
    step = named if step is None else step
    if step is not None and step not in steps:
        raise InputError(f"{path}: no checkpoint of step {step}; there are steps {', '.join(map(str, steps))}")
    return folder / str(steps[-1] if step is None else step)


def last_checkpoints(path: str | PathLike[str], count: int) -> list[epath.Path]:
    """The last checkpoints of a run folder or a folder of checkpoints, in the order of their steps.

    Raises:
      InputError: There are fewer, or `path` is a single one.
    """
    folder, steps, named = _listed(path)
    if named is not None:
        raise InputError(f"{path} is one checkpoint; name its run folder, whose last {count} are wanted")
    if count > len(steps):
        there = ", ".join(map(str, steps))
        raise InputError(f"{folder}: holds {len(steps)} checkpoints (of steps {there}), not {count}; ask for fewer")
    return [folder / str(step) for step in steps[-count:]]


def read_metadata(path: str | PathLike[str], step: int | None = None) -> CheckpointMetadata:
    """The metadata of the checkpoint of `find_checkpoint`; raises as that and `Checkpoints.metadata` do."""
    found = find_checkpoint(path, step)
    return Checkpoints(found.parent, read_only=True).metadata(int(found.name))


def open_checkpoint(
    path: str | PathLike[str], step: int | None = None, *, open_base: Callable[[str], Pretrained] | None = None
) -> Pretrained:
    """The model of the checkpoint of `find_checkpoint`.

    Args:
      path: Where it is.
      step: Checkpoint to take; None takes the newest.
      open_base: Opens the base of adapters.

    Raises:
      InputError: There is no such checkpoint, or its base cannot be opened.
    """
    found = find_checkpoint(path, step)
    checkpoints, step = Checkpoints(found.parent, read_only=True), int(found.name)
    metadata = checkpoints.metadata(step)
    adapter = metadata.adapter
    lora = adapter.lora if adapter else NO_ADAPTERS
    model = abstract_model(metadata.architecture, metadata.embedding.projection_dim, lora)
    shapes = flatten_dict(abstract_params(model), sep=".")
    held = checkpoints.parameter_names(step) if adapter else frozenset(shapes)

    def load(shardings: Any, dtype: Any = jnp.float32) -> Params:
        asked = flatten_dict(shardings, sep=".")
        wanted = {name: jax.ShapeDtypeStruct(shapes[name].shape, dtype, sharding=asked.get(name)) for name in held}
        params = flatten_dict(checkpoints.restore(step, unflatten_dict(wanted, sep="."), None)[0], sep=".")
        return unflatten_dict({name: params[name] for name in asked}, sep=".")

    tokenizer = Tokenizer.from_files(metadata.tokenizer_files)
    about = metadata.architecture, metadata.embedding, tokenizer, load
    if adapter is None:
        return Pretrained(*about)
    assert open_base
    try:
        base = open_base(adapter.base).merged()
    except InputError as error:
        raise InputError(f"{path}: its adapters need their base {adapter.base}: {error}") from error
    return on_base(path, Pretrained(*about, adapter, held), base)


def refuse_used(folder: str | PathLike[str]) -> None:
    """Raises `InputError` if the folder of a new checkpoint holds something."""
    if files.exists(folder) and (not files.is_folder(folder) or files.names(folder)):
        raise InputError(f"{folder} exists and is not empty; choose another folder")


def save_params(folder: str | PathLike[str], params: Params, metadata: CheckpointMetadata) -> None:
    """Writes a checkpoint folder with only parameters, as step 0, and waits for it.

    It copies at most the largest parameter at a time, for hosts whose memory is nearly full of parameters.
    """
    context = ocp.Context()
    context.memory.write_concurrent_bytes = 1 + max(leaf.nbytes for leaf in jax.tree.leaves(params))
    with context:
        checkpoints = Checkpoints(folder)
        checkpoints.save(0, params, None, metadata)
        checkpoints.close()
