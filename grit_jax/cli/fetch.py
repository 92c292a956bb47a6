"""The command `grit-jax fetch` and its tools."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from grit_jax.cli.command import Command, argument, flag

_ARGUMENTS = (
    argument("output", metavar="OUTPUT", help="new folder, on a disk or in a bucket"),
    argument("--revision", metavar="R", help="branch, tag or commit"),
    argument("--downloads", metavar="DIR", help="folder for downloads (default: grit_jax/fetch in the user's cache)"),
    flag("--keep-downloads", "keep downloads after the end"),
)


def _fetch(args: argparse.Namespace) -> int:
    from grit_jax.datatools.fetch import fetch_data, fetch_model

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    downloads = Path(args.downloads or cache / "grit_jax" / "fetch")
    fetch = fetch_model if args.tool == "model" else fetch_data
    fetch(args.name, args.output, revision=args.revision, downloads=downloads, keep=args.keep_downloads)
    return 0


run = Command(
    "copy a model or a data set from the Hugging Face Hub to where training reads it",
    tools={
        "model": Command(
            "download, check and import a model as a checkpoint",
            _fetch,
            (argument("name", metavar="ORG/NAME", help="model on the Hub"), *_ARGUMENTS),
        ),
        "data": Command(
            "download, check and copy a published data set",
            _fetch,
            (argument("name", metavar="NAME", help="medi, medi2, medi2bge or tulu2"), *_ARGUMENTS),
        ),
    },
    examples="""\
  grit-jax fetch model mistralai/Mistral-7B-v0.1 gs://my-bucket/models/mistralai/Mistral-7B-v0.1
  grit-jax fetch data medi2 gs://my-bucket/data/medi2
  grit-jax fetch data tulu2 data/tulu2 --revision main
""",
)
