"""The command `grit-jax quickstart`."""

from __future__ import annotations

import argparse
from pathlib import Path

from grit_jax.cli.command import argument, command, flag


@command(
    "train a model that searches and writes on this machine's docstrings, in minutes",
    argument("--output", default="runs/quickstart", metavar="DIR", help="run folder (%(default)s)"),
    flag("--fresh", "remove an earlier quickstart there and train again"),
    overrides="",  # on top of configs/quickstart.yaml
    examples="""\
  grit-jax quickstart
  grit-jax quickstart --output runs/again --fresh --train.steps=50
""",
)
def run(args: argparse.Namespace) -> int:
    """Runs the quickstart; 75 if a signal stopped it after a checkpoint."""
    from grit_jax.quickstart.job import run_quickstart

    if run_quickstart(Path(args.output), fresh=args.fresh, overrides=args.overrides):
        return 0
    print("stopped, and training is saved: run the same command to continue")
    return 75
