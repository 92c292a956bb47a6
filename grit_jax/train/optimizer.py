"""The learning-rate schedule and the optimizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from grit_jax.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Rate of update `count`, counted from 0: linear warm-up from 0, then decay to 0 at `steps`.

    The linear schedule is that of transformers' `get_linear_schedule_with_warmup`: the first update has rate 0
    when there is a warm-up.
    """
    warmup = math.ceil(config.warmup_ratio * steps) if config.warmup_steps is None else config.warmup_steps

    def rate(count):
        decayed = jnp.clip((count - warmup) / max(1, steps - warmup), 0.0, 1.0)
        factor = {
            "linear": 1.0 - decayed,
            "cosine": 0.5 * (1.0 + jnp.cos(jnp.pi * decayed)),
            "constant": 1.0,
        }[config.schedule]
        return config.learning_rate * jnp.where(count < warmup, count / max(1, warmup), factor)

    return rate


def is_matrix(axes: Sequence[str]) -> bool:
    """Whether a parameter with these logical axes is a matrix or a stack of matrices, not a bias or norm scale.

    Heads and their width together are one side of a matrix.
    """
    return len(set(axes) - {"layers", "head_dim"}) >= 2


def make_optimizer(config: OptimizerConfig, steps: int, axes: Any) -> optax.GradientTransformation:
    """The optimizer of a run.

    Args:
      config: Its settings.
      steps: Length of the schedule.
      axes: Tree of the logical axes of each trained parameter; weight decay applies to those of `is_matrix`.
    """
    decayed = jax.tree.map(is_matrix, axes, is_leaf=lambda names: isinstance(names, tuple))
    rate = learning_rate(config, steps)
    if config.name == "sgd":
        update = optax.sgd(rate)
    else:
        update = optax.adamw(rate, config.b1, config.b2, config.epsilon, weight_decay=config.weight_decay, mask=decayed)
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    return optax.chain(clip, update)


def updates_done(opt_state: Any, *, otherwise: Any) -> Any:
    """The count of the schedule of `make_optimizer`; `otherwise` for an optimizer without one."""
    states = jax.tree.leaves(opt_state, is_leaf=_is_schedule)
    return next((state.count for state in states if _is_schedule(state)), otherwise)


def _is_schedule(state: Any) -> bool:
    return isinstance(state, optax.ScaleByScheduleState)
