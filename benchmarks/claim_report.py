"""The results that the claim's script keeps of each model, and the comparison, tables and plot made from them.

A folder of results has `SEED/MODEL.json` for every model, and `bm25.json`. Nothing else is needed to compute published
figures again, or to continue on another machine, without the models.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pages import COLOURS, draw_differences, markdown_table, save_drawing

from grit_jax import files
from grit_jax.config import parse_config
from grit_jax.errors import InputError
from grit_jax.evaluation.compare import Comparison, compare
from grit_jax.evaluation.likelihood import loss_per_token
from grit_jax.evaluation.task import mean
from grit_jax.runs.history import running_mean

PRIMARY = ("medquad", "wordnet_wsd", "scifact")
HELD_OUT = "held-out answers"
MARGIN = 0.02
MODELS = ("unified", "embedding", "generative")
UNTRAINED = "untrained"
_ABLATION = "ablation_"
_BM25 = "bm25.json"
_COLOURS = dict(zip(MODELS, COLOURS, strict=False))

T = TypeVar("T")
Scores = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of training and measuring a model.

    Attributes:
      config: Its config as YAML, without paths.
      data: Digest of its training data and tokenizer.
      devices: The devices that it was trained on.
      marks: Digests of the tasks: their settings and data.
      tasks: For each task the metric, the main score, its interval and, if there is one, the score of chance.
      examples: For the held-out answers, and the primary tasks and their variants, each example's contribution to the
        main score.
      losses: For each stream the steps with samples of it, and the losses there.
      tokens: Number of training tokens.
      training_seconds: Time of the steps, compilation included.
      wall_seconds: Time of training and evaluation; None if stopped in between.
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


@dataclasses.dataclass(frozen=True)
class KeywordSearch:
    """BM25 on the retrieval tasks: digests of the tasks, and scores as in `Result`."""

    marks: dict[str, str]
    tasks: Scores


@dataclasses.dataclass(frozen=True)
class Figure:
    """A number to compare models by: the mean of some tasks' scores."""

    name: str
    tasks: tuple[str, ...]
    score: Callable[[np.ndarray], float] = mean
    smaller_is_better: bool = False

    def compare(self, results: Iterable[Result], reference: Iterable[Result]) -> Comparison:
        """Compares two models, each trained once or several times."""
        ours, theirs = (
            [[np.array(result.examples[task]) for task in self.tasks] for result in some]
            for some in (results, reference)
        )
        return compare(ours, theirs, self.score)


NDCG = Figure("mean nDCG@10", PRIMARY)
LOSS = Figure("loss per token", (HELD_OUT,), loss_per_token, smaller_is_better=True)


def ablation(name: str) -> str:
    """The name of an ablation's model."""
    return f"{_ABLATION}{name}"


def read_result(results: Path, seed: int, name: str) -> Result | None:
    """A model's stored result; None if it has not been measured.

    Raises:
      InputError: The file is something else.
    """
    return _read(results / str(seed) / f"{name}.json", Result)


def write_result(results: Path, seed: int, name: str, result: Result) -> None:
    """Stores a model's result."""
    _write(results / str(seed) / f"{name}.json", result)


def read_bm25(results: Path) -> KeywordSearch | None:
    """The stored result of keyword search; None if it has not been measured.

    Raises:
      InputError: The file is something else.
    """
    return _read(results / _BM25, KeywordSearch)


def write_bm25(results: Path, found: KeywordSearch) -> None:
    """Stores the result of keyword search."""
    _write(results / _BM25, found)


def _read(path: Path, kind: Callable[..., T]) -> T | None:
    if not path.exists():
        return None
    try:
        return kind(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: is no result of this script; remove it to measure again") from error


def _write(path: Path, kept: Result | KeywordSearch) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, json.dumps(dataclasses.asdict(kept), ensure_ascii=False) + "\n")


