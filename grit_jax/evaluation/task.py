"""The base classes of tasks, the session that they run in and the outcome that they return."""

from __future__ import annotations

import abc
import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grit_jax.inference.model import GritModel, Messages
from grit_jax.inference.scorer import Likelihoods

_BATCH_SIZE = 32  # prompts completed together


def mean(examples: np.ndarray) -> float:
    """The mean of all contributions."""
    return float(np.mean(examples))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of a task.

    Attributes:
      metric: Name of the main score; None without one.
      examples: float64 [examples] or [examples, columns]; what each example contributes to the main score. Intervals
        come from resampling examples.
      score: Computes the main score from contributions.
      scores: Further scores and counts by name.
      completions: What the model wrote, for a file beside the report; None for most tasks.
      bounds: Smallest and largest possible main score.
    """

    metric: str | None
    examples: np.ndarray
    score: Callable[[np.ndarray], float] = mean
    scores: dict[str, float] = dataclasses.field(default_factory=dict)
    completions: list[dict[str, Any]] | None = None
    bounds: tuple[float, float] = (0.0, 1.0)


class Progress:
    """Receives the progress of a task; this one ignores it."""

    def start(self, part: str, total: int) -> None:
        """Begins a part of the task with `total` items."""

    def advance(self, count: int) -> None:
        """Counts `count` items as done."""


@dataclasses.dataclass(frozen=True)
class Session:
    """The model and settings that all tasks of a suite share.

    Attributes:
      model: The model to evaluate.
      max_length: Most tokens to keep of an embedded text, instruction included.
      seed: Seed of all random draws.
      progress: Receives the progress of the running task.
    """

    model: GritModel
    max_length: int = 512
    seed: int = 0
    progress: Progress = dataclasses.field(default_factory=Progress)

    def generator(self, *numbers: int) -> np.random.Generator:
        """A random generator seeded with the suite's seed and further numbers."""
        return np.random.default_rng([self.seed, *numbers])

    def embed(self, texts: Sequence[str], instruction: str | None = None) -> np.ndarray:
        """The model's vectors, float32 [texts, embed]. Equal texts are embedded once; a blank one is a zero vector."""
        unique = list(dict.fromkeys(text for text in texts if text.strip()))
        self.progress.start("embedding", len(unique))
        vectors = self.model.encode_with_counts(
            unique, instruction=instruction or "", max_length=self.max_length, progress=self.progress.advance
        ).vectors
        index = {text: number for number, text in enumerate(unique)}
        vectors = np.concatenate([vectors, np.zeros((1, vectors.shape[1]), np.float32)])
        return vectors[[index.get(text, len(unique)) for text in texts]]

    def directions(self, texts: Sequence[str], instruction: str | None = None) -> np.ndarray:
        """`embed` at unit length."""
        vectors = self.embed(texts, instruction)
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

    def log_likelihoods(
        self, contexts: Sequence[Messages], continuations: Sequence[str], *, prefix: str = ""
    ) -> Likelihoods:
        """`GritModel.log_likelihoods`, with progress."""
        self.progress.start("scoring", len(contexts))
        return self.model.log_likelihoods(contexts, continuations, prefix=prefix, progress=self.progress.advance)

    def completions(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        prefixes: Sequence[str] | None = None,
        stop: str | Sequence[str] = (),
        raw: bool = False,
        temperature: float = 0.0,
        top_p: float = 1.0,
        sample: int = 0,
    ) -> list[str | None]:
        """The completion of each prompt; None if the two exceed the model's length.

        Args:
          prompts: Users' messages, or texts to continue if `raw`.
          max_new_tokens: Most tokens of a completion.
          prefixes: The beginning of each completion; not part of the result.
          stop: A completion ends before the first of these strings.
          raw: Whether to continue prompts as they are.
          temperature: 0 takes the likeliest token each time.
          top_p: Probability of the nucleus to sample from.
          sample: Number of the draw; other numbers give other completions.
        """
        prefixes = prefixes or [""] * len(prompts)
        lengths = self.model.prompt_lengths(prompts, prefix=prefixes, raw=raw)
        fits = np.flatnonzero(lengths + max_new_tokens <= self.model.architecture.max_length)
        by_length = fits[np.argsort(lengths[fits], kind="stable")].tolist()
        completions: list[str | None] = [None] * len(prompts)
        self.progress.start("answering", len(fits))
        for first in range(0, len(by_length), _BATCH_SIZE):
            batch = by_length[first : first + _BATCH_SIZE]
            written = self.model.generate(
                [prompts[i] for i in batch],
                prefix=[prefixes[i] for i in batch],
                max_new_tokens=max_new_tokens, stop=stop, raw=raw, temperature=temperature, top_p=top_p,
                seed=self.seed + sample,
            )  # fmt: skip
            for i, completion in zip(batch, written, strict=True):
                completions[i] = completion
            self.progress.advance(len(batch))
        return completions


def undersample(groups: Sequence[str] | np.ndarray, most: int, generator: np.random.Generator) -> np.ndarray:
    """Indices of `most` random examples of each group (all of a smaller group), in random order; int [drawn]."""
    drawn, chosen = Counter[str](), []
    for i in generator.permutation(len(groups)).tolist():
        drawn[groups[i]] += 1
        if drawn[groups[i]] <= most:
            chosen.append(i)
    return np.array(chosen)


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """One task of a suite.

    Attributes:
      name: Its name in the report.
      path: Its data: a file, or a folder for some types.
    """

    name: str
    path: str

    def files(self) -> list[Path]:
        """The files that the task reads; a result is valid while they stay the same."""
        return [Path(self.path)]

    @abc.abstractmethod
    def evaluate(self, session: Session) -> Outcome:
        """Evaluates the session's model.

        Raises:
          InputError: A file is missing or malformed; the message names file, line, key and remedy.
        """


@dataclasses.dataclass(frozen=True)
class EmbeddingTask(Task):
    """A task on embeddings.

    Attributes:
      instruction: Instruction of the texts, or of the queries in retrieval and reranking; null takes the one in the
        suite's `instructions`, or none if the suite has none.
    """

    instruction: str | None = None
