"""The command `grit-jax verify-export`."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from grit_jax.cli.command import argument, command, number
from grit_jax.cli.encode import read_texts
from grit_jax.runs.checks import TOLERANCE, print_checks


@command(
    "compare PyTorch's numbers on an exported folder with this package's",
    argument("folder", metavar="FOLDER", help="Hugging Face folder"),
    argument("--texts", metavar="FILE", help=".jsonl or .txt, one text per line (default: built-in texts)"),
    number("--tolerance", "X", "largest absolute difference", TOLERANCE),
    examples="""\
  grit-jax verify-export my-model
  grit-jax verify-export my-model --texts lines.txt --tolerance 1e-3
""",
)
def run(args: argparse.Namespace) -> int:
    """Prints one line per target."""
    from grit_jax.doctor.verify import SAMPLE_TEXTS, verify

    texts = read_texts(Path(args.texts), option="--texts") if args.texts else SAMPLE_TEXTS
    checks = verify(args.folder, texts)
    return print_checks(dataclasses.replace(check, tolerance=args.tolerance) for check in checks)
