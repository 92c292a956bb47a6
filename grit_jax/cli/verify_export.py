"""The command `grit-jax verify-export`."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from grit_jax.cli.arguments import refuse_not_positive
from grit_jax.runs.checks import TOLERANCE, print_checks

HELP = "compare PyTorch's numbers with ours on an exported folder"
EXAMPLES = """\
  grit-jax verify-export my-model
  grit-jax verify-export my-model --texts lines.txt --tolerance 1e-3
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `verify-export`."""
    parser.add_argument("folder", metavar="FOLDER", help="Hugging Face folder")
    parser.add_argument("--texts", metavar="FILE", help=".jsonl or .txt, one text a line (default: built-in texts)")
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE, metavar="X", help="largest absolute difference (%(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Compares and prints one line per target."""
    refuse_not_positive(args, "tolerance")

    from grit_jax.cli.encode import read_texts
    from grit_jax.doctor.verify import SAMPLE_TEXTS, verify

    texts = read_texts(Path(args.texts), option="--texts") if args.texts else SAMPLE_TEXTS
    checks = verify(args.folder, texts)
    return print_checks(dataclasses.replace(check, tolerance=args.tolerance) for check in checks)
