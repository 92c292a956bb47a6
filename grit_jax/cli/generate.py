"""The command `grit-jax generate`."""

from __future__ import annotations

import argparse

from grit_jax.cli.arguments import refuse_not_positive
from grit_jax.config.ranges import NOT_NEGATIVE, SHARE, require

HELP = "answer a prompt"
EXAMPLES = """\
  grit-jax generate runs/quickstart --prompt "What does os.path.join do?"
  grit-jax generate my-llama --prompt "Once upon a time" --raw --max-new-tokens 200 --temperature 0.8 --seed 1
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `generate`."""
    parser.add_argument("model", metavar="MODEL", help="run folder, checkpoint or Hugging Face folder")
    parser.add_argument("--prompt", required=True, help="the user's message")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="most tokens (%(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest (%(default)s)"
    )
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus probability (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the draws (%(default)s)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may repeat")
    parser.add_argument("--raw", action="store_true", help="continue the prompt as it is, without the chat format")


def run(args: argparse.Namespace) -> int:
    """Prints an answer as it is made."""
    refuse_not_positive(args, "max_new_tokens")
    require("--temperature", args.temperature, NOT_NEGATIVE)
    require("--top-p", args.top_p, SHARE)

    from grit_jax.inference.model import GritModel

    model = GritModel.load(args.model)
    pieces = model.stream(
        args.prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        stop=args.stop,
        raw=args.raw,
    )
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0
