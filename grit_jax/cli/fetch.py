"""The command `grit-jax fetch` and its sub-commands."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

HELP = "bring a model or a data set from the Hugging Face Hub to where training reads it"
EXAMPLES = """\
  grit-jax fetch model mistralai/Mistral-7B-v0.1 gs://my-bucket/models/mistralai/Mistral-7B-v0.1
  grit-jax fetch data medi2 gs://my-bucket/data/medi2
  grit-jax fetch data tulu2 data/tulu2 --revision main
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `fetch`."""
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    for kind, name, about, help in (
        ("model", "ORG/NAME", "model on the Hub", "download, check and import a model as a checkpoint"),
        ("data", "NAME", "medi, medi2, medi2bge or tulu2", "download, check and copy a published data set"),
    ):
        one = kinds.add_parser(kind, help=help, description=help, allow_abbrev=False)
        one.add_argument("name", metavar=name, help=about)
        one.add_argument("output", metavar="OUTPUT", help="new folder, on a disk or in a bucket")
        one.add_argument("--revision", metavar="R", help="branch, tag or commit")
        one.add_argument(
            "--downloads", metavar="DIR", help="where downloads go (default: grit_jax/fetch in the user's cache)"
        )
        one.add_argument("--keep-downloads", action="store_true", help="leave it there when all is done")


def run(args: argparse.Namespace) -> int:
    """Fetches."""
    from grit_jax.datatools.fetch import fetch_data, fetch_model

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    downloads = Path(args.downloads or cache / "grit_jax" / "fetch")
    fetch = fetch_model if args.kind == "model" else fetch_data
    fetch(args.name, args.output, revision=args.revision, downloads=downloads, keep=args.keep_downloads)
    return 0
