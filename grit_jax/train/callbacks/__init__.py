"""Callbacks that watch a training run, one file per concern; each is optional."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from grit_jax.config import Config
from grit_jax.inference.model import GritModel
from grit_jax.train.callbacks.bad_batches import BadBatches
from grit_jax.train.callbacks.callback import Callback
from grit_jax.train.callbacks.details import Details
from grit_jax.train.callbacks.display import Display
from grit_jax.train.callbacks.evaluation import Evaluation
from grit_jax.train.callbacks.goodput import Goodput
from grit_jax.train.callbacks.gradient_norms import GradientNorm, GradientNorms
from grit_jax.train.callbacks.profile import Profile
from grit_jax.train.callbacks.saving import Saving
from grit_jax.train.callbacks.trackers import Trackers
from grit_jax.train.callbacks.watchdog import Watchdog

__all__ = ["Callback", "make_callbacks"]


def make_callbacks(
    config: Config,
    *,
    began: float,
    gradient_norm: GradientNorm,
    scorecard: Callable[[GritModel], Mapping[str, float]] | None,
    own: Iterable[Callback],
) -> list[Callback]:
    """The callbacks of a run in the order of their calls; they end in reverse order.

    Callbacks that add metrics precede those that read them, so all metrics are logged; a step whose metrics stop the
    run is logged but not saved; the watchdog still watches while the last save finishes.

    Args:
      config: The run's settings.
      began: When the session started, by `time.monotonic`.
      gradient_norm: What `make_gradient_norm` gives.
      scorecard: Measures the model; None for no scorecard.
      own: The user's callbacks, which may add metrics.
    """
    logging, train = config.logging, config.train
    return [
        Watchdog(train.watchdog_seconds),
        GradientNorms(logging.gradient_ratio_every, gradient_norm),
        Profile(logging.profile),
        Details(logging.details_every),
        Evaluation(train.eval_every, lambda trainer: trainer.evaluate()),
        *([Evaluation(config.scorecard.every, lambda trainer: scorecard(trainer.model()))] if scorecard else []),
        *own,
        Goodput(began),
        Trackers(logging),
        Display(logging.every),
        BadBatches(logging.spike_threshold, train.max_skipped),
        Saving(config.checkpoint),
    ]
