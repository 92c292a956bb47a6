"""The command `grit-jax import-hf`."""

from __future__ import annotations

import argparse

HELP = "write a checkpoint from a Hugging Face folder"
EXAMPLES = """\
  grit-jax import-hf my-llama checkpoints/my-llama
  grit-jax train configs/tiny.yaml --model.init=checkpoints/my-llama --data.train=data/
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `import-hf`."""
    parser.add_argument("source", metavar="HF_FOLDER", help="folder with config.json, safetensors and tokenizer.json")
    parser.add_argument("out", metavar="OUT", help="new checkpoint folder")


def run(args: argparse.Namespace) -> int:
    """Imports a model."""
    from pathlib import Path

    from grit_jax.checkpoint import CheckpointMetadata, save_params
    from grit_jax.config import InputError
    from grit_jax.loading import load_for_conversion

    out = Path(args.out)
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out} exists and is not empty; choose another folder")
    pretrained, params = load_for_conversion(args.source)
    metadata = CheckpointMetadata(pretrained.architecture, pretrained.embedding, pretrained.tokenizer.files())
    save_params(out, params, metadata)
    print(f"{out}: a checkpoint of {args.source}; name it as model.init, or to encode and generate")
    return 0
