"""GRIT's claim at a small scale: one model with both skills against one model for each, trained on the same samples.

    python benchmarks/claim.py                                  one seed: within an hour on two CPU cores
    python benchmarks/claim.py --seeds 0 1 2 --ablations        everything; a night
    python benchmarks/claim.py --train.steps=20                 changes settings of the config
    python benchmarks/claim.py --config configs/claim/large.yaml --output runs/claim_large      for a GPU

    python benchmarks/claim.py --base FOLDER --models base      from a pretrained model: first it, BM25 and the margins
    python benchmarks/claim.py --base FOLDER --models unified   then each model: within two hours on two CPU cores
    python benchmarks/claim.py --base FOLDER --models --gradients base unified    whether the objectives pull one way
    python benchmarks/claim.py --base FOLDER --models --examples                  what both models find and write

It needs the package's extra `evaluate`.
A stopped run continues where it was, with the same settings. A twentieth of the records of each file in --data's
train/ is held out, by a hash of the query or the first turn. The unified, the embedding-only and the generation-only
model of a seed begin with the same weights and see the same samples of their streams in the same order.

Fixed before the first run from random weights: the figure of embedding is the mean nDCG@10 of medquad, wordnet_wsd and
scifact, that of generation the loss per token on held-out answers; models are equivalent if the 95 % interval of the
relative difference lies within 2 %.

Fixed before the first run from a pretrained model: figures, samples and margins as `PRETRAINED` of claim_setup.py and
configs/claim/pretrained_suite.yaml have them. The margin is 2 %, or the smallest that the examples can decide if that
is more, computed from the base's own scores (`Figure.margin`).

Intervals come from the paired bootstrap over examples and, if there are several, seeds. Several seeds also have
Student's interval of the mean of their differences; the wider of the two counts.

Keeps the result of every model in --output/results, writes a JSON file of figures to --output and prints its tables in
Markdown. With --page docs/claim.md the tables go into that page, and results, figures and plots into docs/claim. Models
whose results are copied to --output/results beforehand are not trained again: this checks published results, or
continues them on another machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import re
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from claim_data import digest, one_file, prepare, suite_of, training_files
from claim_examples import write_examples
from claim_gradients import BATCHES, gradient_cosines
from claim_report import plot, summarize, tables
from claim_results import (
    Gradients,
    KeywordSearch,
    Result,
    read_bm25,
    read_gradients,
    read_result,
    write_bm25,
    write_gradients,
    write_result,
)
from claim_setup import CONFIGS, MERGE, MODELS, PRETRAINED, RANDOM, Claim, ablation
from pages import print_tables, publish

from grit_jax import files
from grit_jax.checkpoints.merging import merge
from grit_jax.config import config_differences, dump_config, load_config, parse_config
from grit_jax.errors import InputError
from grit_jax.evaluation.bm25 import Bm25
from grit_jax.evaluation.evaluate import evaluate
from grit_jax.evaluation.report import fingerprint, interval
from grit_jax.evaluation.retrieval import Ranking, Retrieval, outcome, read_collection
from grit_jax.evaluation.suite import Suite
from grit_jax.runs.folder import CHECKPOINTS, CONFIG, PARAMS, checkpoint_steps, last_checkpoint
from grit_jax.runs.history import series
from grit_jax.runs.logs import read_lines
from grit_jax.train.loop import Trainer
from grit_jax.train.resolve import MAY_DIFFER

_STEPS = "train.steps"
_KEPT = ("metric", "main_score", "interval", "chance")  # entries of the report on a task
_PATHS = ("model.init", "model.tokenizer", "data.train", "data.validation", "train.output")
_MAY_DIFFER = tuple(key for key in MAY_DIFFER if key != _STEPS)


@dataclasses.dataclass(frozen=True)
class Study:
    """The setup that all models share.

    Attributes:
      claim: What is compared.
      config: Config file of the models.
      settings: Changes to the config for all of them.
      output: Folder of everything, which `prepare` has filled.
      base: Hugging Face folder of the pretrained model, if the claim has one.
    """

    claim: Claim
    config: Path
    settings: Mapping[str, Any]
    output: Path
    base: Path | None = None

    def measure(
        self,
        name: str,
        seed: int | None,
        suite: Suite,
        changes: Mapping[str, Any],
        *,
        train_data: str | None = None,
        trained: bool = True,
        parts: Sequence[str] = (),
    ) -> None:
        """Trains a model, or takes it as it is at the start or merged from its parts; evaluates and keeps it; once.

        Raises:
          InputError: The model was trained or measured with other settings, or started from another base, or a part of
            it has not been trained.
        """
        text = self._text(seed, changes)
        marks = {task.name: fingerprint(task, suite, "") for task in suite.tasks}
        earlier, shown = read_result(self.results, seed, name), name if seed is None else f"seed {seed}, {name}"
        if earlier:
            self._check(shown, earlier, text)
            if earlier.marks == marks:
                print(f"{shown}: kept")
                return
            print(f"{shown}: measured again, as tasks or their data have changed")
        folder = (self.output if seed is None else self.output / str(seed)) / name
        begun, is_new = time.monotonic(), not folder.exists()
        init = self._merged(folder, seed, text, parts) if parts else self.base
        given = parse_config(text, _options(self._paths(folder, init, train_data)))
        if (folder / CONFIG).exists():  # the trainer compares everything else
            steps = load_config(folder / CONFIG).train.steps
            if steps != given.train.steps:
                raise InputError(
                    f"{folder} is a run of train.steps={steps}, not {given.train.steps}; give --train.steps={steps}, "
                    "or choose another --output"
                )
        trainer = Trainer(given)
        if trained and not parts and not trainer.fit():
            raise SystemExit(75)
        folder.mkdir(parents=True, exist_ok=True)
        report = evaluate(
            trainer.model(), suite, output=folder / "report.json", examples=folder / "examples", about={"model": name}
        )
        lines = read_lines(folder / "metrics.jsonl")
        result = Result(
            config=text,
            data=self.data,
            devices=f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            marks=marks,
            tasks={task: {key: one[key] for key in _KEPT if key in one} for task, one in report.items()},
            examples={
                task: np.load(folder / "examples" / f"{task}.npy").tolist()
                for task in report if task.startswith(self.claim.tasks)
            },
            losses={
                stream: [values.tolist() for values in series(lines, f"loss/{stream}")]
                for stream in ("embedding", "generative")
            },
            tokens=int(sum(line["tokens"] for line in lines)),
            training_seconds=sum(line["step_seconds"] for line in lines),
            wall_seconds=time.monotonic() - begun if is_new else earlier.wall_seconds if earlier else None,
            base=self.base_digest,
        )  # fmt: skip
        write_result(self.results, seed, name, result)

    def _merged(self, folder: Path, seed: int | None, config: str, parts: Sequence[str]) -> Path:
        """The mean of trained models of a seed, which have the same steps as `config`, as a checkpoint in `folder`."""
        runs = {part: self.output / str(seed) / part for part in parts}
        steps = parse_config(config).train.steps
        for part, run in runs.items():
            result = read_result(self.results, seed, part)
            if result is None or last_checkpoint(run) != steps:
                raise InputError(
                    f"{folder.name} is merged from {', '.join(parts)}, and {run} holds no model of {steps} steps that "
                    f"has been measured; train it with --models {part}, as a published result does not have the weights"
                )
            self._check(part, result, self._text(seed, {"train.mode": part}))
        merged = folder / "merged"
        shutil.rmtree(merged, ignore_errors=True)
        merge(list(runs.values()), merged)
        return merged

    def measure_gradients(self, name: str, seed: int) -> None:
        """Measures the gradients' cosines of every checkpoint that a model has kept, or of the start; each once.

        Raises:
          InputError: The model has no checkpoint, or cosines were measured with other settings.
        """
        text = self._text(seed, {})
        kept = read_gradients(self.results, seed) or Gradients(text, self.data, self.base_digest)
        self._check("gradients", kept, text)
        found = kept.cosines.setdefault(name, {})
        for step, init in self._checkpoints(name, seed).items():
            if str(step) in found:
                print(f"seed {seed}, gradients of {name}, step {step}: kept")
                continue
            settings = self._paths(self.output / str(seed) / "gradients", init)
            steps = parse_config(text).train.steps + BATCHES  # no model has been trained on the last ones
            found[str(step)] = gradient_cosines(parse_config(text, _options({**settings, _STEPS: steps})))
            write_gradients(self.results, seed, kept)

    def _checkpoints(self, name: str, seed: int) -> dict[int, Path | None]:
        """The checkpoints of a model by step; those of the start are what training begins with."""
        if name == self.claim.start:
            return {0: self.base}
        run = self.output / str(seed) / name
        found: dict[int, Path | None] = {
            step: run / folder / str(step)
            for folder in (PARAMS, CHECKPOINTS) for step in checkpoint_steps(run / folder)
        }  # fmt: skip
        if not found:
            raise InputError(f"{run}: holds no checkpoint to measure gradients of; train it with --models {name}")
        return dict(sorted(found.items()))

    def _text(self, seed: int | None, changes: Mapping[str, Any]) -> str:
        """The config of a model as YAML, without paths."""
        seeded = {} if seed is None else {"train.seed": seed}
        return dump_config(load_config(self.config, _options({**self.settings, **seeded, **changes})))

    @property
    def results(self) -> Path:
        """Folder of the results."""
        return self.output / self.claim.results

    @functools.cached_property
    def data(self) -> str:
        """Digest of the training data and, for models from random weights, the tokenizer."""
        return digest([*training_files(self.claim, self.output / "data/train"), *self.output.glob("tokenizer/*")])

    @functools.cached_property
    def base_digest(self) -> str | None:
        """Digest of the pretrained model's weights, config and tokenizer."""
        return digest([*self.base.glob("*.safetensors"), *self.base.glob("*.json")]) if self.base else None

    def _paths(self, folder: Path, init: Path | None, train_data: str | None = None) -> dict[str, Any]:
        """What the config leaves open: `_PATHS`."""
        about = {
            "data.train": train_data or self.output / "data/train",
            "train.output": folder,
        }
        if init:
            about["model.init"] = init
        if self.base:
            return about
        return about | {"model.tokenizer": self.output / "tokenizer", "data.validation": self.output / "data/held_out"}

    def _check(self, what: str, earlier: Result | Gradients, config: str) -> None:
        differences = config_differences(parse_config(earlier.config), parse_config(config), ignore=_MAY_DIFFER)
        for name, there, here in (("data", earlier.data, self.data), ("base", earlier.base, self.base_digest)):
            if there != here:
                differences.append(f"{name}: {there} -> {here}")
        if differences:
            raise InputError(
                f"{what} was trained with something else ({'; '.join(differences)}); put it back, or choose another "
                f"--output than {self.output}"
            )


