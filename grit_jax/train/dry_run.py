"""What can be checked before an expensive start, all but the last within seconds.

The last compiles the step. The only file left behind is a token index, made if the run to resume has data without one.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from grit_jax import files
from grit_jax.checkpoints.checkpoint import Checkpoints, DamagedCheckpointError
from grit_jax.checkpoints.opening import open_model
from grit_jax.config import Config
from grit_jax.data.batch import ONE_HOST
from grit_jax.data.pipeline import Pipeline
from grit_jax.data.records import RECORD_TYPES, RecordError
from grit_jax.data.sources import Source, find_files, open_source
from grit_jax.data.streams import trained_streams
from grit_jax.model.pretrained import Pretrained
from grit_jax.parallel import sharding
from grit_jax.parallel.memory import device_memory, ran_out
from grit_jax.runs import folder
from grit_jax.runs.checks import Check, checked, verdict
from grit_jax.runs.lock import read_writer
from grit_jax.text.tokenizer import Tokenizer
from grit_jax.train.callbacks.trackers import check_trackers
from grit_jax.train.memory import (
    advice,
    device_bytes,
    gib,
    packed_rows,
    rows_at_once,
    state_and_gradient_bytes,
    step_memory,
)
from grit_jax.train.resolve import (
    check_data,
    check_folder,
    embedding_changes,
    resolve_tokenizer,
    resolved,
)
from grit_jax.train.setup import Setup, lower_step, option_problem, set_up
from grit_jax.train.state import TrainState

_SAMPLED_RECORDS = 200  # of each file


def dry_run(config: Config) -> Iterator[Check]:
    """Checks a config against this machine, its data and its run folder, one line each.

    A check is left out if one that it depends on failed.
    """
    yield from _data_checks(config)
    init, pretrained, tokenizer, ready = config.model.init, None, None, None
    if init:
        check, pretrained = checked("model.init", lambda: open_model(init).merged(), lambda _: f"{init} can be read")
        yield check
    if pretrained or not init:
        check, tokenizer = checked(
            "tokenizer", lambda: resolve_tokenizer(config, pretrained), lambda found: f"{found.vocab_size:,} tokens"
        )
        yield check
    if pretrained:
        check, _ = checked(
            "model.embedding",
            lambda: embedding_changes(config, pretrained),
            lambda changes: "; ".join(changes) or "as in model.init",
        )
        yield check
    check, mesh = checked("mesh", lambda: sharding.make_mesh(config.mesh), _described)
    yield check
    if tokenizer is not None and mesh is not None:
        ready = yield from _setup_checks(config, pretrained, tokenizer, mesh)
    check, _ = checked(
        "logging", lambda: check_trackers(config.logging), lambda names: ", ".join(["metrics.jsonl", *names])
    )
    yield check
    yield _write_check(config.train.output)
    yield _writer_check(config.train.output)
    if ready is not None and mesh is not None:
        yield _step_check(*ready, mesh)


def _data_checks(config: Config) -> Iterator[Check]:
    """Checks that every file opens, that sampled records are well formed, and that every trained stream has a file."""
    if not config.data.train:
        yield verdict("data.train", False, "data.train is missing; name the files or folders to train on")
        return
    for key, paths in (("data.train", config.data.train), ("data.validation", config.data.validation)):
        if not paths:
            continue
        failure, sources = checked(
            key, lambda paths=paths: [_sampled(path, config.data.skip_bad) for path in find_files(paths)], lambda _: ""
        )
        if sources is None:
            yield failure
            continue
        counts = Counter[str]()
        for source in sources:
            counts[source.record_type.name] += len(source)
        trained = trained_streams(config) if key == "data.train" else []
        missing = [stream.name for stream in trained if not counts[stream.record.name]]
        text = ", ".join(f"{counts[each.name]:,} {each.name} records" for each in RECORD_TYPES if counts[each.name])
        if missing:
            text += f"; no {missing[0]} file, and train.mode={config.train.mode} trains that stream"
        else:
            text += f" in {len(sources)} files; up to {_SAMPLED_RECORDS} of each were parsed"
        yield verdict(key, not missing, text)


def _sampled(path: Any, skip_bad: bool) -> Source:
    source = open_source(path, skip_bad=skip_bad)
    for number in np.unique(np.linspace(0, len(source) - 1, _SAMPLED_RECORDS).astype(int)).tolist():
        try:
            source[number]
        except RecordError:
            if not skip_bad:
                raise
    return source


def _setup_checks(
    config: Config, pretrained: Pretrained | None, tokenizer: Tokenizer, mesh: jax.sharding.Mesh
) -> Generator[Check, None, tuple[Config, Setup] | None]:
    """Checks the step's parts; returns them if a device's memory holds the state."""

    def ready() -> tuple[Config, Setup]:
        found = resolved(config, pretrained, tokenizer)
        return found, set_up(found, mesh)

    check, found = checked("shapes", ready, lambda _: "batch, lengths and parameters fit the mesh and the model")
    yield check
    if found is None:
        return None
    config, setup = found
    yield (memory := _memory_check(setup.abstract, mesh))
    yield _space_check(config, setup)
    check, _ = checked(
        "resume", lambda: _check_resume(config, tokenizer), lambda _: "train.output is new, or holds this run"
    )
    yield check
    return found if memory.passed else None


def _check_resume(config: Config, tokenizer: Tokenizer) -> None:
    """Checks what `train.output` holds against config and data, which may have to be tokenized."""
    check_folder(config)
    path = files.join(config.train.output, folder.CHECKPOINTS)
    if not files.exists(path):
        return
    checkpoints = Checkpoints(path, read_only=True)
    for step in reversed(checkpoints.steps()):
        with contextlib.suppress(DamagedCheckpointError):  # the run passes over it
            recorded = checkpoints.metadata(step).data["fingerprint"]
            data = Pipeline(config, tokenizer, trained_streams(config), host_share=ONE_HOST)
            check_data(config.train.output, recorded, data.fingerprint)
            return


def _described(mesh: jax.sharding.Mesh) -> str:
    shape = ", ".join(f"mesh.{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    return f"{mesh.size} x {mesh.devices.flat[0].device_kind} as {shape}"


def _memory_check(abstract: TrainState, mesh: jax.sharding.Mesh) -> Check:
    """Compares the least that a step needs with a device's memory."""
    state, gradient = device_bytes(abstract), device_bytes(abstract.trainable)
    needed = f"{gib(state)} of state and {gib(gradient)} of gradients on each device"
    limit = device_memory(mesh.devices.flat[0], mesh.size)
    if limit is None:
        return verdict("memory", True, f"{needed}; a device's memory is unknown here")
    fits = state + gradient <= limit
    remedy = "" if fits else "; use more devices, a larger mesh.fsdp, or a smaller model"
    return verdict("memory", fits, f"{needed}, of {gib(limit)}{remedy}")


