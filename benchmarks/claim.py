"""GRIT's claim at a small scale: one model with both skills against one model for each, trained on the same samples.

    python benchmarks/claim.py                                  one seed: within an hour on two CPU cores
    python benchmarks/claim.py --seeds 0 1 2 --ablations        everything; a night
    python benchmarks/claim.py --train.steps=20                 changes settings of the config
    python benchmarks/claim.py --config configs/claim/large.yaml --output runs/claim_large      for a GPU

It needs the package's extra `evaluate`.
A stopped run continues where it was, with the same settings. A twentieth of the records of each file in --data's
train/ is held out, by a hash of the query or the first turn. The unified, the embedding-only and the generation-only
model of a seed begin with the same weights and see the same samples of their streams in the same order.

Fixed before the first run: the figure of embedding is the mean nDCG@10 of medquad, wordnet_wsd and scifact, that of
generation the loss per token on held-out answers; models are equivalent if the 95 % interval of the relative difference
lies within 2 %.

Intervals come from the paired bootstrap over examples and, if there are several, seeds. Several seeds also have
Student's interval of the mean of their differences; the wider of the two counts.

Keeps the result of every model in --output/results, writes --output/claim.json and prints its tables in Markdown. With
--page docs/claim.md the tables go into that page, and results, figures and plots into docs/claim. Models whose results
are copied to --output/results beforehand are not trained again: this checks published results, or continues them on
another machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gzip
import hashlib
import json
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml
from claim_report import (
    HELD_OUT,
    MODELS,
    PRIMARY,
    UNTRAINED,
    KeywordSearch,
    Result,
    ablation,
    plot,
    read_bm25,
    read_result,
    summarize,
    tables,
    write_bm25,
    write_result,
)
from pages import print_tables, publish

from grit_jax import files
from grit_jax.config import config_differences, dump_config, load_config, parse_config
from grit_jax.data.records import EmbeddingRecord, Record
from grit_jax.data.sources import find_files, open_source, vocabulary_texts
from grit_jax.errors import InputError
from grit_jax.evaluation.bm25 import Bm25
from grit_jax.evaluation.evaluate import evaluate
from grit_jax.evaluation.likelihood import Perplexity
from grit_jax.evaluation.report import fingerprint, interval
from grit_jax.evaluation.retrieval import Ranking, Retrieval, outcome, read_collection
from grit_jax.evaluation.suite import Suite, load_suite
from grit_jax.runs.folder import CONFIG
from grit_jax.runs.history import series
from grit_jax.runs.logs import read_lines
from grit_jax.text.tokenizer import train_bpe
from grit_jax.train.loop import Trainer
from grit_jax.train.resolve import MAY_DIFFER

_ROOT = Path(__file__).parents[1]
CONFIGS = _ROOT / "configs/claim"
RESULTS, SUMMARY = "results", "claim.json"
GSM8K = "gsm8k"
_PROBLEMS = "eval/generative/gsm8k_test.jsonl.gz"
_ONE_IN = 20
_VOCAB_SIZE = 8192
_STEPS = "train.steps"
_ABLATION_STEPS = 100
_KEPT = ("metric", "main_score", "interval", "chance")  # entries of the report on a task
_PATHS = ("model.tokenizer", "data.train", "data.validation", "train.output")
_MAY_DIFFER = tuple(key for key in MAY_DIFFER if key != _STEPS)


def prepare(data: Path, output: Path) -> None:
    """Splits the training data by source, writes GSM8K's test as records and trains the tokenizer; once.

    Raises:
      InputError: The output was made from other data.
    """
    done, made_from = output / "data/done", digest(sources(data))
    if done.exists():
        if done.read_text() != made_from:
            raise InputError(f"{output} was made from other data than --data {data}; choose another --output")
        return
    split(data / "train", output / "data")
    folder = output / "data/train/embedding"
    everything = [line for path in sorted(folder.iterdir()) for line in path.read_bytes().splitlines()]
    _write_lines(output / "data/one_file/embedding.jsonl", everything)
    with gzip.open(data / _PROBLEMS, "rt") as file:
        problems = [json.loads(line) for line in file]
    solved = [
        json.dumps({"text": [row["question"], re.sub(r"<<.*?>>", "", row["solution"])]}).encode() for row in problems
    ]
    _write_lines(output / "data/gsm8k_test.jsonl", solved)
    tokenizer = train_bpe(vocabulary_texts(str(output / "data/train")), _VOCAB_SIZE)
    for name, content in tokenizer.files().items():
        files.write_text(_made(output / "tokenizer" / name), content)
    files.write_text(done, made_from)


def sources(data: Path) -> list[Path]:
    """Files of `data` that `prepare` reads."""
    return [*_training(data / "train"), data / _PROBLEMS]


def _training(folder: Path) -> list[Path]:
    return list(map(Path, find_files([str(folder / "embedding"), str(folder / "generative")])))


def digest(paths: Iterable[Path]) -> str:
    """Digest of the content of files, in the order of their paths."""
    found = hashlib.sha256()
    for path in sorted(paths):
        found.update(bytes.fromhex(files.sha256(path)))
    return found.hexdigest()[:16]


def split(data: Path, output: Path) -> None:
    """Splits the records of each file between `train/` and, a twentieth of them, `held_out/`."""
    for path in _training(data):
        source = open_source(path)
        parts: dict[str, list[bytes]] = {"train": [], "held_out": []}
        for number, record in enumerate(source):
            parts["held_out" if _held_out(record) else "train"].append(source.lines(number, number + 1)[0].rstrip())
        for part, lines in parts.items():
            if lines:  # a twentieth of a small file may be empty
                _write_lines(output / part / path.parent.name / f"{path.name.split('.')[0]}.jsonl", lines)


def key(record: Record) -> str:
    """The text that decides on which side of the split a record is: its query, or its first turn."""
    return record.query.text if isinstance(record, EmbeddingRecord) else record.texts()[0]


def _held_out(record: Record) -> bool:
    return int.from_bytes(hashlib.blake2b(key(record).encode(), digest_size=8).digest()) % _ONE_IN == 0


def _write_lines(path: Path, lines: Sequence[bytes]) -> None:
    files.write_bytes(_made(path), b"".join(line + b"\n" for line in lines))


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def suite_of(name: str, data: Path, output: Path) -> Suite:
    """A suite of configs/claim, with the records that the split holds out."""
    suite = load_suite(CONFIGS / name, data=data / "eval")
    held_out = Perplexity(HELD_OUT, str(output / "data/held_out/generative"))
    gsm8k = Perplexity(GSM8K, str(output / "data/gsm8k_test.jsonl"))
    return dataclasses.replace(suite, tasks=(held_out, gsm8k, *suite.tasks))


@dataclasses.dataclass(frozen=True)
class Study:
    """The setup that all models share.

    Attributes:
      config: Config file of the models.
      settings: Changes to the config for all of them.
      output: Folder of everything, which `prepare` has filled.
    """

    config: Path
    settings: Mapping[str, Any]
    output: Path

    def measure(
        self,
        name: str,
        seed: int,
        suite: Suite,
        changes: Mapping[str, Any],
        *,
        train_data: str | None = None,
        trained: bool = True,
    ) -> None:
        """Trains a model, or takes it as it is at the start, evaluates it and keeps the result; once.

        Raises:
          InputError: The model was trained or measured with other settings.
        """
        text = dump_config(load_config(self.config, _options({**self.settings, "train.seed": seed, **changes})))
        marks = {task.name: fingerprint(task, suite, "") for task in suite.tasks}
        earlier = read_result(self.output / RESULTS, seed, name)
        if earlier:
            self._check(f"seed {seed}'s {name}", earlier, text)
            if earlier.marks == marks:
                print(f"seed {seed}, {name}: kept")
                return
            print(f"seed {seed}, {name}: measured again, as tasks or their data have changed")
        folder, begun = self.output / str(seed) / name, time.monotonic()
        is_new = not folder.exists()
        paths = (
            self.output / "tokenizer",
            train_data or self.output / "data/train",
            self.output / "data/held_out",
            folder,
        )
        given = parse_config(text, _options(dict(zip(_PATHS, paths, strict=True))))
        if (folder / CONFIG).exists():  # the trainer compares everything else
            steps = load_config(folder / CONFIG).train.steps
            if steps != given.train.steps:
                raise InputError(
                    f"{folder} is a run of train.steps={steps}, not {given.train.steps}; give --train.steps={steps}, "
                    "or choose another --output"
                )
        trainer = Trainer(given)
        if trained and not trainer.fit():
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
                for task in report if task.startswith((HELD_OUT, *PRIMARY))
            },
            losses={
                stream: [values.tolist() for values in series(lines, f"loss/{stream}")]
                for stream in ("embedding", "generative")
            },
            tokens=int(sum(line["tokens"] for line in lines)),
            training_seconds=sum(line["step_seconds"] for line in lines),
            wall_seconds=time.monotonic() - begun if is_new else earlier.wall_seconds if earlier else None,
        )  # fmt: skip
        write_result(self.output / RESULTS, seed, name, result)

    @functools.cached_property
    def data(self) -> str:
        """Digest of the training data and the tokenizer."""
        return digest([*_training(self.output / "data/train"), *self.output.glob("tokenizer/*")])

    def _check(self, what: str, earlier: Result, config: str) -> None:
        differences = config_differences(parse_config(earlier.config), parse_config(config), ignore=_MAY_DIFFER)
        if earlier.data != self.data:
            differences.append(f"data: {earlier.data} -> {self.data}")
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


def known_ablations() -> dict[str, dict[str, Any]]:
    """The changes of each ablation."""
    return yaml.safe_load((CONFIGS / "ablations.yaml").read_text())


def ablation_steps(change: Mapping[str, Any], baseline: int) -> int:
    """Steps of an ablation that sees as many samples as `baseline` steps of the baseline."""
    return max(1, change.get(_STEPS, _ABLATION_STEPS) * baseline // _ABLATION_STEPS)


def main() -> None:
    """Trains, measures, compares and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=_ROOT.parent / "shared/data", help="folder with train/ and eval/")
    parser.add_argument("--config", type=Path, default=CONFIGS / "unified.yaml", help="of the models (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/claim"), help="where everything goes (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of weights and data order (%(default)s)")
    parser.add_argument("--ablations", nargs="*", help="measure these ablations too; without names all of them")
    parser.add_argument("--page", type=Path, help="page to fill with the tables; results and plots go beside it")
    args, overrides = parser.parse_known_args()
    if bare := [override for override in overrides if not re.match(r"--[\w.]+=", override)]:
        parser.error(f"{' '.join(bare)}: no option of the script; settings of the config are --key=value")
    more = dict(override.removeprefix("--").split("=", 1) for override in overrides)
    changes = known_ablations()
    ablations = [] if args.ablations is None else args.ablations or list(changes)
    if unknown := [name for name in ablations if name not in changes]:
        parser.error(f"--ablations: no {', '.join(unknown)}; there are {', '.join(changes)}")
    if fixed := more.keys() & {*_PATHS, "train.seed", "train.mode"}:
        parser.error(f"{', '.join(sorted(fixed))}: the script chooses these; give --data, --output or --seeds")
    if clashes := {key for name in ablations for key in more.keys() & changes[name].keys() - {_STEPS}}:
        parser.error(f"{', '.join(sorted(clashes))}: ablations change these; give them without --ablations")
    baseline = load_config(args.config, _options(more)).train.steps if _STEPS in more else _ABLATION_STEPS
    prepare(args.data, args.output)
    study = Study(args.config, more, args.output)
    suite, results = suite_of("suite.yaml", args.data, args.output), args.output / RESULTS
    measure_bm25(suite, results)
    for seed in args.seeds:
        for mode in MODELS:
            study.measure(mode, seed, suite, {"train.mode": mode})
        study.measure(UNTRAINED, seed, suite, {}, trained=False)
    whole = suite_of("ablation_suite.yaml", args.data, args.output)
    primary = dataclasses.replace(whole, tasks=tuple(t for t in whole.tasks if t.name in (HELD_OUT, *PRIMARY)))
    one_file = f"[{args.output / 'data/one_file'}, {args.output / 'data/train/generative'}]"
    for name in ablations:
        study.measure(
            ablation(name), args.seeds[0], whole if name == "baseline" else primary,
            {**changes[name], _STEPS: ablation_steps(changes[name], baseline)},
            train_data=one_file if name == "one_file" else None,
        )  # fmt: skip
    summary = summarize(results, args.seeds, changes)
    files.write_text(args.output / SUMMARY, json.dumps(summary, indent=2) + "\n")
    plots = plot(results, summary, args.output)
    shown = tables(summary)
    print_tables(shown)
    if args.page:
        publish(args.page, shown, results, args.output / SUMMARY, *plots)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
