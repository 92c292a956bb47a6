"""The command `grit-jax generate`."""

from __future__ import annotations

import argparse

from grit_jax.cli.command import MODEL, STOP, argument, command, flag, number
from grit_jax.config.ranges import FINITE, NOT_NEGATIVE, SHARE


@command(
    "complete a prompt",
    MODEL,
    argument("--prompt", required=True, help="the user's message"),
    number("--max-new-tokens", "N", "most tokens", 128),
    number("--temperature", "T", "0 takes the likeliest token", 0.0, NOT_NEGATIVE),
    number("--top-p", "P", "nucleus probability", 1.0, SHARE),
    number("--seed", "S", "seed of the draws", 0, FINITE),
    STOP,
    flag("--raw", "continue the prompt as it is, without the chat format"),
    examples="""\
  grit-jax generate runs/quickstart --prompt "What does os.path.join do?"
  grit-jax generate my-llama --prompt "Once upon a time" --raw --max-new-tokens 200 --temperature 0.8 --seed 1
""",
)
def run(args: argparse.Namespace) -> int:
    """Prints a completion while the model writes it."""
    from grit_jax.inference.model import GritModel

    pieces = GritModel.load(args.model).stream(
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
