"""The command `grit-jax export-hf`."""

from __future__ import annotations

import argparse

HELP = "write a Hugging Face folder from a run or checkpoint"
EXAMPLES = """\
  grit-jax export-hf runs/quickstart my-model
  grit-jax export-hf runs/quickstart my-model --step 200 --dtype bfloat16
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `export-hf`."""
    parser.add_argument("source", metavar="RUN_OR_CHECKPOINT", help="run folder or checkpoint")
    parser.add_argument("out", metavar="OUT", help="new folder")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint to take (default: the newest)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="(%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Exports a model."""
    import jax.numpy as jnp

    from grit_jax.hf.export import save_folder
    from grit_jax.loading import load_for_conversion

    pretrained, params = load_for_conversion(args.source, args.step, jnp.dtype(args.dtype))
    save_folder(args.out, pretrained, params, dtype=args.dtype)
    print(f"{args.out}: a Hugging Face folder in {args.dtype}; AutoModelForCausalLM.from_pretrained opens it")
    return 0
