"""Keyword search, for a retrieval baseline and for mining negatives."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np


class Bm25:
    """BM25 with the defaults of bm25s.

    Args:
      documents: Texts to search; no query finds a text without words.
    """

    def __init__(self, documents: Sequence[str]):
        self._size, bm25s = len(documents), _library()
        corpus: Any = bm25s.tokenize(list(documents), show_progress=False)
        self._retriever = bm25s.BM25() if any(map(len, corpus.ids)) else None  # it cannot index a corpus without words
        if self._retriever:
            self._retriever.index(corpus, show_progress=False)

    def scores(self, queries: Sequence[str]) -> np.ndarray:
        """Scores, float32 [queries, documents]; 0 where the two share no word."""
        scores = np.zeros((len(queries), self._size), np.float32)
        if self._retriever:
            words: Any = _library().tokenize(list(queries), show_progress=False, return_ids=False)
            for row, query in zip(scores, words, strict=True):
                if query:
                    row[:] = self._retriever.get_scores(query)
        return scores


def _library() -> ModuleType:
    """bm25s without its debugging messages; imported late, as the import runs a JAX program."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "IProgress not found")  # a notebook without widgets; no bar is shown anyway
        import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # the import enables all of them
    return bm25s
