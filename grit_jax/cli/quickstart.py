"""The command `grit-jax quickstart`."""

from __future__ import annotations

import argparse

HELP = "from the docstrings on this machine to a model that searches and writes, in minutes"
EXAMPLES = """\
  grit-jax quickstart
  grit-jax quickstart --output runs/again --fresh --train.steps=50
"""
TAKES_OVERRIDES = True  # --section.key=value, on top of configs/quickstart.yaml


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `quickstart`."""
    parser.add_argument("--output", default="runs/quickstart", metavar="DIR", help="run folder (%(default)s)")
    parser.add_argument("--fresh", action="store_true", help="remove an earlier quickstart there and train again")


def run(args: argparse.Namespace) -> int:
    """Runs the main job; 75 when a signal stopped it after a checkpoint."""
    from pathlib import Path

    from grit_jax.quickstart.job import run_quickstart

    if run_quickstart(Path(args.output), fresh=args.fresh, overrides=args.overrides):
        return 0
    print("told to stop, training is saved: run the same command to go on")
    return 75
