"""Resuming: a run continues from its newest good checkpoint, and keeps the others."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np

from grit_jax import files
from grit_jax.checkpoints.checkpoint import CheckpointMetadata, Checkpoints, DamagedCheckpointError
from grit_jax.errors import InputError
from grit_jax.model.adapter import check_base
from grit_jax.model.pretrained import AdapterMetadata
from grit_jax.parallel import distributed
from grit_jax.parallel.sole_writer import SoleWriter, sole_writer
from grit_jax.runs import folder
from grit_jax.train.resolve import check_data, same_run
from grit_jax.train.state import Partition, TrainState


class Restored(NamedTuple):
    """Where a run resumes.

    Attributes:
      state: The newest readable state; None for a new run.
      damaged: The problem of each newer checkpoint, in this process or another, by step.
    """

    state: TrainState | None
    damaged: dict[int, str]


def newest_state(
    output: files.PathLike,
    abstract: TrainState,
    partition: Partition,
    fingerprint: str,
    base: tuple[AdapterMetadata, Any] | None = None,
) -> Restored:
    """The newest state of a run folder that every process can read.

    Args:
      output: The run folder.
      abstract: Shapes and shardings of the state.
      partition: Which parameters are trained.
      fingerprint: The data's, `Pipeline.fingerprint`.
      base: The base of the run's adapters and its frozen parameters, which checkpoints lack; None without adapters.

    Raises:
      InputError: No checkpoint can be read, data or base have changed, or processes see different checkpoints.
    """
    checkpoints = Checkpoints(files.join(output, folder.CHECKPOINTS), read_only=True)
    steps, damaged = checkpoints.steps(), {}
    distributed.require_same({"the list of checkpoints in train.output, which all hosts must share,": str(steps)})
    for step in reversed(steps):
        state, problem = None, ""
        try:
            state = _read(checkpoints, step, abstract, partition, fingerprint, base)
        except DamagedCheckpointError as error:
            problem = str(error)
        problems = [text for text in distributed.gathered_texts(problem) if text]
        if not problems:
            return Restored(state, damaged)
        damaged[step] = problem or problems[0]
    if damaged:
        raise InputError(f"{'; '.join(damaged.values())}; no checkpoint can be read: start again in another folder")
    return Restored(None, damaged)


def _read(
    checkpoints: Checkpoints,
    step: int,
    abstract: TrainState,
    partition: Partition,
    fingerprint: str,
    base: tuple[AdapterMetadata, Any] | None,
) -> TrainState:
    output, metadata = checkpoints.folder.parent, checkpoints.metadata(step)
    check_data(output, metadata.data["fingerprint"], fingerprint)
    params, opt_state = checkpoints.restore(step, partition.stored(abstract), abstract.opt_state)
    if base is None:
        trainable, frozen = partition.split(params)
    else:
        adapter, frozen = base
        check_base(output, metadata.adapter or adapter, adapter.fingerprint)
        trainable = params
    return TrainState(jax.device_put(np.int32(step), abstract.step.sharding), trainable, frozen, opt_state)


@contextmanager
def taken_over(
    output: files.PathLike, start: int, damaged: Mapping[int, str], about: CheckpointMetadata
) -> Generator[tuple[SoleWriter, list[str]]]:
    """Holds the lock of a run folder, after moving away checkpoints of the steps to repeat.

    Process 0 moves damaged checkpoints of these steps to `set_aside/`, and parameters in `params/` from another config
    or other data. Other parameters stay, as repeated steps have the same ones.

    Args:
      output: The run folder.
      start: The step to resume from.
      damaged: `Restored.damaged`.
      about: Metadata of this run's checkpoints.

    Returns:
      The lock and, in process 0, a line for each checkpoint moved.

    Raises:
      InputError: Another writer is alive, or has saved since this process looked for the newest checkpoint.
    """
    with sole_writer(output) as writer:
        moved = distributed.in_first_process(lambda: _set_aside(output, start, damaged, about))
        files.forget_listings(output)
        yield writer, moved or []


def _set_aside(output: files.PathLike, start: int, damaged: Mapping[int, str], about: CheckpointMetadata) -> list[str]:
    newer = _steps_after(start, files.join(output, folder.CHECKPOINTS))
    if unknown := [step for step in newer if step not in damaged]:
        raise InputError(
            f"{output}: another process saved step {unknown[-1]} while this one started from step {start}; "
            "run the same command again"
        )
    found = [(folder.CHECKPOINTS, step, damaged[step]) for step in newer]
    params = Checkpoints(files.join(output, folder.PARAMS), read_only=True)
    for step in _steps_after(start, params.folder):
        try:
            if not same_run(params.metadata(step), about):
                found.append((folder.PARAMS, step, f"{params.folder / str(step)} comes from another config or data"))
        except DamagedCheckpointError as error:
            found.append((folder.PARAMS, step, str(error)))
    lines = []
    for parent, step, problem in found:
        target = _free_path(files.join(output, folder.SET_ASIDE, parent, str(step)))
        files.move(files.join(output, parent, str(step)), target)
        lines.append(f"set aside: {problem}; it is now {target}")
    return lines


def _steps_after(start: int, checkpoints: files.PathLike) -> list[int]:
    return sorted(itertools.takewhile(lambda step: step > start, folder.checkpoint_steps(checkpoints)))


def _free_path(path: str) -> str:
    """`path`, or the first of `path-2`, `path-3`, ... that does not exist."""
    paths = itertools.chain([path], (f"{path}-{number}" for number in itertools.count(2)))
    return next(free for free in paths if not files.exists(free))
