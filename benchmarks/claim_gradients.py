"""The angle between the gradients of the two objectives: whether they pull the shared weights the same way."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from grit_jax.config import Config
from grit_jax.data.batch import Batch
from grit_jax.model.transformer import Params
from grit_jax.parallel import sharding
from grit_jax.train.loop import Trainer
from grit_jax.train.setup import set_up
from grit_jax.train.step import JointObjective

BATCHES = 16
ALL = "all shared"
KINDS = (ALL, "attention", "mlp", "norms", "token table")


def gradient_cosines(config: Config) -> dict[str, list[float]]:
    """Cosines of the contrastive and the next-token loss's gradients, by kind of weight, one for each batch.

    The batches are the last `BATCHES` of the config's steps: if a run of the same data and seed ended before them, it
    has not been trained on them.

    Args:
      config: Config of a run of both streams, with the model in `model.init` or at its start; nothing is trained or
        written.
    """
    trainer = Trainer(config)
    products = jax.jit(partial(_products, set_up(trainer.config, trainer.mesh).objective))
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with jax.set_mesh(trainer.mesh):
        for batch in trainer.batches(config.train.steps - BATCHES):
            by_kind = jax.device_get(products(trainer.state.params, sharding.place_batch(trainer.mesh, batch)))
            by_kind[ALL] = np.sum(list(by_kind.values()), axis=0)
            for kind in KINDS:
                product, first, second = by_kind[kind].astype(np.float64)
                found[kind].append(float(product / np.sqrt(first * second)))
    return found


def _products(objective: JointObjective, params: Params, batch: Batch) -> dict[str, jax.Array]:
    """For each kind of weight the inner product of the two gradients, and their squared lengths: float32 [3]."""
    first, second = (
        flatten_dict(jax.grad(objective, has_aux=True)(params, {name: batch[name]})[0]) for name in objective.names
    )
    found = {kind: jnp.zeros(3) for kind in KINDS if kind != ALL}
    for path in first:
        if kind := _kind(path):
            x, y = first[path], second[path]
            found[kind] += jnp.stack([jnp.sum(x * y), jnp.sum(x * x), jnp.sum(y * y)])
    return found


def _kind(path: tuple[str, ...]) -> str | None:
    """The kind of a parameter; None for one that only one of the objectives uses."""
    if path[0] in ("head", "projection"):
        return None
    if path[0] == "embedding":
        return "token table"
    return "norms" if any(name.endswith("norm") for name in path) else path[1]


def summary_of(cosines: dict[str, list[float]]) -> dict[str, Any]:
    """Mean and standard error over batches, by kind of weight."""
    return {
        kind: {"mean": float(np.mean(values)), "standard_error": float(np.std(values, ddof=1) / len(values) ** 0.5)}
        for kind, values in cosines.items()
    }
