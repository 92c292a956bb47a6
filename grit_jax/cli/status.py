"""The command `grit-jax status`."""

from __future__ import annotations

import argparse
import json

from grit_jax.cli.command import JSON, RUN, command


@command(
    "show how a run is doing: step, losses, speed, goodput, checkpoint, whether it is alive, time left",
    RUN,
    JSON,
    examples="""\
  grit-jax status runs/first
  grit-jax status gs://my-bucket/runs/first --json
""",
)
def run(args: argparse.Namespace) -> int:
    """Reads the folder; needs no accelerator and does not disturb the run."""
    from grit_jax.runs.status import as_json, as_lines, read_status

    status = read_status(args.run)
    print(json.dumps(as_json(status)) if args.json else "\n".join(as_lines(status)))
    return 0
