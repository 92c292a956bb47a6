"""Names of the files in a run folder, besides the lock of `runs.lock`."""

from __future__ import annotations

from collections.abc import Iterator

from grit_jax import files

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
PARAMS = "params"
SET_ASIDE = "set_aside"
METRICS = "metrics.jsonl"
GOODPUT = "goodput.jsonl"
BAD_BATCHES = "bad_batches.jsonl"
PROFILE = "profile"
TENSORBOARD = "tensorboard"
PLOT = "plot.png"

_COMMITTED = "commit_success.txt"  # Orbax writes it last in a bucket; on a disk it renames the folder


def stacks(process: int) -> str:
    """The file for the stacks of a hanging process."""
    return f"stacks-{process}.txt"


def is_complete(checkpoint: files.PathLike) -> bool:
    """Whether a checkpoint was written to its end; does not open it, so it may be damaged."""
    if files.is_bucket(checkpoint):
        return _COMMITTED in files.names(checkpoint)
    return files.is_folder(checkpoint)


def checkpoint_steps(folder: files.PathLike) -> Iterator[int]:
    """Yields the steps of complete checkpoints in a folder of checkpoints, the newest first."""
    for step in sorted((int(name) for name in files.names(folder) if name.isdigit()), reverse=True):
        if is_complete(files.join(folder, str(step))):
            yield step


def last_checkpoint(run: files.PathLike) -> int | None:
    """Step of the newest complete checkpoint of a run folder, without opening any."""
    return next(checkpoint_steps(files.join(run, CHECKPOINTS)), None)