def _step_check(config: Config, setup: Setup, mesh: jax.sharding.Mesh) -> Check:
    """Compiles the step for this machine, and estimates its memory; fails only where the compiler refuses an option.

    Most texts are shorter than their limits, so a run may do with less memory than this.
    """
    began, shards = time.monotonic(), sharding.axis_size(mesh, "batch")
    streams = {each.name: each.stream for each in setup.objective.objectives}
    rows = {name: packed_rows(stream, stream.full_step(), shards) for name, stream in streams.items()}
    arguments = peak = None
    try:
        memory = step_memory(lower_step(setup, mesh, rows).compile(), sharding.platform(mesh))
    except jax.errors.JaxRuntimeError as error:
        if problem := option_problem(error, config.model):
            return verdict("step", False, problem)
        if not ran_out(error):
            raise
        text = "more than a device's memory, says the compiler"
    else:
        arguments, peak = memory.argument_bytes, memory.peak_bytes
        text = f"{gib(peak)} on each device, {gib(arguments)} of it state and batch"
    text = f"estimate, with every text at its limit: {text}; compiled in {time.monotonic() - began:.0f} s"
    limit = device_memory(mesh.devices.flat[0], mesh.size)
    if peak is None or (limit is not None and peak > limit):
        remedy = advice(
            config.model,
            {name: rows_at_once(stream, rows[name], shards) for name, stream in streams.items()},
            limit=limit,
            state_bytes=state_and_gradient_bytes(setup.abstract),
            argument_bytes=arguments,
            peak_bytes=peak,
        )
        text += f"; it may not fit: {remedy}"
    return verdict("step", True, text)


def _space_check(config: Config, setup: Setup) -> Check:
    stored = setup.partition.stored(setup.abstract), setup.abstract.opt_state, setup.abstract.step
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(stored))
    number = config.checkpoint.keep + config.checkpoint.keep_best + 1  # one more: old ones go after a new one
    needed = f"{number} checkpoints of {gib(size)}"
    if files.is_bucket(config.train.output):
        return verdict("space", True, f"{needed} in a bucket, which has no limit")
    free = shutil.disk_usage(_existing(config.train.output)).free
    fits = number * size <= free
    remedy = "" if fits else "; make room, lower checkpoint.keep, or choose another train.output"
    return verdict("space", fits, f"{needed}, {gib(free)} free{remedy}")


def _write_check(output: str) -> Check:
    """Writes a file where the run folder is or will be, and removes it."""
    parent = output if files.is_bucket(output) else str(_existing(output))
    probe = files.join(parent, f".probe-{uuid.uuid4().hex}")
    try:
        files.write_text(probe, "")
        files.remove(probe)
    except (OSError, files.UnreachableError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return verdict("train.output", False, f"{output} cannot be written ({reason[:200]})")
    return verdict("train.output", True, f"{output} can be written")


def _existing(output: str) -> Path:
    path = Path(output).absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _writer_check(output: str) -> Check:
    writer = read_writer(output)
    if writer is None:
        return verdict("writer", True, "nobody writes to train.output")
    if not writer.alive:
        return verdict("writer", True, f"a dead one is taken over: {writer}")
    return verdict("writer", False, f"train.output is being written by {writer}; end it or choose another one")
