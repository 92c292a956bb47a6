"""The report: main scores with bootstrap intervals, kept until something that they depend on changes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import rich.console
import rich.table
from rich.markup import escape

from grit_jax import files
from grit_jax.errors import InputError
from grit_jax.evaluation.reading import existing
from grit_jax.evaluation.scores import BOOTSTRAP_DRAWS, percentile_interval
from grit_jax.evaluation.suite import PATHS, TYPES, Suite
from grit_jax.evaluation.task import Outcome, Task, mean

Entry = dict[str, Any]

_NOT_SETTINGS = {"name", *PATHS}  # the content of files counts, not their paths
_TYPE_NAMES = {task_type: name for name, task_type in TYPES.items()}


def interval(outcome: Outcome, seed: int) -> tuple[float, float]:
    """The main score's 95 % interval by the percentile bootstrap over examples (Efron, 1979), 1000 draws.

    If the score is not a mean, the bias of the draws is subtracted: examples drawn twice agree with themselves, which
    lifts a v-measure by more than its spread. The interval is clipped to the score's bounds.
    """
    generator, examples = np.random.default_rng(seed), outcome.examples
    draws = [
        outcome.score(examples[generator.integers(len(examples), size=len(examples))]) for _ in range(BOOTSTRAP_DRAWS)
    ]
    low, high = percentile_interval(draws)
    bias = 0.0 if outcome.score is mean else float(np.mean(draws) - outcome.score(examples))
    least, most = np.clip([low - bias, high - bias], *outcome.bounds).tolist()
    return least, most


def entry(task: Task, outcome: Outcome, *, fingerprint: str, seed: int) -> Entry:
    """A task's entry in the report."""
    scored = len(outcome.examples) > 0
    return {
        "type": _TYPE_NAMES[type(task)],
        "metric": outcome.metric,
        "main_score": outcome.score(outcome.examples) if scored else None,
        "interval": list(interval(outcome, seed)) if scored else None,
        "num_examples": len(outcome.examples),
        **outcome.scores,
        "fingerprint": fingerprint,
    }


def fingerprint(task: Task, suite: Suite, model: str) -> str:
    """Identifies a result: it changes with settings, data, model and version."""
    settings = {
        field.name: getattr(task, field.name) for field in dataclasses.fields(task)
        if field.name not in _NOT_SETTINGS
    }  # fmt: skip
    about: list[Any] = [type(task).__name__, settings, suite.max_length, suite.seed, model, version("grit-jax")]
    if shots := getattr(task, "shots_path", None):  # records of `path` may be examples; file names are those of groups
        about += [shots == task.path, [file.name for file in task.files() if file.parent == Path(shots)]]
    digest = hashlib.sha256(json.dumps(about).encode())
    for path in map(existing, task.files()):
        digest.update(bytes.fromhex(files.sha256(path)))
    return digest.hexdigest()[:16]


def read_report(path: Path) -> dict[str, Entry]:
    """The tasks of an earlier report; none without one.

    Raises:
      InputError: The file is not a report.
    """
    text = files.read_text(path)
    if text is None:
        return {}
    try:
        return dict(json.loads(text)["tasks"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"--output {path}: exists and is not a report; choose another file") from error


def write_report(path: Path, tasks: dict[str, Entry], about: dict[str, Any]) -> None:
    """Writes the whole report."""
    files.write_text(path, json.dumps({**about, "tasks": tasks}, indent=2) + "\n")


def show(tasks: dict[str, Entry], console: rich.console.Console) -> None:
    """Prints the table of scores."""
    table = rich.table.Table("task", "metric", "score", "95 % interval", "examples")
    for name, one in tasks.items():
        score, bounds = ("-", "-") if one["main_score"] is None else (
            f"{one['main_score']:.4f}", " to ".join(f"{bound:.4f}" for bound in one["interval"])
        )  # fmt: skip
        table.add_row(escape(name), one["metric"] or "-", score, bounds, f"{one['num_examples']:,}")
    console.print(table)
