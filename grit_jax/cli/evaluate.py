"""The command `grit-jax evaluate`."""

from __future__ import annotations

import argparse
from pathlib import Path

from grit_jax.errors import InputError

HELP = "measure a model on the tasks of a suite: search, similarity, classification, answers, programs, likelihood"
EXAMPLES = """\
  grit-jax evaluate runs/quickstart --suite my-data/suite.yaml
  grit-jax evaluate GritLM/GritLM-7B --suite configs/suites/embedding.yaml --data my-data --output report.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `evaluate`."""
    parser.add_argument("model", metavar="MODEL", help="run folder, checkpoint or Hugging Face folder")
    parser.add_argument("--suite", required=True, metavar="FILE.yaml", help="names the tasks and their data")
    parser.add_argument("--data", metavar="DIR", help="what its paths are relative to (default: the suite's folder)")
    parser.add_argument(
        "--output", metavar="REPORT.json", help="report to write; tasks that it has and that are unchanged are kept"
    )
    parser.add_argument(
        "--examples",
        metavar="DIR",
        help="folder for what each example contributes to a task's score, TASK.npy",
    )
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint of a run (default: the newest)")


def run(args: argparse.Namespace) -> int:
    """Measures, prints a table and writes the report."""
    output = Path(args.output) if args.output else None
    if output and output.suffix != ".json":
        raise InputError(f"--output {output}: must end in .json")

    from grit_jax.evaluation.evaluate import evaluate
    from grit_jax.evaluation.suite import load_suite
    from grit_jax.inference.model import GritModel

    suite = load_suite(args.suite, data=args.data)
    model = GritModel.load(args.model, step=args.step)
    examples = Path(args.examples) if args.examples else None
    evaluate(model, suite, output=output, examples=examples, about={"model": args.model, "suite": args.suite})
    return 0
