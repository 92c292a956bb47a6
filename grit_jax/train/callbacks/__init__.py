"""What watches a training run: one file per thing, each of which may be left out."""

from __future__ import annotations

from collections.abc import Iterable

from grit_jax.config import Config
from grit_jax.train.callbacks.bad_batches import BadBatches
from grit_jax.train.callbacks.base import Callback
from grit_jax.train.callbacks.details import Details
from grit_jax.train.callbacks.display import Display
from grit_jax.train.callbacks.evaluation import Evaluation
from grit_jax.train.callbacks.goodput import Goodput
from grit_jax.train.callbacks.gradient_norms import GradientNorm, GradientNorms
from grit_jax.train.callbacks.profile import Profile
from grit_jax.train.callbacks.saving import Saving
from grit_jax.train.callbacks.scorecard import Measure, Scorecard
from grit_jax.train.callbacks.trackers import Trackers
from grit_jax.train.callbacks.watchdog import Watchdog

__all__ = ["Callback", "make_callbacks"]


def make_callbacks(
    config: Config,
    *,
    began: float,
    gradient_norm: GradientNorm,
    scorecard: Measure | None,
    own: Iterable[Callback],
) -> list[Callback]:
    """The callbacks of a run, in the order in which they are told what happens; they end in the opposite one.

    First come those that add to a step's numbers, then those that take them: what is added is logged, a step whose
    numbers stop the run is logged and not saved, and saving, which may take long, ends before what watches over it.

    Args:
      config: The run's settings.
      began: When the session started, by `time.monotonic`.
      gradient_norm: What `make_gradient_norm` gives.
      scorecard: Measures the model; None for no scorecard.
      own: Callbacks of the user's, which may add to the numbers.
    """
    logging, train = config.logging, config.train
    return [
        Watchdog(train.watchdog_seconds),
        GradientNorms(logging.gradient_ratio_every, gradient_norm),
        Profile(logging.profile),
        Details(logging.details_every),
        Evaluation(train.eval_every),
        *([Scorecard(config.scorecard.every, scorecard)] if scorecard else []),
        *own,
        Goodput(began),
        Trackers(logging),
        Display(logging.every),
        BadBatches(logging.spike_threshold, train.max_skipped),
        Saving(config.checkpoint),
    ]
