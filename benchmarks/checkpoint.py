"""How long saving a checkpoint keeps training waiting, here and with `torch.save`.

    python benchmarks/checkpoint.py

Saves weights and AdamW's moments of the benchmarks' model. `blocking_seconds` is the time until training may continue,
`writing_seconds` the time until the checkpoint is on disk; compare both with the time of a step (train_step.py).
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import common
import jax

from grit_jax.checkpoints.checkpoint import CheckpointMetadata, Checkpoints
from grit_jax.checkpoints.opening import load_params, open_model
from grit_jax.config import CheckpointConfig, MeshConfig, OptimizerConfig
from grit_jax.model.transformer import abstract_model, param_axes
from grit_jax.parallel import sharding
from grit_jax.train.optimizer import make_optimizer
from grit_jax.train.state import new_state


def ours(model: Path, out: Path, repeats: int) -> dict[str, float]:
    """Median seconds of our saves."""
    pretrained = open_model(model)
    params = load_params(pretrained, sharding.make_mesh(MeshConfig()))
    optimizer = make_optimizer(OptimizerConfig(), 1, param_axes(abstract_model(pretrained.architecture)))
    state = jax.block_until_ready(jax.jit(new_state, static_argnums=1)(params, optimizer))
    metadata = CheckpointMetadata(pretrained.architecture, pretrained.embedding, pretrained.tokenizer.files())
    checkpoints = Checkpoints(out, keep=CheckpointConfig(keep=1))
    blocking, writing = [], []
    for step in range(repeats + 1):
        started = time.perf_counter()
        checkpoints.save(step, state.params, state.opt_state, metadata)
        blocking.append(time.perf_counter() - started)
        checkpoints.wait()
        writing.append(time.perf_counter() - started)
    checkpoints.close()
    return {
        "gigabytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e9,
        "ours_blocking_seconds": statistics.median(blocking[1:]),
        "ours_writing_seconds": statistics.median(writing[1:]),
    }


def in_torch(model: Path, out: Path, repeats: int) -> dict[str, float]:
    """Median seconds of `torch.save`, which blocks until it has written."""
    import torch

    loaded = common.load_torch(model)
    optimizer = torch.optim.AdamW(loaded.parameters(), fused=True)
    for parameter in loaded.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        torch.save({"model": loaded.state_dict(), "optimizer": optimizer.state_dict()}, out)
        seconds.append(time.perf_counter() - started)
    return {"torch_blocking_seconds": statistics.median(seconds[1:])}


def main() -> None:
    """Runs the benchmark."""
    args = common.parser(__doc__).parse_args()
    with common.model_folder(args.tokenizer) as model, tempfile.TemporaryDirectory() as out:
        values = ours(model, Path(out, "ours"), args.repeats)
        if not args.no_torch and common.has_torch():
            values |= in_torch(model, Path(out, "torch.pt"), args.repeats)
    common.report({name: round(value, 3) for name, value in values.items()})


if __name__ == "__main__":
    main()