def _options(settings: Mapping[str, Any]) -> list[str]:
    return [f"--{key}={value}" for key, value in settings.items()]


def measure_bm25(suite: Suite, results: Path) -> None:
    """Keeps nDCG@10 of keyword search on the retrieval tasks, with its interval over examples; once."""
    searched = [task for task in suite.tasks if isinstance(task, Retrieval)]
    marks = {task.name: fingerprint(task, suite, "") for task in searched}
    earlier = read_bm25(results)
    if earlier and earlier.marks == marks:
        return
    scores = {}
    for task in searched:
        collection = read_collection(Path(task.path), task.split)
        keyword = Bm25(list(collection.documents.values())).scores(list(collection.queries.values()))
        best = np.argsort(-keyword, axis=1, kind="stable")[:, :100]
        found = outcome(Ranking(np.take_along_axis(keyword, best, axis=1), best), collection)
        scores[task.name] = {"main_score": found.score(found.examples), "interval": interval(found, suite.seed)}
    write_bm25(results, KeywordSearch(marks, scores))


def ablation_steps(change: Mapping[str, Any], whole: int, baseline: int) -> int:
    """Steps of an ablation that sees as many samples as `baseline` steps of the baseline.

    Args:
      change: Its changes, as the file of ablations has them.
      whole: Steps of the baseline that the file is written for.
      baseline: Steps that the baseline takes.
    """
    return max(1, change.get(_STEPS, whole) * baseline // whole)


def main() -> None:
    """Trains, measures, compares and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(__file__).parents[1]
    parser.add_argument("--data", type=Path, default=root.parent / "shared/data", help="folder with train/ and eval/")
    parser.add_argument("--base", type=Path, help="Hugging Face folder of a pretrained model to start from")
    parser.add_argument("--config", type=Path, help="of the models (configs/claim/unified.yaml, pretrained.yaml)")
    parser.add_argument("--output", type=Path, help="where everything goes (runs/claim, runs/claim_pretrained)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of weights and data order (%(default)s)")
    parser.add_argument(
        "--models", nargs="*", help="measure only these, of unified, embedding, generative and the start's"
    )
    parser.add_argument("--ablations", nargs="*", help="measure these ablations too; without names all of them")
    parser.add_argument("--gradients", nargs="+", default=[], help="measure the angle between both gradients of these")
    parser.add_argument(
        "--examples", action="store_true", help="write what the base and the unified model find and write"
    )
    parser.add_argument("--page", type=Path, help="page to fill with the tables; results and plots go beside it")
    args, overrides = parser.parse_known_args()
    claim = PRETRAINED if args.base else RANDOM
    if bare := [override for override in overrides if not re.match(r"--[\w.]+=", override)]:
        parser.error(f"{' '.join(bare)}: no option of the script; settings of the config are --key=value")
    more = dict(override.removeprefix("--").split("=", 1) for override in overrides)
    changes, known = claim.known_ablations(), (*MODELS, claim.start)
    models = known if args.models is None else args.models
    ablations = [] if args.ablations is None else args.ablations or list(changes)
    for option, given, there in (
        ("--models", models, known), ("--ablations", ablations, changes), ("--gradients", args.gradients, known)
    ):  # fmt: skip
        if unknown := [name for name in given if name not in there]:
            parser.error(f"{option}: no {', '.join(unknown)}; there are {', '.join(there)}")
    if fixed := more.keys() & {*_PATHS, "train.seed", "train.mode"}:
        parser.error(f"{', '.join(sorted(fixed))}: the script chooses these; give --base, --data, --output or --seeds")
    if clashes := {key for name in ablations for key in more.keys() & changes[name].keys() - {_STEPS}}:
        parser.error(f"{', '.join(sorted(clashes))}: ablations change these; give them without --ablations")
    if args.base and not (args.base / "config.json").exists():
        parser.error(f"--base {args.base}: has no config.json; give a Hugging Face folder of a pretrained model")
    if args.examples and not args.base:
        parser.error("--examples: shows a model beside its base; give --base")
    config, output = args.config or CONFIGS / claim.config, args.output or Path(claim.output)
    baseline = load_config(config, _options(more)).train.steps if _STEPS in more else claim.ablation_steps
    prepare(claim, args.data, output)
    study = Study(claim, config, more, output, args.base)
    suite = suite_of(claim, claim.suite, args.data, output)
    measure_bm25(suite, study.results)
    for seed in args.seeds:
        for name in (name for name in known if name in models):
            start = name == claim.start
            mode = {} if start else {"train.mode": name}
            study.measure(name, claim.seed_of(name, seed), suite, mode, trained=not start)
    whole = suite_of(claim, claim.ablation_suite, args.data, output)
    figures = dataclasses.replace(whole, tasks=tuple(task for task in whole.tasks if task.name in claim.tasks))
    for name in ablations:
        change: dict[str, Any] = {
            **changes[name],
            _STEPS: ablation_steps(changes[name], claim.ablation_steps, baseline),
        }
        parts = change.pop(MERGE, ())
        study.measure(
            ablation(name), args.seeds[0], whole if ablation(name) == claim.baseline else figures, change,
            train_data=f"[{one_file(output)}, {output / 'data/train/generative'}]" if name == "one_file" else None,
            parts=parts,
        )  # fmt: skip
    for name in args.gradients:
        study.measure_gradients(name, args.seeds[0])
    summary = summarize(claim, study.results, args.seeds)
    written = output / f"{claim.name}.json"
    files.write_text(written, json.dumps(summary, indent=2) + "\n")
    plots = plot(claim, study.results, summary, output)
    shown = tables(claim, summary)
    if args.examples:
        unified = output / str(args.seeds[0]) / "unified"
        shown |= write_examples(claim, suite, output, {"base": args.base, "unified": unified})
    print_tables(shown)
    if args.page:
        publish(args.page, shown, output / "results", written, *plots)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
