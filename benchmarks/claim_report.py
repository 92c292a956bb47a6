"""The comparison of a claim's models, and the tables and plots made from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
from claim_gradients import KINDS, summary_of
from claim_results import Result, read_bm25, read_gradients, read_result
from claim_setup import MARGIN, MODELS, Claim, Figure, ablation
from pages import COLOURS, draw_differences, markdown_table, save_drawing

from grit_jax.config import parse_config
from grit_jax.errors import InputError
from grit_jax.runs.history import running_mean

_COLOURS = dict(zip(MODELS, COLOURS, strict=False))
_COLOUR_OF_OTHERS, _MARKERS = COLOURS[len(MODELS)], "s^vDPX*"


def summarize(claim: Claim, results: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """The content of the claim's JSON file: what can be said of the models that have been measured.

    Args:
      claim: What is compared.
      results: Folder with the result of every model.
      seeds: The seeds to compare. A figure is compared by those that have both of its models; ablations have the first
        seed.

    Raises:
      InputError: No model, or keyword search or the base, has been measured, or a model started from another base or
        has other tasks or data than the rest.
    """
    names = (claim.start, *MODELS)
    found = {
        name: {
            seed: result for seed in seeds if (result := read_result(results, claim.seed_of(name, seed), name))
        } for name in names
    }  # fmt: skip
    models = {name: by_seed for name, by_seed in found.items() if by_seed}
    if not models or (claim.has_base and claim.start not in models):
        raise InputError(f"{results}: has no {claim.start} model of seed {seeds[0]}; measure it first")
    everyone = {f"{seed}/{name}": result for name, by_seed in models.items() for seed, result in by_seed.items()}
    first = next(iter(everyone.values()))
    _refuse_different(results, everyone, {task for result in everyone.values() for task in result.marks})
    keywords = read_bm25(results)
    if keywords is None or not keywords.marks.items() <= first.marks.items():
        raise InputError(f"{results}: keyword search was not measured on these tasks; run the script again")
    margins = {
        figure.name: figure.margin(models[claim.start][seeds[0]]) if claim.has_base else MARGIN
        for figure in claim.figures
    }

    def compared(figure: Figure) -> dict[str, Any]:
        ours, theirs = (models.get(name, {}) for name in ("unified", figure.specialist))
        both = [seed for seed in seeds if seed in ours and seed in theirs]
        if not both:
            return {}
        comparison = figure.compare([ours[seed] for seed in both], [theirs[seed] for seed in both])
        margin = margins[figure.name]
        verdict = comparison.verdict(margin, smaller_is_better=figure.smaller_is_better)
        about = {"verdict": verdict, "margin": margin, "against": figure.specialist, "seeds": both}
        return comparison._asdict() | about

    config = parse_config(first.config)
    walls = {
        str(seed): [
            wall for by_seed in models.values()
            if seed in by_seed and (wall := by_seed[seed].wall_seconds) is not None
        ] for seed in seeds
    }  # fmt: skip
    summary: dict[str, Any] = {
        "seeds": list(seeds),
        "devices": sorted({result.devices for result in everyone.values()}),
        "steps": config.train.steps,
        "queries_per_step": config.data.embedding_batch,
        "conversations_per_step": config.data.generative_batch,
        "tokens": {name: _first(models[name]).tokens for name in MODELS if name in models},
        "training_seconds": {name: _first(models[name]).training_seconds for name in MODELS if name in models},
        "wall_seconds": {seed: sum(known) for seed, known in walls.items() if len(known) == len(names)},
        "margins": margins,
        "examples": {task: len(first.examples[task]) for task in claim.tasks},
        "claim": {figure.name: one for figure in claim.figures if (one := compared(figure))},
        "bm25": keywords.tasks,
        "models": {
            name: {str(seed): result.tasks for seed, result in by_seed.items()} for name, by_seed in models.items()
        },
    }
    if claim.has_base:
        summary["base"] = first.base
    if gradients := read_gradients(results, seeds[0]):
        if (gradients.base, gradients.data) != (first.base, first.data):
            raise InputError(
                f"{results}: gradients of seed {seeds[0]} are those of another base or of other data; remove "
                "gradients.json and run the script again"
            )
        summary["gradients"] = {
            name: {step: summary_of(one) for step, one in by_step.items()}
            for name, by_step in gradients.cosines.items()
        }
    baseline = read_result(results, seeds[0], claim.baseline)
    measured = {name: read_result(results, seeds[0], ablation(name)) for name in claim.known_ablations()}
    known = {name: result for name, result in measured.items() if result}
    if baseline and known:
        known = {claim.baseline.removeprefix(ablation("")): baseline} | known
        named = {f"{seeds[0]}/{name}": result for name, result in known.items()}
        _refuse_different(results, named, set(claim.tasks))
        summary["ablations"] = {name: _ablation(result, baseline, claim.main_figures) for name, result in known.items()}
        summary["variants"] = _variants(baseline, claim.main_figures[0])
    if claim.front:
        points = {name: by_seed[seeds[0]] for name, by_seed in models.items() if seeds[0] in by_seed}
        points |= {name: known[name] for name in claim.front if name in summary.get("ablations", ())}
        summary["front"] = {
            name: {figure.name: figure.estimate(result) for figure in claim.main_figures}
            for name, result in points.items()
        }
    return summary


def _first(by_seed: Mapping[int, Result]) -> Result:
    return next(iter(by_seed.values()))


def _refuse_different(results: Path, compared: Mapping[str, Result], tasks: Set[str]) -> None:
    """Refuses models of another base, training data or tasks than the first of them."""
    about = {name: (result.base, result.data, *map(result.marks.get, tasks)) for name, result in compared.items()}
    first, *_ = about
    if others := [name for name in about if about[name] != about[first]]:
        raise InputError(
            f"{results}: {', '.join(others)}: started from another base, or trained or measured on other data or tasks "
            f"than {first}; remove these files and run the script again, or choose another --output"
        )


def _ablation(result: Result, baseline: Result, figures: Sequence[Figure]) -> dict[str, Any]:
    """Its figures, each with the relative difference from the baseline's, and the seconds of its training."""
    compared = {figure.name: figure.compare([result], [baseline])._asdict() for figure in figures}
    kept = ("value", "difference", "interval")
    return {name: {key: one[key] for key in kept} for name, one in compared.items()} | {
        "training_seconds": result.training_seconds
    }


