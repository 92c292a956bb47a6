"""Finds the documents of a store that a text asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from grit_jax.config.ranges import require_positive
from grit_jax.errors import InputError
from grit_jax.inference.model import GritModel
from grit_jax.retrieval.exact_search import Searchable
from grit_jax.retrieval.layout import Document, Store, other_model


class Hit(NamedTuple):
    """A document that was found.

    Attributes:
      score: Inner product of its vector, as it is kept, and the query's.
      row: Its row in the store.
      document: What it says.
      duplicates: Ids of other documents with the same text.
    """

    score: float
    row: int
    document: Document
    duplicates: list[str]


def as_json(hits: Sequence[Hit]) -> list[dict[str, Any]]:
    """Hits as commands print them, with the document's keys in the corpus."""
    return [
        {"rank": rank, "score": hit.score, **hit.document.fields, "same_text": hit.duplicates}
        for rank, hit in enumerate(hits, start=1)
    ]


class Retriever:
    """Exact search with all vectors of a store on the devices of this process.

    Args:
      model: The model that made them.
      store: What is searched.
      name: What the model is called in messages.

    Raises:
      InputError: Another model made the vectors.
    """

    def __init__(self, model: GritModel, store: Store, *, name: str = "this model"):
        if model.fingerprint(rounded=True) != store.settings.fingerprint:
            raise InputError(other_model(store.folder, store.settings, name))
        self._model, self._store = model, store
        self._vectors = Searchable(store.vectors, store.scales)

    @property
    def num_documents(self) -> int:
        """Documents that are searched."""
        return len(self._store)

    def document(self, row: int) -> Document:
        """The document of a row of the store; errors as of `Store.document`."""
        return self._store.document(row)

    def find(self, queries: Sequence[str], *, instruction: str = "", k: int = 10) -> list[list[Hit]]:
        """The best documents of each query, best first; of equal ones the smaller row comes first.

        Args:
          queries: What is asked.
          instruction: What the model is told about the queries.
          k: Documents of each; no more than there are.

        Raises:
          InputError: A query is empty, the instruction leaves no room for it, or `k` is not positive.
        """
        if isinstance(queries, str):
            raise InputError(f"queries is one string, {queries!r:.60}; give a list of them")
        require_positive("k", k)
        return self.nearest(self._model.encode(queries, instruction=instruction), k)

    def warm_up(self, k: int, progress: Callable[[int], None] = lambda _: None) -> int:
        """Compiles the programs that find up to `k` documents of a query, and returns how many.

        `progress` is called after each.
        """
        return self._vectors.warm_up(k, progress)

    def nearest(self, queries: np.ndarray, k: int) -> list[list[Hit]]:
        """`find` with the queries' vectors, float32 [queries, embed]."""
        return self.hits(*self.best(queries, k))

    def best(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The half of `nearest` that runs on the devices: scores and rows, [queries, k]."""
        return self._vectors.top_k(queries, k)

    def hits(self, scores: np.ndarray, rows: np.ndarray) -> list[list[Hit]]:
        """The half of `nearest` that reads documents."""
        return [
            [
                Hit(score, row, self.document(row), self._store.duplicates.get(row, []))
                for score, row in zip(*found, strict=True)
            ]
            for found in zip(scores.tolist(), rows.tolist(), strict=True)
        ]
