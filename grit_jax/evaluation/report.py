"""The report: main scores with bootstrap intervals, kept as long as nothing they come from has changed."""

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
from grit_jax.evaluation.data import existing
from grit_jax.evaluation.metrics import BOOTSTRAP_DRAWS, percentile_interval
from grit_jax.evaluation.suite import PATHS, Suite
from grit_jax.evaluation.task import Outcome, Task, mean

Entry = dict[str, Any]

_NOT_SETTINGS = {"name", *PATHS}  # what is in the files counts, not where they are


def interval(outcome: Outcome, seed: int) -> tuple[float, float]:
    """The main score's 95 % interval by the percentile bootstrap over examples (Efron, 1979), 1000 draws.

    Where the score is no mean, the mean distance of the draws from it is taken off: examples that are drawn twice agree
    with themselves, which lifts a v-measure by more than its spread. It ends where the score does.
    """
    generator, examples = np.random.default_rng(seed), outcome.examples
    scores = []
    for _ in range(BOOTSTRAP_DRAWS):
        drawn = generator.integers(len(examples), size=len(examples))
        scores.append(outcome.score(examples[drawn]))
    low, high = percentile_interval(scores)
    bias = 0.0 if outcome.score is mean else float(np.mean(scores) - outcome.score(examples))
    least, most = np.clip([low - bias, high - bias], *outcome.bounds).tolist()
    return least, most


def entry(outcome: Outcome, *, kind: str, fingerprint: str, seed: int) -> Entry:
    """What the report says of one task."""
    scored = len(outcome.examples) > 0
    return {
        "type": kind,
        "metric": outcome.metric,
        "main_score": outcome.score(outcome.examples) if scored else None,
        "interval": list(interval(outcome, seed)) if scored else None,
        "num_examples": len(outcome.examples),
        **outcome.figures,
        "fingerprint": fingerprint,
    }


def fingerprint(task: Task, suite: Suite, model: str) -> str:
    """Names a result: another where settings, data, model or version are others."""
    settings = {
        field.name: getattr(task, field.name) for field in dataclasses.fields(task)
        if field.name not in _NOT_SETTINGS
    }  # fmt: skip
    about: list[Any] = [type(task).__name__, settings, suite.max_length, suite.seed, model, version("grit-jax")]
    if shots := getattr(task, "shots_path", None):  # rows of `path` are examples then; files are named after groups
        about += [shots == task.path, [file.name for file in task.files() if file.parent == Path(shots)]]
    digest = hashlib.sha256(json.dumps(about).encode())
    for path in map(existing, task.files()):
        digest.update(bytes.fromhex(files.sha256(path)))
    return digest.hexdigest()[:16]


def read_report(path: Path) -> dict[str, Entry]:
    """The tasks of an earlier report; none where there is none.

    Raises:
      InputError: The file is something else.
    """
    text = files.read_text(path)
    if text is None:
        return {}
    try:
        return dict(json.loads(text)["tasks"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"--output {path}: is there and is no report; choose another file") from error


def write_report(path: Path, tasks: dict[str, Entry], about: dict[str, Any]) -> None:
    """Writes the report whole."""
    files.write_text(path, json.dumps({**about, "tasks": tasks}, indent=2) + "\n")


def show(tasks: dict[str, Entry], console: rich.console.Console) -> None:
    """Prints the table."""
    table = rich.table.Table("task", "metric", "score", "95 % interval", "examples")
    for name, one in tasks.items():
        score, bounds = ("-", "-") if one["main_score"] is None else (
            f"{one['main_score']:.4f}", " to ".join(f"{bound:.4f}" for bound in one["interval"])
        )  # fmt: skip
        table.add_row(escape(name), one["metric"] or "-", score, bounds, f"{one['num_examples']:,}")
    console.print(table)
