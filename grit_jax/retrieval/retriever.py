"""Finds the documents of a store that answer a query."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from grit_jax.config.ranges import require_positive
from grit_jax.errors import InputError
from grit_jax.inference.model import GritModel
from grit_jax.retrieval.documents import Document
from grit_jax.retrieval.exact_search import Searchable
from grit_jax.retrieval.manifest import refuse_other_model
from grit_jax.retrieval.store import Store


class Hit(NamedTuple):
    """A document that a search found.

    Attributes:
      score: Inner product of its stored vector with the query's.
      row: Its row in the store.
      document: The document.
      duplicates: Ids of other documents with the same text.
    """

    score: float
    row: int
    document: Document
    duplicates: list[str]


def as_json(hits: Sequence[Hit]) -> list[dict[str, Any]]:
    """Hits as commands print them, under the keys of corpus files."""
    return [
        {"rank": rank, "score": hit.score, **hit.document.fields, "same_text": hit.duplicates}
        for rank, hit in enumerate(hits, start=1)
    ]


class Retriever:
    """Exact search with all vectors of a store on the devices of this process.

    Args:
      model: The model that made the vectors.
      store: The store.
      name: The model's name, for messages.

    Attributes:
      store: The store.

    Raises:
      InputError: Another model made the vectors.
    """

    def __init__(self, model: GritModel, store: Store, *, name: str = "this model"):
        refuse_other_model(store.folder, store.settings, model.fingerprint(rounded=True), name)
        self._model, self.store = model, store
        self._vectors = Searchable(store.vectors, store.scales)

    def find(self, queries: Sequence[str], *, instruction: str = "", k: int = 10) -> list[list[Hit]]:
        """The best documents of each query, best first; ties go to the smaller row.

        Args:
          queries: The queries.
          instruction: Their instruction.
          k: Documents per query, at most all of the store.

        Raises:
          InputError: A query is empty, the instruction leaves no room for it, or `k` is not positive.
        """
        if isinstance(queries, str):
            raise InputError(f"queries is one string, {queries!r:.60}; give a list of them")
        require_positive("k", k)
        return self.nearest(self._model.encode(queries, instruction=instruction), k)

    def warm_up(self, k: int, progress: Callable[[int], None]) -> None:
        """Compiles the programs that find up to `k` documents of a query; calls `progress(1)` after each."""
        self._vectors.warm_up(k, progress)

    def nearest(self, queries: np.ndarray, k: int) -> list[list[Hit]]:
        """`find` with the queries' vectors, float32 [queries, embed]."""
        return self.hits(*self.best(queries, k))

    def best(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The first half of `nearest`, on the devices: scores and rows, [queries, k]."""
        return self._vectors.top_k(queries, k)

    def hits(self, scores: np.ndarray, rows: np.ndarray) -> list[list[Hit]]:
        """The second half of `nearest`, which reads the documents."""
        return [
            [
                Hit(score, row, self.store.document(row), self.store.duplicates.get(row, []))
                for score, row in zip(*found, strict=True)
            ]
            for found in zip(scores.tolist(), rows.tolist(), strict=True)
        ]