def summarize(results: Path, seeds: Sequence[int], ablations: Iterable[str]) -> dict[str, Any]:
    """The content of claim.json.

    Args:
      results: Folder with the result of every model.
      seeds: The seeds to compare.
      ablations: Names of ablations; those measured with the first seed are shown, in this order.

    Raises:
      InputError: Keyword search or a seed's model has not been measured, or a model has other tasks or data than the
        rest.
    """
    models = {name: {seed: _needed(results, seed, name) for seed in seeds} for name in (UNTRAINED, *MODELS)}
    first = {name: by_seed[seeds[0]] for name, by_seed in models.items()}
    everyone = {f"{seed}/{name}": result for name, by_seed in models.items() for seed, result in by_seed.items()}
    _refuse_different(results, everyone, {task for result in everyone.values() for task in result.marks})
    keywords = read_bm25(results)
    if keywords is None or not keywords.marks.items() <= first["unified"].marks.items():
        raise InputError(f"{results}: keyword search was not measured on these tasks; run the script again")
    config = parse_config(first["unified"].config)
    walls = {
        str(seed): [wall for by_seed in models.values() if (wall := by_seed[seed].wall_seconds) is not None]
        for seed in seeds
    }

    def compared(name: str, specialist: str, figure: Figure) -> dict[str, Any]:
        comparison = figure.compare(models[name].values(), models[specialist].values())
        verdict = comparison.verdict(MARGIN, smaller_is_better=figure.smaller_is_better)
        return comparison._asdict() | {"verdict": verdict, "against": specialist}

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
            NDCG.name: compared("unified", "embedding", NDCG),
            LOSS.name: compared("unified", "generative", LOSS),
        },
        "bm25": keywords.tasks,
        "models": {
            name: {str(seed): result.tasks for seed, result in by_seed.items()} for name, by_seed in models.items()
        },
    }
    measured = {name: read_result(results, seeds[0], ablation(name)) for name in ablations}
    found = {name: result for name, result in measured.items() if result}
    if "baseline" in found:
        baseline = found["baseline"]
        named = {f"{seeds[0]}/{ablation(name)}": result for name, result in found.items()}
        _refuse_different(results, named, {HELD_OUT, *PRIMARY})
        summary["ablations"] = {name: _ablation(result, baseline, [NDCG, LOSS]) for name, result in found.items()}
        summary["variants"] = _variants(baseline)
    return summary


def _refuse_different(results: Path, compared: Mapping[str, Result], tasks: Set[str]) -> None:
    """Refuses models that were trained on other data, or measured on other tasks or data, than the first of them."""
    about = {name: (result.data, *map(result.marks.get, tasks)) for name, result in compared.items()}
    first, *_ = about
    if others := [name for name in about if about[name] != about[first]]:
        raise InputError(
            f"{results}: {', '.join(others)}: trained or measured on other data or tasks than {first}; remove these "
            "files and run the script again, or choose another --output"
        )


def _ablation(result: Result, baseline: Result, figures: Sequence[Figure]) -> dict[str, Any]:
    """Its figures, each with the relative difference from the baseline's, and the seconds of its training."""
    compared = {figure.name: figure.compare([result], [baseline])._asdict() for figure in figures}
    kept = ("value", "difference", "interval")
    return {name: {key: one[key] for key in kept} for name, one in compared.items()} | {
        "training_seconds": result.training_seconds
    }


def _variants(baseline: Result) -> dict[str, Any]:
    """The same for variants of the primary tasks, by the suffix of their names."""
    others = [name.removeprefix(PRIMARY[0]) for name in baseline.tasks if name.startswith(f"{PRIMARY[0]} ")]
    found = {}
    for variant in others:
        renamed = {name: baseline.examples[f"{name}{variant}"] for name in PRIMARY}
        found[variant.strip()] = _ablation(dataclasses.replace(baseline, examples=renamed), baseline, [NDCG])
    return found


