"""The command `grit-jax status`."""

from __future__ import annotations

import argparse
import json

HELP = "show how a run is doing: step, losses, speed, goodput, checkpoint, whether it lives, time left"
EXAMPLES = """\
  grit-jax status runs/first
  grit-jax status gs://my-bucket/runs/first --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `status`."""
    parser.add_argument("run", metavar="RUN", help="run folder, on a disk or in a bucket")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def run(args: argparse.Namespace) -> int:
    """Reads the folder; needs no accelerator and disturbs nobody."""
    from grit_jax.runs.status import as_json, as_lines, read_status

    status = read_status(args.run)
    print(json.dumps(as_json(status)) if args.json else "\n".join(as_lines(status)))
    return 0
