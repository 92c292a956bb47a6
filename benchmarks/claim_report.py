"""What the claim's script keeps of each model it measures, and the comparison, tables and plot that are made of it.

A folder of results has `SEED/MODEL.json` of every model and `bm25.json`. A report needs nothing else, so that a
published one can be computed again, and continued on another machine, without the models.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grit_jax import files
from grit_jax.config import InputError, parse_config
from grit_jax.evaluation.compare import Comparison, compare
from grit_jax.evaluation.likelihood import loss_per_token
from grit_jax.watch.plot import running_mean

PRIMARY = ("medquad", "wordnet_wsd", "scifact")
HELD_OUT = "held-out answers"
MARGIN = 0.02
MODELS = ("unified", "embedding", "generative")
UNTRAINED = "untrained"
_ABLATION = "ablation_"
_SAME = ("baseline", "no_packing")  # ablations whose figures must be equal
_BM25 = "bm25.json"

Scores = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Result:
    """A model that was trained and measured.

    Attributes:
      config: Its config as YAML, without paths.
      data: Digest of what it was trained on, and of its tokenizer.
      devices: What it was trained with.
      marks: Digests of the tasks: their settings and data.
      tasks: Of each task the metric, the main score, its interval and, where there is one, the score of chance.
      examples: Of the primary tasks and the held-out answers, what each example contributes to the main score.
      losses: Of each stream the steps that had samples of it, and the losses there.
      tokens: It was trained on.
      training_seconds: Steps alone, compilation included.
      wall_seconds: Training and evaluation; None where it was stopped in between.
    """

    config: str
    data: str
    devices: str
    marks: dict[str, str]
    tasks: Scores
    examples: dict[str, list[Any]]
    losses: dict[str, list[list[float]]]
    tokens: int
    training_seconds: float
    wall_seconds: float | None


def ablation(name: str) -> str:
    """The model's name of an ablation."""
    return f"{_ABLATION}{name}"


def read_result(results: Path, seed: int, name: str) -> Result | None:
    """What was kept of a model; None where it has not been measured.

    Raises:
      InputError: The file is something else.
    """
    path = results / str(seed) / f"{name}.json"
    if not path.exists():
        return None
    try:
        return Result(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: is no result of this script; remove it to measure the model again") from error


def write_result(results: Path, seed: int, name: str, result: Result) -> None:
    """Keeps a model's result."""
    _write(results / str(seed) / f"{name}.json", dataclasses.asdict(result))


def read_bm25(results: Path) -> Scores:
    """Scores of keyword search by task; empty where they have not been measured."""
    path = results / _BM25
    return json.loads(path.read_text()) if path.exists() else {}


def write_bm25(results: Path, scores: Scores) -> None:
    """Keeps the scores of keyword search."""
    _write(results / _BM25, scores)


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, json.dumps(content, ensure_ascii=False) + "\n")


def summarize(results: Path, seeds: Sequence[int], ablations: Iterable[str]) -> dict[str, Any]:
    """What claim.json holds.

    Args:
      results: Folder with a result of every model.
      seeds: What is compared.
      ablations: Those of the first seed that have been measured are shown, in this order.

    Raises:
      InputError: A seed's model has not been measured, or on other tasks than the others.
    """
    models = {name: {seed: _needed(results, seed, name) for seed in seeds} for name in (UNTRAINED, *MODELS)}
    first = {name: by_seed[seeds[0]] for name, by_seed in models.items()}
    if any(result.marks != first["unified"].marks for by_seed in models.values() for result in by_seed.values()):
        raise InputError(
            f"{results}: its models were measured on different tasks or data; run the script on them again"
        )
    config = parse_config(first["unified"].config)
    walls = {
        str(seed): [wall for by_seed in models.values() if (wall := by_seed[seed].wall_seconds) is not None]
        for seed in seeds
    }

    def examples(name: str, tasks: Sequence[str]) -> list[list[np.ndarray]]:
        return [[np.array(result.examples[task]) for task in tasks] for result in models[name].values()]

    def compared(comparison: Comparison, **better: bool) -> dict[str, Any]:
        return comparison._asdict() | {"verdict": comparison.verdict(MARGIN, **better)}

    ndcg = compare(examples("unified", PRIMARY), examples("embedding", PRIMARY))
    loss = compare(examples("unified", [HELD_OUT]), examples("generative", [HELD_OUT]), loss_per_token)
    summary: dict[str, Any] = {
        "seeds": list(seeds),
        "margin": MARGIN,
        "devices": sorted({result.devices for by_seed in models.values() for result in by_seed.values()}),
        "steps": config.train.steps,
        "queries_per_step": config.data.embedding_batch,
        "conversations_per_step": config.data.generative_batch,
        "tokens": {name: first[name].tokens for name in MODELS},
        "training_seconds": {name: first[name].training_seconds for name in MODELS},
        "wall_seconds": {seed: sum(known) for seed, known in walls.items() if len(known) == len(models)},
        "claim": {
            "mean nDCG@10": compared(ndcg) | {"against": "embedding"},
            "loss per token": compared(loss, smaller_is_better=True) | {"against": "generative"},
        },
        "bm25": read_bm25(results),
        "models": {
            name: {str(seed): result.tasks for seed, result in by_seed.items()} for name, by_seed in models.items()
        },
    }
    measured = {name: read_result(results, seeds[0], ablation(name)) for name in ablations}
    figures = {name: _figures(result.tasks) for name, result in measured.items() if result}
    if figures:
        summary["ablations"] = figures
    if figures.keys() >= set(_SAME):
        one, other = (figures[name] for name in _SAME)
        summary["packing"] = {name: one[name] / value - 1 for name, value in other.items()}
    return summary


