"""What is particular to each claim: its config, its tasks, its data, its figures and their margins."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
import yaml
from claim_results import Result

from grit_jax.evaluation.compare import Comparison, compare
from grit_jax.evaluation.likelihood import loss_per_token
from grit_jax.evaluation.scores import BOOTSTRAP_DRAWS, percentile_interval, spearman
from grit_jax.evaluation.task import mean

CONFIGS = Path(__file__).parents[1] / "configs/claim"
HELD_OUT, GSM8K = "held-out answers", "gsm8k"
MODELS = ("unified", "embedding", "generative")
MARGIN = 0.02
MERGE = "merge"  # key of an ablation that is not trained: the models of which it is the mean

_ABLATION = "ablation_"
_DECIDED = NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(0.9)


@dataclasses.dataclass(frozen=True)
class Figure:
    """A number to compare models by: the mean of some tasks' scores.

    Attributes:
      name: What tables call it.
      tasks: The tasks.
      specialist: The model of one skill to compare the unified one with.
      score: Computes a task's score from its examples' contributions.
      smaller_is_better: Whether it is a loss.
      correlation: Assumed correlation of the scores of two models over draws of examples, for `margin`.
    """

    name: str
    tasks: tuple[str, ...]
    specialist: str
    score: Callable[[np.ndarray], float] = mean
    smaller_is_better: bool = False
    correlation: float = 0.0

    def compare(self, results: Iterable[Result], reference: Iterable[Result]) -> Comparison:
        """Compares two models, each trained once or several times."""
        ours, theirs = ([self._examples(result) for result in some] for some in (results, reference))
        return compare(ours, theirs, self.score)

    def margin(self, base: Result) -> float:
        """The relative margin of equivalence: 2 %, or the smallest that this many examples can decide if that is more.

        Let e be the standard error of the base's figure over examples, divided by the figure. If two equally good
        models have the same e, and their figures correlate by r over draws of examples, as both find the same examples
        hard, then their relative difference has a standard error of s = e sqrt(2 (1 - r)). It is normal around 0, and
        its 95 % interval reaches 1.96 s to either side of it. The interval lies within a margin m if the difference is
        within m - 1.96 s. That has a probability of 80 % for m = (1.96 + 1.28) s: two one-sided tests (Schuirmann,
        1987) of 80 % power. Only e is measured; r is assumed, since the base is a single model. An r that is too high
        makes the margin too small, never too large.

        The spread between seeds is not in it: it needs trained models.
        """
        draws = self._draws([self._examples(base)])[:, 0]
        relative_error = float(np.std(draws, ddof=1)) / abs(self._value(base))
        return max(MARGIN, _DECIDED * math.sqrt(2 * (1 - self.correlation)) * relative_error)

    def estimate(self, result: Result) -> dict[str, Any]:
        """A model's figure, `value`, and its 95 % `interval` over examples."""
        draws = self._draws([self._examples(result)])[:, 0]
        return {"value": self._value(result), "interval": percentile_interval(draws.tolist())}

    def measured_correlation(self, first: Result, second: Result) -> float:
        """The correlation of two models' figures over draws of examples, which are the same for both."""
        return float(np.corrcoef(self._draws([self._examples(first), self._examples(second)]).T)[0, 1])

    def _value(self, result: Result) -> float:
        return float(np.mean([self.score(task) for task in self._examples(result)]))

    def _examples(self, result: Result) -> list[np.ndarray]:
        return [np.array(result.examples[task]) for task in self.tasks]

    def _draws(self, models: list[list[np.ndarray]]) -> np.ndarray:
        """The figure of each model on bootstrap draws of examples: [draws, models]."""
        generator = np.random.default_rng(0)
        draws = []
        for _ in range(BOOTSTRAP_DRAWS):
            chosen = [generator.integers(len(task), size=len(task)) for task in models[0]]
            draws.append(
                [np.mean([self.score(task[i]) for task, i in zip(model, chosen, strict=True)]) for model in models]
            )
        return np.array(draws)


