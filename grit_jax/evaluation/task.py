"""What every task type is: settings, the files it reads, and from a model to what each example contributes."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grit_jax.inference.model import GritModel, Messages
from grit_jax.inference.scorer import Likelihoods


def mean(examples: np.ndarray) -> float:
    """The mean of all contributions."""
    return float(np.mean(examples))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a task found.

    Attributes:
      metric: Name of the main score; None where there is none.
      examples: float64 [examples] or [examples, columns]; what each example contributes to the main score. Intervals
        come from drawing examples again.
      score: The main score of contributions.
      figures: Further figures by name.
      answers: What the model wrote, for a file beside the report; none for most tasks.
      bounds: The least and the most that the main score can be.
    """

    metric: str | None
    examples: np.ndarray
    score: Callable[[np.ndarray], float] = mean
    figures: dict[str, float] = dataclasses.field(default_factory=dict)
    answers: list[dict[str, Any]] | None = None
    bounds: tuple[float, float] = (0.0, 1.0)


class Progress:
    """Says how far a task is; this one says nothing."""

    def start(self, what: str, total: int) -> None:
        """Begins a part of a task with `total` things to do."""

    def advance(self, count: int) -> None:
        """So many of them are done."""


@dataclasses.dataclass(frozen=True)
class Session:
    """A model with what all tasks of a suite share.

    Attributes:
      model: What is measured.
      max_length: Tokens kept of an embedded text, instruction included.
      seed: Of every draw.
      progress: Is told how far the task is.
    """

    model: GritModel
    max_length: int = 512
    seed: int = 0
    progress: Progress = dataclasses.field(default_factory=Progress)

    def generator(self, *numbers: int) -> np.random.Generator:
        """A source of draws for the suite's seed and a place."""
        return np.random.default_rng([self.seed, *numbers])

    def embed(self, texts: Sequence[str], instruction: str = "") -> np.ndarray:
        """The model's vectors, float32 [texts, embed]; equal texts are embedded once, a blank one is a zero vector."""
        unique = list(dict.fromkeys(text for text in texts if text.strip()))
        self.progress.start("embedding", len(unique))
        vectors = self.model.encode_with_counts(
            unique, instruction=instruction, max_length=self.max_length, progress=self.progress.advance
        ).vectors
        place = {text: number for number, text in enumerate(unique)}
        vectors = np.concatenate([vectors, np.zeros((1, vectors.shape[1]), np.float32)])
        return vectors[[place.get(text, len(unique)) for text in texts]]

    def directions(self, texts: Sequence[str], instruction: str = "") -> np.ndarray:
        """`embed` at unit length."""
        vectors = self.embed(texts, instruction)
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

    def log_likelihoods(
        self, contexts: Sequence[Messages], continuations: Sequence[str], *, prefix: str = ""
    ) -> Likelihoods:
        """`GritModel.log_likelihoods`, with progress."""
        self.progress.start("scoring", len(contexts))
        return self.model.log_likelihoods(contexts, continuations, prefix=prefix, progress=self.progress.advance)

    def answers(
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
        """The model's answers to users' messages; None where prompt and answer do not fit the model.

        Args:
          prompts: Messages, or texts that are continued where `raw`.
          max_new_tokens: Most tokens of an answer.
          prefixes: What each answer begins with; not part of what is returned.
          stop: An answer ends before this string, or the first of several.
          raw: Whether the prompts are continued as they are.
          temperature: 0 takes the likeliest token each time.
          top_p: Probability of the nucleus that is drawn from.
          sample: Number of the draw; another number gives other answers.
        """
        prefixes = prefixes or [""] * len(prompts)
        lengths = self.model.prompt_lengths(prompts, prefix=prefixes, raw=raw)
        fits = np.flatnonzero(lengths + max_new_tokens <= self.model.architecture.max_length)
        by_length = fits[np.argsort(lengths[fits], kind="stable")].tolist()
        answers: list[str | None] = [None] * len(prompts)
        self.progress.start("answering", len(fits))
        for first in range(0, len(by_length), _ANSWERS_AT_ONCE):
            batch = by_length[first : first + _ANSWERS_AT_ONCE]
            written = self.model.generate(
                [prompts[place] for place in batch],
                prefix=[prefixes[place] for place in batch],
                max_new_tokens=max_new_tokens, stop=stop, raw=raw, temperature=temperature, top_p=top_p,
                seed=self.seed + sample,
            )  # fmt: skip
            for place, answer in zip(batch, written, strict=True):
                answers[place] = answer
            self.progress.advance(len(batch))
        return answers


_ANSWERS_AT_ONCE = 32


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """One task of a suite.

    Attributes:
      name: What the report calls it.
      path: Its data: a file, or a folder where the type says so.
    """

    name: str
    path: str

    def files(self) -> list[Path]:
        """The files that it reads; a result holds as long as they are the same."""
        return [Path(self.path)]

    @abc.abstractmethod
    def evaluate(self, session: Session) -> Outcome:
        """Measures a model.

        Raises:
          InputError: A file is missing or malformed; the message names file, line, key and remedy.
        """


@dataclasses.dataclass(frozen=True)
class EmbeddingTask(Task):
    """A task of embeddings.

    Attributes:
      instruction: What the model is told about the texts, of retrieval and reranking about the queries; null takes it
        from the suite's `instructions`, or none where the suite has none.
    """

    instruction: str | None = None