def _needed(results: Path, seed: int, name: str) -> Result:
    result = read_result(results, seed, name)
    if result is None:
        raise InputError(f"{results}: has no {name} model of seed {seed}; leave the seed out or measure it")
    return result


def _figures(tasks: Scores) -> dict[str, float]:
    """Loss per token, and the mean nDCG@10 of the primary tasks and of each of their variants."""
    figures = {"loss per token": tasks[HELD_OUT]["main_score"]}
    for variant in [name.removeprefix(PRIMARY[0]) for name in tasks if name.startswith(PRIMARY[0])]:
        scores = [tasks[f"{name}{variant}"]["main_score"] for name in PRIMARY]
        figures[f"mean nDCG@10{variant}"] = float(np.mean(scores))
    return figures


def tables(summary: Mapping[str, Any]) -> dict[str, str]:
    """The summary's tables in Markdown, by what they show."""
    seeds = len(summary["seeds"])
    several = seeds > 1
    claim = markdown_table(
        [
            "figure", "unified", "specialist", "relative difference, 95 % interval",
            *(["of the seeds by t"] if several else []), "margin ±2 %",
        ],
        (
            [
                f"{name}, against {one['against']}-only", f"{one['value']:.4f}", f"{one['reference']:.4f}",
                f"{one['difference']:+.1%} ({_bounds(one['interval'])})",
                *([_bounds(one["run_interval"])] if several else []), one["verdict"],
            ]
            for name, one in summary["claim"].items()
        ),
    )  # fmt: skip
    first = summary["models"]["unified"][str(summary["seeds"][0])]
    tasks = markdown_table(
        [
            f"task: mean (lowest to highest of {seeds} seeds)" if several else "task", "metric",
            "BM25 (95 % interval)" if several else "BM25", "untrained",
            *(f"{name}{'' if name == 'unified' else '-only'}" for name in MODELS),
        ],
        (
            [
                name, one["metric"].replace("ndcg_at_10", "nDCG@10").replace("_", " "),
                _cell([summary["bm25"][name]]) if name in summary["bm25"] else "",
                *(
                    _cell([scores[name] for scores in summary["models"][model].values()])
                    for model in (UNTRAINED, *MODELS)
                ),
            ]
            for name, one in first.items()
        ),
    )  # fmt: skip
    found = {"claim": claim, "tasks": tasks}
    if "ablations" in summary:
        rows = [[name, f"{one['mean nDCG@10']:.4f}", f"{one['loss per token']:.4f}"]
                for name, one in summary["ablations"].items()]  # fmt: skip
        start = "mean nDCG@10 "
        variants = [
            [name.removeprefix(start), f"{value:.4f}", ""]
            for name, value in summary["ablations"].get("baseline", {}).items() if name.startswith(start)
        ]  # fmt: skip
        found["ablations"] = markdown_table(["", "mean nDCG@10", "loss per token"], rows + variants)
    if "packing" in summary:
        head = ["figure", "baseline against no_packing, relative difference"]
        found["packing"] = markdown_table(head, ([name, f"{value:+.1e}"] for name, value in summary["packing"].items()))
    return found


def _bounds(of: Sequence[float]) -> str:
    return f"{of[0]:+.1%} to {of[1]:+.1%}"


def _cell(found: Sequence[Mapping[str, Any]]) -> str:
    """Mean over seeds, with the lowest and the highest; of one with its interval over examples.

    What the interval, of several seeds the mean of their bounds, says of chance stands behind.
    """
    scores = [one["main_score"] for one in found]
    low, high = np.mean([one["interval"] for one in found], axis=0)
    bounds = (low, high) if len(scores) == 1 else (min(scores), max(scores))
    chance = found[0].get("chance")
    mark = "" if chance is None or low > chance else " below chance" if high < chance else " at chance"
    return f"{np.mean(scores):.3f} ({bounds[0]:.3f} to {bounds[1]:.3f}){mark}"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def plot(results: Path, summary: Mapping[str, Any], out: Path) -> None:
    """Draws losses of the three models and the claim's differences as PNG."""
    from matplotlib.figure import Figure

    colours = {"unified": "#2563a8", "embedding": "#d97706", "generative": "#3f8f5f"}
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for panel, stream, title in ((left, "embedding", "contrastive loss"), (middle, "generative", "loss per token")):
        for name in ("unified", stream):
            for seed in summary["seeds"]:
                steps, values = map(np.array, _needed(results, seed, name).losses[stream])
                label = name if name == "unified" else f"{name}-only"
                panel.plot(
                    steps, running_mean(values, max(1, len(values) // 15)), color=colours[name], linewidth=1.5,
                    label=label if seed == summary["seeds"][0] else None,
                )  # fmt: skip
        panel.set_title(f"{title}, training", loc="left")
        panel.set_xlabel("step")
        panel.legend(frameon=False)
    for row, one in enumerate(summary["claim"].values()):
        for bounds, width in ((one["interval"], 3), (one["run_interval"], 1)):
            if bounds:
                right.plot([100 * bound for bound in bounds], [row, row], color=colours["unified"], linewidth=width)
        right.plot(100 * one["difference"], row, "o", color=colours["unified"], markersize=8)
        right.text(100 * one["difference"], row + 0.12, one["verdict"], ha="center")
    right.axvspan(-100 * MARGIN, 100 * MARGIN, color="#dddddd", zorder=0)
    right.axvline(0, color="#888888", linewidth=1)
    right.set(yticks=range(len(summary["claim"])), ylim=(-0.5, len(summary["claim"]) - 0.5))
    right.set_yticklabels([f"{name}\nagainst {one['against']}-only" for name, one in summary["claim"].items()])
    right.set_xlabel("relative difference, % (grey: margin)")
    for panel in (left, middle, right):
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
    figure.savefig(out, dpi=110)
