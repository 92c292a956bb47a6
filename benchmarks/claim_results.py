"""The results that the claim's script keeps of each model.

A folder of results has `SEED/MODEL.json` for every model, and `bm25.json`; a model that no seed changes is beside it.
`SEED/gradients.json` has the cosines of the two gradients, of the models of which they were measured.
Nothing else is needed to compute published figures again, or to continue on another machine, without the models.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from grit_jax import files
from grit_jax.errors import InputError

_BM25, _GRADIENTS = "bm25.json", "gradients.json"

T = TypeVar("T")
Scores = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of training and measuring a model.

    Attributes:
      config: Its config as YAML, without paths.
      data: Digest of its training data and, for a model from random weights, its tokenizer.
      devices: The devices that it was trained on.
      marks: Digests of the tasks: their settings and data.
      tasks: For each task the metric, the main score, its interval and, if there is one, the score of chance.
      examples: For the tasks of the claim's figures and their variants, each example's contribution to the main score.
      losses: For each stream the steps with samples of it, and the losses there.
      tokens: Number of training tokens.
      training_seconds: Time of the steps, compilation included.
      wall_seconds: Time of training and evaluation; None if stopped in between.
      base: Digest of the pretrained model that it started from; None for random weights.
    """

    config: str
    data: str
    devices: str
    marks: dict[str, str]
    tasks: Scores
    examples: dict[str, list[Any]]
    losses: dict[str, list[list[float]]]
    tokens: int
    training_seconds: float
    wall_seconds: float | None
    base: str | None = None


@dataclasses.dataclass(frozen=True)
class KeywordSearch:
    """BM25 on the retrieval tasks: digests of the tasks, and scores as in `Result`."""

    marks: dict[str, str]
    tasks: Scores


@dataclasses.dataclass(frozen=True)
class Gradients:
    """The cosines of the gradients of both objectives.

    Attributes:
      config: Config of the batches as YAML, without paths.
      data: Digest of their data, as in `Result`.
      base: Digest of the pretrained model.
      cosines: By model, step of its checkpoint and kind of weight, one for each batch.
    """

    config: str
    data: str
    base: str | None
    cosines: dict[str, dict[str, dict[str, list[float]]]] = dataclasses.field(default_factory=dict)


def read_result(results: Path, seed: int | None, name: str) -> Result | None:
    """A model's stored result; None if it has not been measured.

    Args:
      results: Folder of results.
      seed: The model's seed; None for a model that no seed changes.
      name: The model's name.

    Raises:
      InputError: The file is something else.
    """
    return _read(_path(results, seed, name), Result)


def write_result(results: Path, seed: int | None, name: str, result: Result) -> None:
    """Stores a model's result."""
    _write(_path(results, seed, name), result)


def read_bm25(results: Path) -> KeywordSearch | None:
    """The stored result of keyword search; None if it has not been measured.

    Raises:
      InputError: The file is something else.
    """
    return _read(results / _BM25, KeywordSearch)


def write_bm25(results: Path, found: KeywordSearch) -> None:
    """Stores the result of keyword search."""
    _write(results / _BM25, found)


def read_gradients(results: Path, seed: int) -> Gradients | None:
    """The stored cosines of a seed; None if none have been measured.

    Raises:
      InputError: The file is something else.
    """
    return _read(results / str(seed) / _GRADIENTS, Gradients)


def write_gradients(results: Path, seed: int, found: Gradients) -> None:
    """Stores the cosines of a seed."""
    _write(results / str(seed) / _GRADIENTS, found)


def _path(results: Path, seed: int | None, name: str) -> Path:
    return (results if seed is None else results / str(seed)) / f"{name}.json"


def _read(path: Path, kind: Callable[..., T]) -> T | None:
    if not path.exists():
        return None
    try:
        return kind(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: is no result of this script; remove it to measure again") from error


def _write(path: Path, kept: Result | KeywordSearch | Gradients) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, json.dumps(dataclasses.asdict(kept), ensure_ascii=False) + "\n")
