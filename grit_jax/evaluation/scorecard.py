"""A small suite of both skills, evaluated during training."""

from __future__ import annotations

import math

from grit_jax.config import ScorecardConfig
from grit_jax.errors import InputError
from grit_jax.evaluation.generation import AlpacaEval
from grit_jax.evaluation.reading import existing
from grit_jax.evaluation.suite import load_suite
from grit_jax.evaluation.task import EmbeddingTask, Session
from grit_jax.inference.model import GritModel


class Scorecard:
    """Evaluates a model and averages its scores: for embedding, for generation, and for both.

    Every score lies between 0 and 1 or is a correlation, and higher is better: a loss per token becomes the likelihood
    per token, exp(-loss).

    Args:
      config: Names the suite.

    Raises:
      InputError: The suite is missing or malformed, or a task lacks data or a score.
    """

    def __init__(self, config: ScorecardConfig):
        if config.suite is None:
            raise InputError("scorecard.suite is missing; name a suite file")
        self._suite = load_suite(config.suite, data=config.data)
        self._embedding_weight = config.embedding_weight
        for task in self._suite.tasks:
            for file in task.files():
                existing(file)
            if isinstance(task, AlpacaEval):
                raise InputError(f"{config.suite}: task {task.name!r} has no score; leave it out of a scorecard")

    def __call__(self, model: GritModel) -> dict[str, float]:
        """Main scores as `scorecard/TASK`, and their means as `scorecard/embedding`, `/generative` and `/both`.

        A skill without a task has no mean, and then neither have both.
        """
        session = Session(model, self._suite.max_length, self._suite.seed)
        scores: dict[str, float] = {}
        skills: dict[str, list[float]] = {"embedding": [], "generative": []}
        for task in self._suite.tasks:
            outcome = task.evaluate(session)
            score = scores[f"scorecard/{task.name}"] = outcome.score(outcome.examples)
            quality = math.exp(-score) if outcome.metric == "loss_per_token" else score
            skills["embedding" if isinstance(task, EmbeddingTask) else "generative"].append(quality)
        means = {f"scorecard/{skill}": sum(values) / len(values) for skill, values in skills.items() if values}
        if len(means) == len(skills):
            weight = self._embedding_weight
            embedding, generative = means.values()
            means["scorecard/both"] = weight * embedding + (1 - weight) * generative
        return scores | means
