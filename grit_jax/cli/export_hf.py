"""The command `grit-jax export-hf`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from grit_jax import files
from grit_jax.cli.command import STEP, argument, command, flag
from grit_jax.config import load_config
from grit_jax.errors import InputError, install
from grit_jax.runs import folder as run_folder
from grit_jax.runs.checks import print_checks

if TYPE_CHECKING:
    from grit_jax.hf.interop import Origin


@command(
    "write a Hugging Face folder from a run or checkpoint",
    argument("source", metavar="RUN_OR_CHECKPOINT", help="run folder or checkpoint"),
    argument("out", metavar="OUT", help="new folder"),
    STEP,
    argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="(%(default)s)"),
    argument(
        "--prompt", action="append", default=[], metavar="NAME=INSTRUCTION",
        help="instruction of a named prompt of sentence-transformers, besides query and document; may be repeated",
    ),
    flag("--adapter", "write only the adapters, in PEFT's layout, rather than a model with them merged in"),
    flag("--no-verify", "do not compare with PyTorch's numbers"),
    examples="""\
  grit-jax export-hf runs/quickstart my-model
  grit-jax export-hf runs/quickstart my-model --step 200 --dtype bfloat16
  grit-jax export-hf runs/adapters my-adapters --adapter
  grit-jax export-hf runs/quickstart my-model --prompt query="Given a question, retrieve passages that answer it"
""",
)  # fmt: skip
def run(args: argparse.Namespace) -> int:
    """Exports a model and compares the folder with PyTorch if that is installed."""
    instructions = parse_prompts(args.prompt)

    import jax.numpy as jnp

    from grit_jax.checkpoints.opening import load_adapters, load_for_conversion
    from grit_jax.doctor.verify import missing_packages, verify
    from grit_jax.hf import adapter_folder
    from grit_jax.hf.interop import has_sentence_pooling
    from grit_jax.hf.model_folder import save_folder

    if args.adapter:
        pretrained, params = load_adapters(args.source, args.step, jnp.dtype(args.dtype))
        adapter_folder.save_folder(args.out, pretrained, params, dtype=args.dtype)
        base = pretrained.adapter and pretrained.adapter.base
        print(f"{args.out}: adapters in {args.dtype}, in PEFT's layout; they belong to {base}")
        return 0
    pretrained, params = load_for_conversion(args.source, args.step, jnp.dtype(args.dtype))
    origin = read_origin(args.source, args.step)
    save_folder(args.out, pretrained, params, dtype=args.dtype, instructions=instructions, origin=origin)
    del params
    if not has_sentence_pooling(pretrained.embedding):
        print("no files for sentence-transformers: it has no pooling that equals weighted_mean")
    if args.no_verify:
        print("not compared with PyTorch (--no-verify)")
    elif missing := missing_packages():
        print(f"not compared with PyTorch: {', '.join(missing)} cannot be imported; {install('torch')}")
    elif print_checks(verify(args.out)):
        print(f"error: {args.out} differs from this package; it is kept for inspection", file=sys.stderr)
        return 1
    print(f"{args.out}: a Hugging Face folder in {args.dtype}; its README.md says how to use it")
    return 0


def parse_prompts(given: Sequence[str]) -> dict[str, str]:
    """Instructions by name.

    Raises:
      InputError: Something is not NAME=INSTRUCTION.
    """
    for text in given:
        name, separator, _ = text.partition("=")
        if not name or not separator:
            raise InputError(f"--prompt {text!r}: write it as NAME=INSTRUCTION")
    return dict(text.split("=", 1) for text in given)


def read_origin(source: str, step: int | None) -> Origin:
    """How a model was made, without paths: a run, by its folder and that of the model it began with; a merged model.

    Args:
      source: Run folder or checkpoint; anything else is known only by its name on the Hub.
      step: Its checkpoint; None for the newest.
    """
    from grit_jax.checkpoints.checkpoint import is_checkpoint, read_metadata
    from grit_jax.hf.hub import is_hub_id
    from grit_jax.hf.interop import Origin
    from grit_jax.runs.logs import read_lines

    path = files.join(source, run_folder.CONFIG)
    if is_hub_id(source):
        return Origin(base_model=source)
    if not files.exists(path):
        merged = read_metadata(source, step).merged if is_checkpoint(source) else {}
        return Origin(merged=_parts(**merged)) if merged else Origin()
    config = load_config(path)
    if step is None:
        step = run_folder.last_checkpoint(source)
    figures: dict[str, float] = {}
    for line in read_lines(files.join(source, run_folder.METRICS)):
        if line["step"] <= (step or 0):
            figures |= {name: line[name] for name in line if name.startswith(("validation/", "scorecard/"))}
    base, licence = _base(config.model.init) if config.model.init else (None, None)
    train = [config.data.train] if isinstance(config.data.train, str) else config.data.train
    return Origin(base, licence, tuple(_name(file) for file in train), step, figures)


def _parts(models: Sequence[str], weights: Sequence[float], method: str) -> str:
    """The record of a merged model as text, without paths."""
    from grit_jax.hf.hub import is_hub_id

    def shown(model: str) -> str:
        if is_hub_id(model):
            return model
        folder, _, step = model.rpartition("/")
        return f"{_name(folder.removesuffix('/' + run_folder.CHECKPOINTS))} {step}" if step.isdigit() else _name(model)

    parts = [f"{shown(model)} (weight {weight:.3g})" for model, weight in zip(models, weights, strict=True)]
    return f"{', '.join(parts)}; {method}"


def _base(init: str) -> tuple[str, str | None]:
    """Name and licence of the model that a run began with, from what `grit-jax fetch` wrote with it."""
    from grit_jax.datatools.fetch import DONE
    from grit_jax.hf.hub import is_hub_id

    if is_hub_id(init):
        return init, None
    try:
        fetched = json.loads(files.read_text(files.join(init, DONE)) or "{}")
        return fetched.get("repository") or _name(init), fetched.get("licence")
    except (OSError, ValueError, AttributeError):
        return _name(init), None


def _name(path: str) -> str:
    return os.path.basename(path.rstrip("/"))
