"""Tasks on pairs: semantic similarity, pair classification, and summaries against human ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from grit_jax.errors import InputError
from grit_jax.evaluation.reading import EvaluationRecord, read_records, split_by
from grit_jax.evaluation.scores import average_precision, spearman
from grit_jax.evaluation.task import EmbeddingTask, Outcome, Session

_FIRST, _SECOND = "sentence1", "sentence2"
_CORRELATION = (-1.0, 1.0)


def _pairs(records: list[EvaluationRecord]) -> tuple[list[str], list[str]]:
    return [record.get(_FIRST) for record in records], [record.get(_SECOND) for record in records]


@dataclasses.dataclass(frozen=True)
class STS(EmbeddingTask):
    """Semantic textual similarity: Spearman's correlation of cosine and human score.

    `path` is a .tsv or .jsonl file with `score`, `sentence1`, `sentence2`.
    """

    def evaluate(self, session: Session) -> Outcome:
        """Compares the sentences of each record."""
        records = read_records(Path(self.path), "score", _FIRST, _SECOND)
        gold = np.array([record.number("score") for record in records])
        first, second = (session.directions(texts, self.instruction) for texts in _pairs(records))
        cosine = np.sum(first * second, axis=1, dtype=np.float64)
        examples = np.stack([cosine, gold], axis=1)
        return Outcome("cosine_spearman", examples, lambda x: spearman(*x.T), bounds=_CORRELATION)


@dataclasses.dataclass(frozen=True)
class PairClassification(EmbeddingTask):
    """Whether two sentences belong together: average precision of the best of four similarities.

    `path` is a .tsv or .jsonl file with `label` (1 or 0), `sentence1`, `sentence2`. The similarities are cosine, inner
    product, and negative Euclidean and Manhattan distance.
    """

    def evaluate(self, session: Session) -> Outcome:
        """Ranks the pairs of all records."""
        records = read_records(Path(self.path), "label", _FIRST, _SECOND)
        labels = np.array([record.number("label") for record in records])
        for record, label in zip(records, labels, strict=True):
            if label not in (0, 1):
                raise InputError(f"{record.where}: 'label' is {label:g}; it must be 1 or 0")
        if not 0 < labels.sum() < len(labels):
            raise InputError(f"{self.path}: every 'label' is {labels[0]:g}; there must be pairs of both")
        a, b = (session.embed(texts, self.instruction).astype(np.float64) for texts in _pairs(records))
        lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        product = np.sum(a * b, axis=1)
        similarities = {
            "cosine": product / np.maximum(lengths, 1e-24),
            "inner_product": product,
            "euclidean": -np.linalg.norm(a - b, axis=1),
            "manhattan": -np.sum(np.abs(a - b), axis=1),
        }
        examples = np.stack([labels, *similarities.values()], axis=1)
        scores = {f"{name}_ap": value for name, value in zip(similarities, _precisions(examples), strict=True)}
        return Outcome("max_ap", examples, lambda x: max(_precisions(x), default=0.0), scores)


def _precisions(examples: np.ndarray) -> list[float]:
    """Average precision of each column after the first, which holds the labels; none without a positive."""
    relevant = examples[:, 0] == 1
    return [average_precision(relevant, column) for column in examples.T[1:]] if relevant.any() else []


@dataclasses.dataclass(frozen=True)
class Summarization(EmbeddingTask):
    """Machine summaries judged by their similarity to human ones, by the protocol of MTEB's SummEval.

    `path` is a .jsonl file with lists `machine_summaries`, `relevance` (a score for each of them) and
    `human_summaries`. A machine summary's score is its largest cosine with a human one; the main score is the mean over
    texts of Spearman's correlation with `relevance`. Texts in which either is constant are left out.
    """

    def evaluate(self, session: Session) -> Outcome:
        """Scores the summaries of each text."""
        records = read_records(Path(self.path))
        groups = [record.strings(key) for key in ("machine_summaries", "human_summaries") for record in records]
        vectors = session.directions([text for group in groups for text in group], self.instruction)
        parts = split_by(groups, vectors)
        correlations = []
        for record, ours, theirs in zip(records, parts[: len(records)], parts[len(records) :], strict=True):
            gold = np.array(record.numbers("relevance"))
            if len(gold) != len(ours):
                raise InputError(
                    f"{record.where}: 'relevance' has {len(gold)} scores for {len(ours)} machine summaries"
                )
            best = np.max(ours @ theirs.T, axis=1)
            if np.ptp(gold) and np.ptp(best):
                correlations.append(spearman(best, gold))
        if not correlations:
            raise InputError(f"{self.path}: in every record 'relevance' or the similarity is constant; nothing to rank")
        return Outcome("cosine_spearman", np.array(correlations), bounds=_CORRELATION)
