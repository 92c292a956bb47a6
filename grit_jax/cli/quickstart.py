"""The command `grit-jax quickstart`."""

from __future__ import annotations

import argparse
from pathlib import Path

from grit_jax.cli.command import argument, command, flag


@command(
    "train a model that searches and writes on this machine's docstrings, in minutes",
    argument(
        "--base", metavar="MODEL",
        help="pretrained model to train further: a folder, or ORG/NAME on the Hugging Face Hub (none: from scratch)",
    ),
    argument("--output", metavar="DIR", help="run folder (runs/quickstart; with --base runs/quickstart_base)"),
    flag("--fresh", "remove an earlier quickstart there and train again"),
    overrides="",  # on top of configs/quickstart.yaml or configs/quickstart_base.yaml
    examples="""\
  grit-jax quickstart
  grit-jax quickstart --base HuggingFaceTB/SmolLM2-135M-Instruct
  grit-jax quickstart --output runs/again --fresh --train.steps=50
""",
)  # fmt: skip
def run(args: argparse.Namespace) -> int:
    """Runs the quickstart; 75 if a signal stopped it after a checkpoint."""
    from grit_jax.quickstart.job import run_quickstart

    output = Path(args.output or ("runs/quickstart_base" if args.base else "runs/quickstart"))
    if run_quickstart(output, base=args.base, fresh=args.fresh, overrides=args.overrides):
        return 0
    print("stopped, and training is saved: run the same command to continue")
    return 75
