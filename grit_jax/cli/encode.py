"""The command `grit-jax encode`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from grit_jax.cli.command import MODEL, argument, command, number, progress_bar
from grit_jax.errors import InputError


@command(
    "embed the texts of a file",
    MODEL,
    argument("--input", required=True, help='.jsonl with {"text": ...} per line, or .txt with one text per line'),
    argument("--output", required=True, help="float32 .npy, one row per text"),
    argument("--instruction", default="", help="instruction of the texts; read, not pooled"),
    number("--batch-tokens", "N", "tokens per batch (default: chosen for the device)"),
    number("--max-length", "N", "most tokens of a text, the rest is cut (default: the model's limit)"),
    examples="""\
  grit-jax encode runs/quickstart --input docs.txt --output docs.npy
  grit-jax encode runs/quickstart --input queries.jsonl --output queries.npy \\
      --instruction "Given a question, retrieve passages that answer it"
""",
)
def run(args: argparse.Namespace) -> int:
    """Embeds a file."""
    output = Path(args.output)
    if output.suffix != ".npy":
        raise InputError(f"--output {output}: must end in .npy")
    texts = read_texts(Path(args.input))

    import numpy as np

    from grit_jax.files import replacing
    from grit_jax.inference.model import GritModel

    model = GritModel.load(args.model)
    started = time.monotonic()
    with progress_bar("encoding", len(texts)) as progress:
        encoded = model.encode_with_counts(
            texts,
            instruction=args.instruction,
            max_length=args.max_length,
            batch_tokens=args.batch_tokens,
            progress=progress,
        )
    seconds = time.monotonic() - started
    with replacing(output) as file:
        np.save(file, encoded.vectors)
    print(
        f"{len(texts):,} texts, {encoded.num_tokens:,} tokens in {seconds:.1f} s "
        f"({encoded.num_tokens / seconds:,.0f} tokens/s); {encoded.num_truncated:,} truncated; "
        f"{output}: {encoded.vectors.shape[0]} x {encoded.vectors.shape[1]} float32"
    )
    return 0


def read_texts(path: Path, *, option: str = "--input") -> list[str]:
    """The texts of a .jsonl or .txt file, one per line; blank lines are skipped, as everywhere.

    Raises:
      InputError: The file is missing, empty or has another suffix, or a line is malformed or empty.
    """
    if path.suffix not in (".jsonl", ".txt"):
        raise InputError(f"{option} {path}: must end in .jsonl or .txt")
    from grit_jax.data.text_files import read_text_lines, sound

    texts = []
    for where, line in sound(read_text_lines(path)):
        text = _jsonl_text(line, where) if path.suffix == ".jsonl" else line
        if not text:
            raise InputError(f"{where}: empty text; remove the line or put a text there")
        texts.append(text)
    if not texts:
        raise InputError(f"{option} {path}: the file is empty")
    return texts


def _jsonl_text(line: str, where: str) -> str:
    from grit_jax.data.records import parse_object

    text = parse_object(line, where).get("text")
    if not isinstance(text, str):
        raise InputError(f'{where}: no string under "text"; each line must be {{"text": ...}}')
    return text
