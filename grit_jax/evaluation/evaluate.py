"""Evaluates a model on every task of a suite, and reports the scores."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import rich.console
import rich.progress

from grit_jax import files
from grit_jax.errors import InputError
from grit_jax.evaluation.generation import AlpacaEval
from grit_jax.evaluation.report import Entry, entry, fingerprint, read_report, show, write_report
from grit_jax.evaluation.suite import Suite
from grit_jax.evaluation.task import Progress, Session
from grit_jax.inference.model import GritModel


class _Bar(Progress):
    """A progress bar on a terminal."""

    def __init__(self, bar: rich.progress.Progress, name: str):
        self._bar, self._name, self._part = bar, name, None

    def start(self, part: str, total: int) -> None:
        self.end()
        self._part = self._bar.add_task(f"{self._name}: {part}", total=total)

    def advance(self, count: int) -> None:
        assert self._part is not None
        self._bar.advance(self._part, count)

    def end(self) -> None:
        if self._part is not None:
            self._bar.remove_task(self._part)
        self._part = None


def evaluate(
    model: GritModel,
    suite: Suite,
    *,
    output: Path | None = None,
    examples: Path | None = None,
    about: dict[str, str] | None = None,
) -> dict[str, Entry]:
    """Evaluates a model on every task of a suite; prints progress and a table.

    A task of an earlier report in `output` is kept if its settings, data, seed and model are the same and the files
    that it wrote beside the report are unchanged.

    Args:
      model: The model to evaluate.
      suite: The tasks.
      output: JSON file, written after every task; completions go beside it.
      examples: Folder for each example's contribution to its task's main score, `TASK.npy`, by which two models can be
        compared example by example.
      about: Further keys of the report, such as the model's path.

    Returns:
      The entry of each task in the report.

    Raises:
      InputError: Data are missing or malformed, or `output` exists and is not a report.
    """
    for task in suite.tasks:
        if isinstance(task, AlpacaEval) and output is None:
            raise InputError(f"task {task.name!r} only writes completions; give --output, beside which they go")
    weights = model.fingerprint()
    fingerprints = {task.name: fingerprint(task, suite, weights) for task in suite.tasks}  # opens all files first
    earlier = read_report(output) if output else {}
    entries = {
        name: one for name, one in earlier.items()
        if one.get("fingerprint") == fingerprints.get(name) and _is_whole(one, _side_files(name, output, examples))
    }  # fmt: skip
    console = rich.console.Console(stderr=True, highlight=False, soft_wrap=True)
    columns = (rich.progress.TextColumn("{task.description}"), rich.progress.BarColumn(),
               rich.progress.MofNCompleteColumn())  # fmt: skip
    with rich.progress.Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        for number, task in enumerate(suite.tasks, start=1):
            label = f"{number}/{len(suite.tasks)} {task.name}"
            if task.name in entries:
                console.print(f"{label}: kept, {_main_score(entries[task.name])}", markup=False)
                continue
            progress, begun = _Bar(bar, label), time.monotonic()
            session = Session(model, suite.max_length, suite.seed, progress)
            outcome = task.evaluate(session)
            progress.end()
            found = entry(task, outcome, fingerprint=fingerprints[task.name], seed=suite.seed)
            entries[task.name] = found
            console.print(f"{label}: {_main_score(found)} in {time.monotonic() - begun:.1f} s", markup=False)
            written = _side_files(task.name, output, examples)
            if "examples" in written:
                written["examples"].parent.mkdir(parents=True, exist_ok=True)
                np.save(written["examples"], outcome.examples)
            if outcome.completions is None:
                written.pop("answers", None)
            elif "answers" in written:
                text = json.dumps(outcome.completions, indent=2, ensure_ascii=False)
                files.write_text(written["answers"], f"{text}\n")
            found["written"] = {key: files.sha256(path) for key, path in written.items()}
            if output:
                write_report(output, {name: entries[name] for name in fingerprints if name in entries}, about or {})
    report = {name: entries[name] for name in fingerprints}
    show(report, rich.console.Console(highlight=False))
    return report


def _side_files(name: str, output: Path | None, examples: Path | None) -> dict[str, Path]:
    """The files that a task may write beside the report."""
    paths = {
        "examples": examples and examples / f"{name}.npy",
        "answers": output and output.with_name(f"{output.stem}.{name}.json"),
    }
    return {key: path for key, path in paths.items() if path}


def _is_whole(found: Entry, side_files: dict[str, Path]) -> bool:
    """Whether the files of a finished task are unchanged."""
    written = found.get("written", {})
    wanted = {"examples", *written} & side_files.keys()
    return "written" in found and all(
        side_files[key].exists() and written.get(key) == files.sha256(side_files[key]) for key in wanted
    )


def _main_score(found: Entry) -> str:
    return "answered" if found["main_score"] is None else f"{found['metric']} {found['main_score']:.4f}"
