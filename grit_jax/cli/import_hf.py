"""The command `grit-jax import-hf`."""

from __future__ import annotations

import argparse

from grit_jax.cli.command import argument, command


@command(
    "write a checkpoint from a Hugging Face folder or a model on the Hub",
    argument("source", metavar="HF_FOLDER", help="folder, or ORG/NAME[@REVISION] on the Hub"),
    argument("out", metavar="OUT", help="new checkpoint folder"),
    examples="""\
  grit-jax import-hf my-llama checkpoints/my-llama
  grit-jax import-hf mistralai/Mistral-7B-v0.1 gs://my-bucket/mistral-7b
  grit-jax train configs/tiny.yaml --model.init=checkpoints/my-llama --data.train=data/
""",
)
def run(args: argparse.Namespace) -> int:
    """Imports a model."""
    from grit_jax.checkpoints.checkpoint import CheckpointMetadata, refuse_used, save_params
    from grit_jax.checkpoints.opening import load_adapters, load_for_conversion
    from grit_jax.hf.adapter_folder import is_folder

    refuse_used(args.out)
    pretrained, params = load_adapters(args.source) if is_folder(args.source) else load_for_conversion(args.source)
    about = pretrained.architecture, pretrained.embedding, pretrained.tokenizer.files()
    metadata = CheckpointMetadata(*about, adapter=pretrained.adapter)
    save_params(args.out, params, metadata)
    print(f"{args.out}: a checkpoint of {args.source}; name it as model.init, or to encode and generate")
    return 0
