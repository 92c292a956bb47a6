"""Tasks that learn on frozen embeddings: classification and clustering, by MTEB's protocols."""

from __future__ import annotations

import dataclasses
import importlib
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from grit_jax.config.ranges import require_positive
from grit_jax.errors import InputError, install
from grit_jax.evaluation import metrics
from grit_jax.evaluation.data import Row, read_rows
from grit_jax.evaluation.task import EmbeddingTask, Outcome, Session

_KMEANS_BATCH = 500


def _sklearn(module: str) -> Any:
    try:
        return importlib.import_module(f"sklearn.{module}")
    except ImportError as error:
        raise InputError(
            f"tasks of type classification and clustering need scikit-learn; {install('evaluate')}"
        ) from error


@dataclasses.dataclass(frozen=True)
class _LearningTask(EmbeddingTask):
    def __post_init__(self):
        _sklearn("base")  # missing is told when a suite is read, before any task has run


@dataclasses.dataclass(frozen=True)
class Classification(_LearningTask):
    """Logistic regression on a few examples of each label: mean accuracy over repeated draws.

    `path` is a folder with `train.jsonl` and `{split}.jsonl`, rows of `text` and `label`.

    Attributes:
      split: What is classified.
      samples_per_label: Training rows of each label that a draw takes.
      experiments: Draws.
    """

    split: str = "test"
    samples_per_label: int = 8
    experiments: int = 10

    def __post_init__(self):
        super().__post_init__()
        require_positive("samples_per_label", self.samples_per_label)
        require_positive("experiments", self.experiments)

    def files(self) -> list[Path]:
        """Both splits."""
        return [Path(self.path) / f"{split}.jsonl" for split in ("train", self.split)]

    def evaluate(self, session: Session) -> Outcome:
        """Learns and classifies, once for each draw."""
        linear_model, sklearn_metrics = _sklearn("linear_model"), _sklearn("metrics")
        convergence = _sklearn("exceptions").ConvergenceWarning
        (train, train_labels), (test, labels) = (self._embedded(session, file) for file in self.files())
        if len(set(train_labels)) < 2:
            raise InputError(f"{self.files()[0]}: every 'label' is {train_labels[0]!r}; there must be two or more")
        right, f1 = np.zeros(len(labels)), []
        for experiment in range(self.experiments):
            chosen = undersample(train_labels, self.samples_per_label, session.generator(experiment))
            regression = linear_model.LogisticRegression(random_state=session.seed, max_iter=100)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", convergence)  # the protocol stops after 100 rounds
                regression.fit(train[chosen], train_labels[chosen])
            predicted = regression.predict(test)
            right += predicted == labels
            f1.append(sklearn_metrics.f1_score(labels, predicted, average="macro"))
        return Outcome("accuracy", right / self.experiments, figures={"f1": float(np.mean(f1))})

    def _embedded(self, session: Session, file: Path) -> tuple[np.ndarray, np.ndarray]:
        rows = read_rows(file)
        labels = np.array([str(row.get("label", str, int)) for row in rows])
        return session.embed([row.get("text") for row in rows], self.instruction or ""), labels


def undersample(labels: np.ndarray, per_label: int, generator: np.random.Generator) -> np.ndarray:
    """Places of `per_label` rows of each label, or of all of a rarer one, drawn at random; int [places]."""
    taken, chosen = Counter[str](), []
    for place in generator.permutation(len(labels)).tolist():
        if taken[labels[place]] < per_label:
            taken[labels[place]] += 1
            chosen.append(place)
    return np.array(chosen)


@dataclasses.dataclass(frozen=True)
class Clustering(_LearningTask):
    """Mini-batch k-means with as many clusters as labels: mean v-measure over sets.

    `path` is a .jsonl file. A row with lists `sentences` and `labels` is a set; rows of `text` and `label` are one set
    together.
    """

    def evaluate(self, session: Session) -> Outcome:
        """Clusters each set by itself."""
        rows = read_rows(Path(self.path))
        sets = [_set(row) for row in rows] if "sentences" in rows[0].values else [_one_set(rows)]
        found = [self._clusters(session, texts, labels) for texts, labels in sets]
        scores = np.array([metrics.v_measure(labels, clusters) for labels, clusters in found])
        if len(scores) > 1:
            return Outcome("v_measure", scores)
        # Of one set the examples are its texts.
        return Outcome("v_measure", np.stack(found[0], axis=1), lambda x: metrics.v_measure(*x.T))

    def _clusters(self, session: Session, texts: list[str], labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        kmeans = _sklearn("cluster").MiniBatchKMeans(
            n_clusters=len(set(labels.tolist())), batch_size=_KMEANS_BATCH, n_init="auto", random_state=session.seed
        )
        return labels, kmeans.fit_predict(session.embed(texts, self.instruction or ""))


def _set(row: Row) -> tuple[list[str], np.ndarray]:
    texts, labels = row.strings("sentences"), row.get("labels", list)
    if len(labels) != len(texts):
        raise InputError(f"{row.where}: 'labels' has {len(labels)} entries for {len(texts)} sentences")
    return texts, _numbered(labels)


def _one_set(rows: list[Row]) -> tuple[list[str], np.ndarray]:
    return [row.get("text") for row in rows], _numbered([row.get("label", str, int) for row in rows])


def _numbered(labels: list[Any]) -> np.ndarray:
    return np.unique(np.array([str(label) for label in labels]), return_inverse=True)[1]
