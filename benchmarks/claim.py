"""The claim of GRIT at a small scale: one model of both skills against a model of each, trained on the same samples.

    python benchmarks/claim.py                                  one seed: within an hour on two CPU cores
    python benchmarks/claim.py --seeds 0 1 2 --ablations        all of it; a night
    python benchmarks/claim.py --train.steps=20                 settings of the config can be changed
    python benchmarks/claim.py --config configs/claim/large.yaml --output runs/claim_large      for a GPU

A run that was stopped goes on where it was, with the same settings. Of each file of --data's train/ a twentieth of the
records is held out, by a hash of the query or the first turn. The unified, the embedding-only and the generation-only
model of a seed begin with the same weights and see the same samples of their streams in the same order.

Fixed before any of it was run: the figure of embedding is the mean nDCG@10 of medquad, wordnet_wsd and scifact, that of
generation the loss per token on held-out answers; models are equivalent where the 95 % interval of the relative
difference lies within 2 %.

Intervals are of the paired bootstrap over examples and, where there are several, seeds. Several seeds also have
Student's interval of the mean of their differences, and the wider of the two counts.

Writes --output/claim.json, prints its tables in Markdown and, with --docs, copies them and their plots there.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import hashlib
import json
import re
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml

from grit_jax import files
from grit_jax.config import InputError, load_config
from grit_jax.data.records import EmbeddingRecord, Record, texts
from grit_jax.data.sources import find_files, open_source, read_texts
from grit_jax.evaluation.compare import Comparison, compare
from grit_jax.evaluation.likelihood import Perplexity, loss_per_token
from grit_jax.evaluation.report import interval, read_report
from grit_jax.evaluation.retrieval import Ranking, Retrieval, bm25_scores, outcome, read_collection
from grit_jax.evaluation.run import evaluate
from grit_jax.evaluation.suite import Suite, load_suite
from grit_jax.evaluation.task import Outcome
from grit_jax.tokenizer import train_bpe
from grit_jax.train.loop import Trainer
from grit_jax.train.metrics import read_metrics
from grit_jax.watch.folder import CONFIG
from grit_jax.watch.plot import running_mean, series

_ROOT = Path(__file__).parents[1]
CONFIGS = _ROOT / "configs/claim"
PRIMARY = ("medquad", "wordnet_wsd", "scifact")
HELD_OUT, GSM8K = "held-out answers", "gsm8k"
MARGIN = 0.02
MODELS = ("unified", "embedding", "generative")
_ONE_IN = 20
_VOCAB_SIZE = 8192
_ABLATION_STEPS = 100
_SECONDS = "seconds.txt"  # wall time of a model's training and evaluation
_SAME = ("baseline", "no_packing")  # ablations whose figures must be equal


def prepare(data: Path, output: Path) -> None:
    """Splits the training data by source, writes GSM8K's test as records and trains the tokenizer; once.

    Raises:
      InputError: The output was made from other data.
    """
    done, source = output / "data/done", str(data.resolve())
    if done.exists():
        made_from = done.read_text() or source  # empty where an earlier version wrote it
        if made_from != source:
            raise InputError(f"{output} was made from --data {made_from}, not {source}; choose another --output")
        files.write_text(done, source)
        return
    split(data / "train", output / "data")
    folder = output / "data/train/embedding"
    everything = [line for path in sorted(folder.iterdir()) for line in path.read_bytes().splitlines()]
    _write_lines(output / "data/one_file/embedding.jsonl", everything)
    with gzip.open(data / "eval/generative/gsm8k_test.jsonl.gz", "rt") as file:
        problems = [json.loads(line) for line in file]
    solved = [
        json.dumps({"text": [row["question"], re.sub(r"<<.*?>>", "", row["solution"])]}).encode() for row in problems
    ]
    _write_lines(output / "data/gsm8k_test.jsonl", solved)
    tokenizer = train_bpe(read_texts(str(output / "data/train")), _VOCAB_SIZE)
    for name, content in tokenizer.files().items():
        files.write_text(_made(output / "tokenizer" / name), content)
    files.write_text(done, source)


def split(data: Path, output: Path) -> None:
    """Writes the records of each file to `train/` and, a twentieth of them, to `held_out/`."""
    for path in map(Path, find_files([str(data / "embedding"), str(data / "generative")])):
        source = open_source(path)
        parts: dict[str, list[bytes]] = {"train": [], "held_out": []}
        for number, record in enumerate(source):
            parts["held_out" if _held_out(record) else "train"].append(source.lines(number, number + 1)[0].rstrip())
        for part, lines in parts.items():
            _write_lines(output / part / path.parent.name / f"{path.name.split('.')[0]}.jsonl", lines)


def key(record: Record) -> str:
    """What decides on which side of the split a record is: its query, or its first turn."""
    return record.query.text if isinstance(record, EmbeddingRecord) else texts(record)[0]


def _held_out(record: Record) -> bool:
    return int.from_bytes(hashlib.blake2b(key(record).encode(), digest_size=8).digest()) % _ONE_IN == 0


def _write_lines(path: Path, lines: Sequence[bytes]) -> None:
    files.write_bytes(_made(path), b"".join(line + b"\n" for line in lines))


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def suite_of(name: str, data: Path, output: Path) -> Suite:
    """A suite of configs/claim with what the split holds out."""
    suite = load_suite(CONFIGS / name, data=data / "eval")
    held_out = Perplexity(HELD_OUT, str(output / "data/held_out/generative"))
    gsm8k = Perplexity(GSM8K, str(output / "data/gsm8k_test.jsonl"))
    return dataclasses.replace(suite, tasks=(held_out, gsm8k, *suite.tasks))


def measure(
    config: Path,
    output: Path,
    name: str,
    seed: int,
    settings: Mapping[str, Any],
    suite: Suite,
    *,
    trained: bool = True,
) -> None:
    """Trains a model, or takes it as it is at the start, and evaluates it.

    Raises:
      InputError: It is there, trained with other settings.
    """
    folder, begun = output / str(seed) / name, time.monotonic()
    is_new = not folder.exists()
    given = load_config(
        config,
        [
            f"--model.tokenizer={output / 'tokenizer'}",
            f"--data.train={output / 'data/train'}",
            f"--data.validation={output / 'data/held_out'}",
            f"--train.output={folder}",
            f"--train.seed={seed}",
            *(f"--{key}={value}" for key, value in settings.items()),
        ],
    )
    if (folder / CONFIG).exists():  # the trainer compares all else
        steps = load_config(folder / CONFIG).train.steps
        if steps != given.train.steps:
            raise InputError(
                f"{folder} is a run of train.steps={steps}, not {given.train.steps}; give --train.steps={steps}, or "
                "choose another --output"
            )
    trainer = Trainer(given)
    if trained and not trainer.fit():
        raise SystemExit(75)
    model = trainer.model()
    evaluate(model, suite, output=_made(folder / "report.json"), examples=folder / "examples", about={"model": name})
    if is_new:  # of a run that was stopped in between nobody knows
        files.write_text(folder / _SECONDS, f"{time.monotonic() - begun:.1f}\n")


def bm25(suite: Suite) -> dict[str, Outcome]:
    """nDCG@10 of keyword search on the retrieval tasks."""
    found = {}
    for task in suite.tasks:
        if isinstance(task, Retrieval):
            collection = read_collection(Path(task.path), task.split)
            scores = bm25_scores(list(collection.queries.values()), list(collection.documents.values()))
            best = np.argsort(-scores, axis=1, kind="stable")[:, :100]
            found[task.name] = outcome(Ranking(np.take_along_axis(scores, best, axis=1), best), collection)
    return found


def summarize(output: Path, seeds: Sequence[int], suite: Suite) -> dict[str, Any]:
    """What claim.json holds; of ablations those of the first seed that were measured, now or before."""

    def report(seed: int, name: str) -> dict[str, Any]:
        return read_report(output / str(seed) / name / "report.json")

    def examples(name: str, tasks: Sequence[str]) -> list[list[np.ndarray]]:
        return [[np.load(output / str(seed) / name / "examples" / f"{task}.npy") for task in tasks] for seed in seeds]

    def compared(comparison: Comparison, **better: bool) -> dict[str, Any]:
        return comparison._asdict() | {"verdict": comparison.verdict(MARGIN, **better)}

    def seconds(seed: int) -> list[float]:
        paths = [output / str(seed) / name / _SECONDS for name in ("untrained", *MODELS)]
        return [float(path.read_text()) for path in paths] if all(path.exists() for path in paths) else []

    lines = {name: read_metrics(output / str(seeds[0]) / name / "metrics.jsonl") for name in MODELS}
    config = load_config(output / str(seeds[0]) / "unified/config.yaml")
    keyword = bm25(suite)
    ndcg = compare(examples("unified", PRIMARY), examples("embedding", PRIMARY))
    loss = compare(examples("unified", [HELD_OUT]), examples("generative", [HELD_OUT]), loss_per_token)
    summary: dict[str, Any] = {
        "seeds": list(seeds),
        "margin": MARGIN,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "steps": config.train.steps,
        "queries_per_step": config.data.embedding_batch,
        "conversations_per_step": config.data.generative_batch,
        "tokens": {name: sum(line["tokens"] for line in some) for name, some in lines.items()},
        "training_seconds": {name: sum(line["step_seconds"] for line in some) for name, some in lines.items()},
        "wall_seconds": {str(seed): sum(known) for seed in seeds if (known := seconds(seed))},
        "claim": {
            "mean nDCG@10": compared(ndcg) | {"against": "embedding"},
            "loss per token": compared(loss, smaller_is_better=True) | {"against": "generative"},
        },
        "bm25": {name: found.score(found.examples) for name, found in keyword.items()},
        "bm25_intervals": {name: interval(found, suite.seed) for name, found in keyword.items()},
        "models": {name: {str(seed): _scores(report(seed, name)) for seed in seeds} for name in ("untrained", *MODELS)},
    }
    measured = {name: report(seeds[0], f"ablation_{name}") for name in known_ablations()}
    ablations = {
        name: _ablation(tasks) for name, tasks in measured.items() if {HELD_OUT, *PRIMARY} <= tasks.keys()
    }  # fmt: skip
    if ablations:
        summary["ablations"] = ablations
    if set(_SAME) <= ablations.keys():
        one, other = (ablations[name] for name in _SAME)
        summary["packing"] = {name: one[name] / value - 1 for name, value in other.items()}
    return summary


def known_ablations() -> dict[str, dict[str, Any]]:
    """What each ablation changes."""
    return yaml.safe_load((CONFIGS / "ablations.yaml").read_text())


def _scores(tasks: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("metric", "main_score", "interval", "chance")
    return {name: {key: one[key] for key in kept if key in one} for name, one in tasks.items()}


def _ablation(tasks: Mapping[str, Any]) -> dict[str, float]:
    """Loss per token, and the mean nDCG@10 of the primary tasks and of each of their variants."""
    figures = {"loss per token": tasks[HELD_OUT]["main_score"]}
    variants = [name.removeprefix(PRIMARY[0]) for name in tasks if name.startswith(PRIMARY[0])]
    for variant in variants:
        names = [f"{name}{variant}" for name in PRIMARY]
        if tasks.keys() >= set(names):
            figures[f"mean nDCG@10{variant}"] = float(np.mean([tasks[name]["main_score"] for name in names]))
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
                name, one["metric"].replace("ndcg_at_10", "nDCG@10").replace("_", " "), _keyword_cell(summary, name),
                *(_cell(summary["models"][model], name) for model in ("untrained", *MODELS)),
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


def _keyword_cell(summary: Mapping[str, Any], task: str) -> str:
    """BM25's score, with its interval over examples where the summary has it."""
    if task not in summary["bm25"]:
        return ""
    bounds = summary.get("bm25_intervals", {}).get(task)
    return f"{summary['bm25'][task]:.3f}" + (f" ({bounds[0]:.3f} to {bounds[1]:.3f})" if bounds else "")


