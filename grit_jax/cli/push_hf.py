"""The command `grit-jax push-hf`."""

from __future__ import annotations

import argparse
import sys

HELP = "upload an exported folder to the Hugging Face Hub"
EXAMPLES = """\
  grit-jax push-hf my-model my-name/my-model --private
  grit-jax push-hf my-model my-name/my-model --revision step-200
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `push-hf`."""
    parser.add_argument("folder", metavar="FOLDER", help="folder that export-hf wrote")
    parser.add_argument("repository", metavar="ORG/NAME", help="model on the Hub; made where it is not there")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch, made where it is not there")
    parser.add_argument("--message", default="Upload a GRIT model", help="of the commit (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Uploads a folder."""
    from grit_jax.hf.publish import push

    address = push(
        args.folder, args.repository, private=args.private, revision=args.revision, message=args.message,
        report=lambda line: print(line, file=sys.stderr),
    )  # fmt: skip
    print(address)
    return 0