@dataclasses.dataclass(frozen=True)
class Claim:
    """One model with both skills matches one for each skill, all started from the same weights.

    Attributes:
      name: Names the files of its figures and plots.
      config: Config of the models, in `CONFIGS`.
      suite: Tasks of the models, in `CONFIGS`.
      ablations: Changes of each ablation, in `CONFIGS`.
      ablation_suite: Tasks of the ablations, in `CONFIGS`.
      ablation_steps: Steps of an ablation that does not change them.
      baseline: The model that ablations are compared with.
      figures: What is compared; the first one of each specialist is shown for ablations too.
      start: Name of the model at the start: `untrained`, of random weights and each seed its own, or `base`.
      results: Folder of the results, in the folder of everything.
      output: Default folder of everything.
      sources: Names of the files of training data, without endings; None for all.
      num_documents: Size of the sample of documents of some retrieval tasks.
      num_problems: Size of the sample of GSM8K's test; None for all.
      max_length: Most tokens of a text whose loss is measured; None for the model's limit.
      texts: Names of the tasks of loss on data that `claim_data` writes, besides held-out answers and GSM8K.
      front: Ablations to draw by both main figures beside the models; none for no drawing.
    """

    name: str
    config: str
    suite: str
    ablations: str
    ablation_suite: str
    ablation_steps: int
    baseline: str
    figures: tuple[Figure, ...]
    start: Literal["untrained", "base"]
    results: str
    output: str
    sources: tuple[str, ...] | None = None
    num_documents: Mapping[str, int] = dataclasses.field(default_factory=dict)
    num_problems: int | None = None
    max_length: int | None = None
    texts: tuple[str, ...] = ()
    front: tuple[str, ...] = ()

    @property
    def has_base(self) -> bool:
        """Whether the models start from a pretrained one, from which the margins are computed."""
        return self.start == "base"

    @property
    def prefix(self) -> str:
        """Begins the names of its tables."""
        return f"{self.name} " if self.has_base else ""

    @property
    def main_figures(self) -> tuple[Figure, ...]:
        """The first figure of each specialist."""
        return tuple({figure.specialist: figure for figure in reversed(self.figures)}.values())[::-1]

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks of the figures."""
        return tuple(task for figure in self.figures for task in figure.tasks)

    def seed_of(self, name: str, seed: int) -> int | None:
        """The seed of a model's result; None if the model is the same for all."""
        return None if self.has_base and name == self.start else seed

    def known_ablations(self) -> dict[str, dict[str, Any]]:
        """The changes of each ablation."""
        return yaml.safe_load((CONFIGS / self.ablations).read_text())


def ablation(name: str) -> str:
    """The name of an ablation's model."""
    return f"{_ABLATION}{name}"


def _spearman(examples: np.ndarray) -> float:
    return spearman(*examples.T)


RANDOM = Claim(
    name="claim",
    config="unified.yaml",
    suite="suite.yaml",
    ablations="ablations.yaml",
    ablation_suite="ablation_suite.yaml",
    ablation_steps=100,
    baseline=ablation("baseline"),
    figures=(
        Figure("mean nDCG@10", ("medquad", "wordnet_wsd", "scifact"), "embedding"),
        Figure("loss per token", (HELD_OUT,), "generative", loss_per_token, smaller_is_better=True),
    ),
    start="untrained",
    results="results",
    output="runs/claim",
)

# The correlations assumed for the margins. In the three seeds from random weights, the unified and the embedding-only
# model have 0.5 to 0.8 for mean nDCG@10, the unified and the generation-only one 0.994 to 0.996 for the loss.
_EMBEDDING, _LOSS = 0.75, 0.99

PRETRAINED = Claim(
    name="pretrained",
    config="pretrained.yaml",
    suite="pretrained_suite.yaml",
    ablations="pretrained_ablations.yaml",
    ablation_suite="pretrained_suite.yaml",
    ablation_steps=120,
    baseline="unified",
    figures=(
        Figure("mean nDCG@10", ("medquad", "wordnet_wsd", "xquad_en"), "embedding", correlation=_EMBEDDING),
        Figure("Spearman on STS-B", ("stsb_test",), "embedding", _spearman, correlation=_EMBEDDING),
        Figure(
            "loss per token", (HELD_OUT,), "generative", loss_per_token, smaller_is_better=True, correlation=_LOSS
        ),
        Figure(
            "loss per token of GSM8K", (GSM8K,), "generative", loss_per_token, smaller_is_better=True,
            correlation=_LOSS,
        ),
    ),
    start="base",
    results="results/pretrained",
    output="runs/claim_pretrained",
    sources=("clinc150", "banking77", "wordnet", "stsb", "adversarialqa", "gsm8k", "t0_subset", "oasst_single_turn"),
    num_documents={"medquad": 1600},
    num_problems=400,
    max_length=512,
    texts=("xquad answers", "wikipedia", "shakespeare"),
    front=("generative_weight_0.25", "generative_weight_4", "merged"),
)  # fmt: skip
