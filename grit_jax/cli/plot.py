"""The command `grit-jax plot`."""

from __future__ import annotations

import argparse

from grit_jax.cli.command import RUN, argument, command


@command(
    "draw a run: losses, gradient norm, learning rate, speed, goodput, health of the embeddings",
    RUN,
    argument("--output", metavar="PNG", help="picture to write (default: plot.png in the run folder)"),
    examples="""\
  grit-jax plot runs/first
  grit-jax plot gs://my-bucket/runs/first --output first.png
""",
)
def run(args: argparse.Namespace) -> int:
    """Draws the metrics logged so far."""
    from grit_jax import files
    from grit_jax.runs import folder
    from grit_jax.runs.plot import plot_run

    output = args.output or files.join(args.run, folder.PLOT)
    plot_run(args.run, output)
    print(output)
    return 0