def _variants(baseline: Result, figure: Figure) -> dict[str, Any]:
    """The same for variants of the tasks of a figure, by the suffix of their names."""
    begin = figure.tasks[0]
    others = [name.removeprefix(begin) for name in baseline.tasks if name.startswith(f"{begin} ")]
    found = {}
    for variant in others:
        renamed = {name: baseline.examples[f"{name}{variant}"] for name in figure.tasks}
        found[variant.strip()] = _ablation(dataclasses.replace(baseline, examples=renamed), baseline, [figure])
    return found


def tables(claim: Claim, summary: Mapping[str, Any]) -> dict[str, str]:
    """The summary's tables in Markdown, by name."""
    models, seeds = summary["models"], len(summary["seeds"])
    several = seeds > 1
    trained = [name for name in MODELS if name in models]
    found = {}
    if claim.has_base:
        found["margins"] = _margins(claim, summary)
    if summary["claim"]:
        found["claim"] = markdown_table(
            [
                "figure", "unified", "specialist", "relative difference, 95 % interval",
                *(["of the seeds by t"] if several else []), "verdict",
            ],
            (
                [
                    f"{name}, against {one['against']}-only", f"{one['value']:.4f}", f"{one['reference']:.4f}",
                    f"{one['difference']:+.1%} ({_bounds(one['interval'])})",
                    *([_bounds(one["run_interval"]) if one["run_interval"] else ""] if several else []),
                    f"{one['verdict']} (margin ±{100 * one['margin']:.3g} %)",
                ]
                for name, one in summary["claim"].items()
            ),
        )  # fmt: skip
    found["tasks"] = markdown_table(
        [
            f"task{f': mean of {seeds} seeds' if several else ''} (95 % interval over examples)", "metric", "BM25",
            claim.start, *map(_label, trained),
        ],
        (
            [
                name, one["metric"].replace("ndcg_at_10", "nDCG@10").replace("_", " "),
                _cell([summary["bm25"][name]]) if name in summary["bm25"] else "",
                *(_cell([scores[name] for scores in models[model].values()]) for model in (claim.start, *trained)),
            ]
            for name, one in next(iter(models[claim.start].values())).items()
        ),
    )  # fmt: skip
    if "ablations" in summary:
        figures = claim.main_figures
        head = ["", *(column for figure in figures for column in (figure.name, "against baseline")), "seconds"]
        rows = [
            [name, *(cell for figure in figures for cell in _against(one, figure)), f"{one['training_seconds']:.0f}"]
            for name, one in summary["ablations"].items()
        ]
        rows += [
            [name, *_against(one, figures[0]), *[""] * (len(head) - 3)] for name, one in summary["variants"].items()
        ]
        found["ablations"] = markdown_table(head, rows)
    if "gradients" in summary:
        found["gradients"] = markdown_table(
            ["cosine of the two gradients, ± standard error", *KINDS],
            (
                [name if name == claim.start else f"{name}, step {step}", *(_cosine(one[kind]) for kind in KINDS)]
                for name, by_step in summary["gradients"].items() for step, one in by_step.items()
            ),
        )  # fmt: skip
    return {f"{claim.prefix}{name}": table for name, table in found.items()}


