"""The command `grit-jax train`."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from grit_jax.cli.command import argument, command, flag

if TYPE_CHECKING:
    from grit_jax.config import Config
    from grit_jax.runs.checks import Check


@command(
    "train a model, or resume the run folder that train.output names",
    argument("config", metavar="CONFIG.yaml", help="config file"),
    flag("--dry-run", "check data, model, mesh, disk, run folder and the step's memory, and train nothing"),
    overrides="",
    examples="""\
  grit-jax train configs/tiny.yaml --data.train=data/ --train.output=runs/first
  grit-jax train configs/tiny.yaml --model.init=runs/first --train.steps=200 --train.output=runs/second
  grit-jax train configs/tiny.yaml --data.train=data/ --train.output=runs/first --dry-run
""",
)
def run(args: argparse.Namespace) -> int:
    """Trains; 0 if all steps are done, 75 if stopped and saved, 1 if updates are no longer finite."""
    from grit_jax.config import load_config

    config = load_config(args.config, args.overrides)
    if args.dry_run:
        from grit_jax.runs.checks import print_checks
        from grit_jax.train.dry_run import dry_run

        return 2 if print_checks(itertools.chain(dry_run(config), _scorecard_check(config))) else 0

    from grit_jax.parallel import distributed

    distributed.start(config.distributed)

    from grit_jax.evaluation.scorecard import Scorecard
    from grit_jax.train.loop import Trainer

    trainer = Trainer(config, Scorecard(config.scorecard) if config.scorecard.suite else None)
    try:
        done = trainer.fit()
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if done:
        print(f"done: {config.train.output} holds {trainer.step} steps")
        return 0
    saved = f"{config.train.output} is saved at step {trainer.step}" if trainer.step else "no step is done yet"
    print(f"stopped; {saved}: run the same command to continue")
    return 75


def _scorecard_check(config: Config) -> Iterator[Check]:
    from grit_jax.evaluation.scorecard import Scorecard
    from grit_jax.runs.checks import checked

    if suite := config.scorecard.suite:
        check, _ = checked(
            "scorecard", lambda: Scorecard(config.scorecard), lambda _: f"{suite} and its data are there"
        )
        yield check
