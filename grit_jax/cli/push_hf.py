"""The command `grit-jax push-hf`."""

from __future__ import annotations

import argparse
import sys

from grit_jax.cli.command import argument, command, flag


@command(
    "upload an exported folder to the Hugging Face Hub",
    argument("folder", metavar="FOLDER", help="folder that export-hf wrote"),
    argument("repository", metavar="ORG/NAME", help="model on the Hub; created if missing"),
    flag("--private", "make a new repository private"),
    argument("--revision", metavar="BRANCH", help="branch; created if missing"),
    argument("--message", default="Upload a GRIT model", help="commit message (%(default)s)"),
    examples="""\
  grit-jax push-hf my-model my-name/my-model --private
  grit-jax push-hf my-model my-name/my-model --revision step-200
""",
)
def run(args: argparse.Namespace) -> int:
    """Prints the model's address."""
    from grit_jax.hf.publish import push

    address = push(
        args.folder, args.repository, private=args.private, revision=args.revision, message=args.message,
        tell=lambda line: print(line, file=sys.stderr),
    )  # fmt: skip
    print(address)
    return 0
