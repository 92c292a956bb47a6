"""Tasks that learn on frozen embeddings: classification and clustering, by MTEB's protocols."""

from __future__ import annotations

import dataclasses
import importlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from grit_jax.config.ranges import require_positive
from grit_jax.errors import InputError, install
from grit_jax.evaluation.reading import EvaluationRecord, read_records
from grit_jax.evaluation.scores import v_measure
from grit_jax.evaluation.task import EmbeddingTask, Outcome, Session, undersample

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
        _sklearn("base")  # raises while a suite is read, before any task has run


@dataclasses.dataclass(frozen=True)
class Classification(_LearningTask):
    """Logistic regression on a few examples of each label: mean accuracy over repeated draws.

    `path` is a folder with `train.jsonl` and `{split}.jsonl`, records of `text` and `label`.

    Attributes:
      split: The split to classify.
      samples_per_label: Training examples of each label in a draw.
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
        return Outcome("accuracy", right / self.experiments, scores={"f1": float(np.mean(f1))})

    def _embedded(self, session: Session, file: Path) -> tuple[np.ndarray, np.ndarray]:
        records = read_records(file)
        labels = np.array([str(record.get("label", str, int)) for record in records])
        return session.embed([record.get("text") for record in records], self.instruction), labels


@dataclasses.dataclass(frozen=True)
class Clustering(_LearningTask):
    """Mini-batch k-means with as many clusters as labels: mean v-measure over sets.

    `path` is a .jsonl file. A record with lists `sentences` and `labels` is a set; records of `text` and `label`
    together are one set.
    """

    def evaluate(self, session: Session) -> Outcome:
        """Clusters each set by itself."""
        records = read_records(Path(self.path))
        sets = [_set(record) for record in records] if "sentences" in records[0].values else [_one_set(records)]
        found = [(labels, self._clusters(session, texts, labels)) for texts, labels in sets]
        if len(found) > 1:
            return Outcome("v_measure", np.array([v_measure(*pair) for pair in found]))
        # With one set, its texts are the examples.
        return Outcome("v_measure", np.stack(found[0], axis=1), lambda x: v_measure(*x.T))

    def _clusters(self, session: Session, texts: list[str], labels: np.ndarray) -> np.ndarray:
        kmeans = _sklearn("cluster").MiniBatchKMeans(
            n_clusters=len(set(labels.tolist())), batch_size=_KMEANS_BATCH, n_init="auto", random_state=session.seed
        )
        return kmeans.fit_predict(session.embed(texts, self.instruction))


def _set(record: EvaluationRecord) -> tuple[list[str], np.ndarray]:
    texts, labels = record.strings("sentences"), record.get("labels", list)
    if len(labels) != len(texts):
        raise InputError(f"{record.where}: 'labels' has {len(labels)} entries for {len(texts)} sentences")
    return texts, _numbered(labels)


def _one_set(records: list[EvaluationRecord]) -> tuple[list[str], np.ndarray]:
    return [record.get("text") for record in records], _numbered([record.get("label", str, int) for record in records])


def _numbered(labels: list[Any]) -> np.ndarray:
    return np.unique(np.array([str(label) for label in labels]), return_inverse=True)[1]
