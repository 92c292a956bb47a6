"""The command `grit-jax train`."""

from __future__ import annotations

import argparse

HELP = "train a model, or resume the run folder that train.output names"
EXAMPLES = """\
  grit-jax train configs/tiny.yaml --data.train=data/ --train.output=runs/first
  grit-jax train configs/tiny.yaml --model.init=runs/first --train.steps=200 --train.output=runs/second
"""
TAKES_OVERRIDES = True  # --section.key=value, on top of the file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `train`."""
    parser.add_argument("config", metavar="CONFIG.yaml", help="config file")


def run(args: argparse.Namespace) -> int:
    """Trains; 0 when all steps are done, 75 when a signal ended the run after a checkpoint."""
    from grit_jax.config import load_config

    config = load_config(args.config, args.overrides)

    from grit_jax.train.loop import Trainer

    trainer = Trainer(config)
    done = trainer.fit()
    if done:
        print(f"done: {config.train.output} holds {trainer.step} steps")
        return 0
    print(f"stopped by a signal; {config.train.output} is saved at step {trainer.step}: run the same command to go on")
    return 75