def _needed(results: Path, seed: int, name: str) -> Result:
    result = read_result(results, seed, name)
    if result is None:
        raise InputError(f"{results}: has no {name} model of seed {seed}; leave the seed out or measure it")
    return result


def tables(summary: Mapping[str, Any]) -> dict[str, str]:
    """The summary's tables in Markdown, by name."""
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
            f"task{f': mean of {seeds} seeds' if several else ''} (95 % interval over examples)", "metric", "BM25",
            "untrained",
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
        head = ["", *(column for figure in (NDCG, LOSS) for column in (figure.name, "against baseline")), "seconds"]
        rows = [
            [name, *_against(one, NDCG), *_against(one, LOSS), f"{one['training_seconds']:.0f}"]
            for name, one in summary["ablations"].items()
        ]
        rows += [[name, *_against(one, NDCG), "", "", ""] for name, one in summary["variants"].items()]
        found["ablations"] = markdown_table(head, rows)
    return found


def _against(one: Mapping[str, Any], figure: Figure) -> list[str]:
    """A figure of an ablation, and how far it is from the baseline's."""
    found = one[figure.name]
    difference = found["difference"]
    shown = f"{difference:+.1%}" if abs(difference) >= 0.0005 else f"{100 * difference:+.1g}%"
    return [f"{found['value']:.4f}", f"{shown} ({_bounds(found['interval'])})"]


def _bounds(of: Sequence[float]) -> str:
    return f"{of[0]:+.1%} to {of[1]:+.1%}"


def _cell(found: Sequence[Mapping[str, Any]]) -> str:
    """Mean over seeds of the score and of its interval's bounds over examples, and how it compares with chance."""
    score, low, high = np.mean([[one["main_score"], *one["interval"]] for one in found], axis=0)
    chance = found[0].get("chance")
    mark = "" if chance is None or low > chance else " below chance" if high < chance else " at chance"
    return f"{score:.3f} ({low:.3f} to {high:.3f}){mark}"


def plot(results: Path, summary: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draws the losses of the three models, the claim's differences and those of ablations; returns the files."""
    from matplotlib.figure import Figure as Drawing

    drawing = Drawing(figsize=(13, 4.2), layout="constrained")
    left, middle, right = drawing.subplots(1, 3)
    for panel, stream, title in ((left, "embedding", "contrastive loss"), (middle, "generative", "loss per token")):
        for name in ("unified", stream):
            for seed in summary["seeds"]:
                steps, values = map(np.array, _needed(results, seed, name).losses[stream])
                label = name if name == "unified" else f"{name}-only"
                panel.plot(
                    steps, running_mean(values, max(1, len(values) // 15)), color=_COLOURS[name], linewidth=1.5,
                    label=label if seed == summary["seeds"][0] else None,
                )  # fmt: skip
        panel.set_title(f"{title}, training", loc="left")
        panel.set_xlabel("step")
        panel.legend(frameon=False)
    claim = summary["claim"]
    named = {f"{name}\nagainst {one['against']}-only": one for name, one in claim.items()}
    draw_differences(right, named, margin=MARGIN)
    for row, one in enumerate(claim.values()):
        right.text(100 * one["difference"], row - 0.12, one["verdict"], ha="center")
    drawn = {"claim.png": drawing}
    if "ablations" in summary:
        drawing = drawn["ablations.png"] = Drawing(figsize=(13, 7), layout="constrained")
        for panel, figure in zip(drawing.subplots(1, 2), (NDCG, LOSS), strict=True):
            some = summary["ablations"] | (summary["variants"] if figure is NDCG else {})
            others = {name: one[figure.name] for name, one in some.items() if name != "baseline"}
            draw_differences(panel, others, margin=MARGIN)
            panel.set_title(f"{figure.name}, against the baseline", loc="left")
    for name, drawing in drawn.items():
        save_drawing(folder / name, drawing)
    return [folder / name for name in drawn]