def _cell(by_seed: Mapping[str, Any], task: str) -> str:
    """Mean over seeds, with the lowest and the highest; of one seed with its interval over examples.

    What the interval, of several seeds the mean of their bounds, says of chance stands behind.
    """
    found = [tasks[task] for tasks in by_seed.values()]
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


def plot(output: Path, summary: Mapping[str, Any]) -> None:
    """Draws losses of the three models and the claim's differences: claim.png."""
    from matplotlib.figure import Figure

    colours = {"unified": "#2563a8", "embedding": "#d97706", "generative": "#3f8f5f"}
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for panel, stream, title in ((left, "embedding", "contrastive loss"), (middle, "generative", "loss per token")):
        for name in ("unified", stream):
            for seed in summary["seeds"]:
                lines = read_metrics(output / str(seed) / name / "metrics.jsonl")
                steps, values = series(lines, f"loss/{stream}")
                label = name if name == "unified" else f"{name}-only"
                panel.plot(
                    steps, running_mean(values, max(1, len(values) // 15)), color=colours[name], linewidth=1.5,
                    label=label if seed == summary["seeds"][0] else None,
                )  # fmt: skip
        panel.set_title(f"{title}, training", loc="left")
        panel.set_xlabel("step")
        panel.legend(frameon=False)
    for row, one in enumerate(summary["claim"].values()):
        low, high = (100 * bound for bound in one["interval"])
        right.plot([low, high], [row, row], color=colours["unified"], linewidth=3)
        if one.get("run_interval"):
            right.plot(
                [100 * bound for bound in one["run_interval"]], [row, row], color=colours["unified"], linewidth=1
            )
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
    figure.savefig(output / "claim.png", dpi=110)


def main() -> None:
    """Trains, measures, compares and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=_ROOT.parent / "shared/data", help="folder with train/ and eval/")
    parser.add_argument("--config", type=Path, default=CONFIGS / "unified.yaml", help="of the models (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/claim"), help="where everything goes (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of weights and data order (%(default)s)")
    parser.add_argument("--ablations", nargs="*", help="measure these ablations too; without names all of them")
    parser.add_argument("--docs", type=Path, help="folder that claim.json and its plot are copied to")
    args, overrides = parser.parse_known_args()
    more = dict(override.removeprefix("--").split("=", 1) for override in overrides)
    changes = known_ablations()
    ablations = [] if args.ablations is None else args.ablations or list(changes)
    if unknown := [name for name in ablations if name not in changes]:
        parser.error(f"--ablations: no {', '.join(unknown)}; there are {', '.join(changes)}")
    prepare(args.data, args.output)
    suite = suite_of("suite.yaml", args.data, args.output)
    for seed in args.seeds:
        for mode in MODELS:  # refuse other settings before anything is measured again
            measure(args.config, args.output, mode, seed, {"train.mode": mode, **more}, suite)
        measure(args.config, args.output, "untrained", seed, more, suite, trained=False)
    whole = suite_of("ablation_suite.yaml", args.data, args.output)
    primary = dataclasses.replace(whole, tasks=tuple(t for t in whole.tasks if t.name in (HELD_OUT, *PRIMARY)))
    for name in ablations:
        settings = {"train.steps": _ABLATION_STEPS, **changes[name], **more}
        if name == "one_file":
            settings["data.train"] = f"[{args.output / 'data/one_file'}, {args.output / 'data/train/generative'}]"
        on = whole if name == "baseline" else primary
        measure(args.config, args.output, f"ablation_{name}", args.seeds[0], settings, on)
    summary = summarize(args.output, args.seeds, suite)
    files.write_text(args.output / "claim.json", json.dumps(summary, indent=2) + "\n")
    for name, table in tables(summary).items():
        print(f"\n{name}\n\n{table}", end="")
    plot(args.output, summary)
    if args.docs:
        for name in ("claim.json", "claim.png"):
            shutil.copy(args.output / name, _made(args.docs / name))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
