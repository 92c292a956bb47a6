"""The command `grit-jax evaluate`."""

from __future__ import annotations

import argparse
from pathlib import Path

from grit_jax.cli.command import MODEL, STEP, argument, command
from grit_jax.errors import InputError


@command(
    "measure a model on the tasks of a suite: search, similarity, classification, completions, programs, likelihood",
    MODEL,
    argument("--suite", required=True, metavar="FILE.yaml", help="names the tasks and their data"),
    argument("--data", metavar="DIR", help="folder to which its paths are relative (default: the suite's)"),
    argument("--output", metavar="REPORT.json", help="report to write; unchanged tasks in it are kept"),
    argument("--examples", metavar="DIR", help="folder for each example's share of a task's score, TASK.npy"),
    STEP,
    examples="""\
  grit-jax evaluate runs/quickstart --suite my-data/suite.yaml
  grit-jax evaluate GritLM/GritLM-7B --suite configs/suites/embedding.yaml --data my-data --output report.json
""",
)
def run(args: argparse.Namespace) -> int:
    """Prints a table of scores and writes the report."""
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
