"""The command `grit-jax merge`."""

from __future__ import annotations

import argparse

from grit_jax.cli.command import argument, command, number
from grit_jax.errors import InputError


@command(
    "merge models of one architecture, or the last checkpoints of a run, into one model",
    argument("models", nargs="+", metavar="MODEL", help="run folder, checkpoint or Hugging Face folder; two or more"),
    argument("--output", required=True, metavar="OUT", help="new checkpoint folder"),
    argument("--weights", nargs="+", type=float, metavar="W", help="one for each model; sum to 1 (default: equal)"),
    argument("--method", choices=("linear", "slerp"), default="linear", help="slerp takes two models (%(default)s)"),
    number("--last", "K", "merge the last K checkpoints of the one MODEL, a run folder or a folder of checkpoints"),
    examples="""\
  grit-jax merge runs/a runs/b --output checkpoints/merged
  grit-jax merge runs/a checkpoints/base --output checkpoints/merged --weights 0.7 0.3 --method slerp
  grit-jax merge runs/a --last 5 --output checkpoints/soup
  grit-jax merge runs/a/params --last 5 --output checkpoints/soup
""",
)
def run(args: argparse.Namespace) -> int:
    """Merges on the host's CPU; an accelerator may be busy with something else."""
    if args.last and len(args.models) > 1:
        raise InputError(f"--last {args.last} takes the checkpoints of one run, not {len(args.models)} models")

    import jax

    jax.config.update("jax_platforms", "cpu")

    from grit_jax.checkpoints.checkpoint import last_checkpoints
    from grit_jax.checkpoints.merging import merge

    models = last_checkpoints(args.models[0], args.last) if args.last else args.models
    merge(models, args.output, weights=args.weights, method=args.method)
    print(
        f"{args.output}: a checkpoint merged from {len(models)} models; name it as model.init, or wherever a model goes"
    )
    return 0