def _margins(claim: Claim, summary: Mapping[str, Any]) -> str:
    """Each figure's margin, and what it is computed from."""
    scores = next(iter(summary["models"][claim.start].values()))
    return markdown_table(
        ["figure", "mean of", "examples", "base", "assumed correlation", "margin"],
        (
            [
                f"{figure.name}, against {figure.specialist}-only", ", ".join(figure.tasks),
                ", ".join(f"{summary['examples'][task]:,}" for task in figure.tasks),
                f"{np.mean([scores[task]['main_score'] for task in figure.tasks]):.4f}", f"{figure.correlation:g}",
                f"±{summary['margins'][figure.name]:.1%}",
            ]
            for figure in claim.figures
        ),
    )  # fmt: skip


def _against(one: Mapping[str, Any], figure: Figure) -> list[str]:
    """A figure of an ablation, and how far it is from the baseline's."""
    found = one[figure.name]
    difference = found["difference"]
    shown = f"{difference:+.1%}" if abs(difference) >= 0.0005 else f"{100 * difference:+.1g}%"
    return [f"{found['value']:.4f}", f"{shown} ({_bounds(found['interval'])})"]


def _cosine(found: Mapping[str, float]) -> str:
    return f"{found['mean']:+.3f} ± {found['standard_error']:.3f}"


def _label(name: str) -> str:
    """What tables and drawings call a model."""
    return f"{name}-only" if name in MODELS and name != "unified" else name


def _bounds(of: Sequence[float]) -> str:
    return f"{of[0]:+.1%} to {of[1]:+.1%}"


def _cell(found: Sequence[Mapping[str, Any]]) -> str:
    """Mean over seeds of the score and of its interval's bounds over examples, and how it compares with chance."""
    score, low, high = np.mean([[one["main_score"], *one["interval"]] for one in found], axis=0)
    chance = found[0].get("chance")
    mark = "" if chance is None or low > chance else " below chance" if high < chance else " at chance"
    return f"{score:.3f} ({low:.3f} to {high:.3f}){mark}"


def plot(claim: Claim, results: Path, summary: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draws losses, the claim's differences, those of ablations and the front of both skills; returns the files."""
    from matplotlib.figure import Figure as Drawing

    drawn: dict[str, Drawing] = {}
    if summary["claim"]:
        drawing = drawn[claim.name] = Drawing(figsize=(13, 4.2), layout="constrained")
        left, middle, right = drawing.subplots(1, 3)
        for panel, stream, title in ((left, "embedding", "contrastive loss"), (middle, "generative", "loss per token")):
            for name in ("unified", stream):
                known = [result for seed in summary["seeds"] if (result := read_result(results, seed, name))]
                for number, result in enumerate(known):
                    steps, values = map(np.array, result.losses[stream])
                    panel.plot(
                        steps, running_mean(values, max(1, len(values) // 15)), color=_COLOURS[name], linewidth=1.5,
                        label=None if number else _label(name),
                    )  # fmt: skip
            panel.set_title(f"{title}, training", loc="left")
            panel.set_xlabel("step")
            panel.legend(frameon=False)
        draw_differences(
            right, {f"{name}\nagainst {one['against']}-only": one for name, one in summary["claim"].items()}
        )
        for row, one in enumerate(summary["claim"].values()):
            right.text(100 * one["difference"], row - 0.12, one["verdict"], ha="center")
    if "ablations" in summary:
        drawing = drawn[f"{claim.prefix}ablations".replace(" ", "_")] = Drawing(figsize=(13, 7), layout="constrained")
        for number, figure in enumerate(claim.main_figures):
            panel = drawing.add_subplot(1, len(claim.main_figures), number + 1)
            some = summary["ablations"] | ({} if number else summary["variants"])
            margin = {"margin": summary["margins"][figure.name]}
            baseline, *others = [(name, one[figure.name] | margin) for name, one in some.items()]
            draw_differences(panel, dict(others))
            panel.set_title(f"{figure.name}, against {baseline[0]}", loc="left")
    if len(summary.get("front", ())) > 1:
        drawing = drawn[f"{claim.name}_front"] = Drawing(figsize=(9, 5), layout="constrained")
        _draw_front(drawing.add_subplot(), claim, summary["front"])
    paths = [folder / f"{name}.png" for name in drawn]
    for path, drawing in zip(paths, drawn.values(), strict=True):
        save_drawing(path, drawing)
    return paths


def _draw_front(panel: Any, claim: Claim, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Draws each model as a point of both main figures, with their intervals; the better corner is the upper right."""
    up, right = claim.main_figures
    markers = iter(_MARKERS)
    for name, one in found.items():
        (x, y), colour = (one[figure.name]["value"] for figure in (right, up)), _COLOURS.get(name, _COLOUR_OF_OTHERS)
        (left, far), (low, high) = (one[figure.name]["interval"] for figure in (right, up))
        panel.errorbar(
            x, y, xerr=[[x - left], [far - x]], yerr=[[y - low], [high - y]], color=colour, markersize=8,
            fmt="o" if name in _COLOURS else next(markers), label=_label(name),
        )  # fmt: skip
    panel.set(xlabel=right.name, ylabel=up.name)
    panel.invert_xaxis()
    panel.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
