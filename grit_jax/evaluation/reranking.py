"""Candidates of a query put in order: by embeddings, or by what the model writes about them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Literal

import numpy as np

from grit_jax.config.ranges import require_positive
from grit_jax.errors import InputError
from grit_jax.evaluation import metrics
from grit_jax.evaluation.data import Row, by_row, read_rows
from grit_jax.evaluation.prompted import fill
from grit_jax.evaluation.task import EmbeddingTask, Outcome, Session

_MRR_RANKS = 10
_TOKENS_PER_NUMBER = 8  # of "[12] > " where every character is a token
_POINTWISE = (
    "Passage: {passage}\n\nQuery: {query}\n\nDoes the passage answer the query, or treat what it asks about? Answer "
    "with Yes or No."
)
_PERMUTATION = (
    "{passages}\n\nQuery: {query}\n\nPut the passages above in order, the most relevant to the query first. Answer "
    "with their numbers alone, such as [2] > [1]."
)


@dataclasses.dataclass(frozen=True)
class Reranking(EmbeddingTask):
    """Relevant documents before others: mean average precision.

    `path` is a .jsonl file with `query` (a text, or several for one need), `positive` and `negative` (lists of texts).
    Rows without either are left out. By embedding, documents are ordered by their largest cosine with a query. By
    generation, the first `candidates` of that order are ordered again by the first query, the others stay behind.

    Attributes:
      document_instruction: What the model is told about the documents.
      method: `embedding`; `pointwise`, where the order is that of log p("Yes") - log p("No"); `permutation`, where the
        model writes the order.
      candidates: Documents that the model is asked about.
      prompt: What it is asked, with `{query}` and `{passage}`, or `{passages}` for a permutation; null for one in
        English.
    """

    document_instruction: str = ""
    method: Literal["embedding", "pointwise", "permutation"] = "embedding"
    candidates: int = 10
    prompt: str | None = None

    def __post_init__(self):
        require_positive("candidates", self.candidates)

    def evaluate(self, session: Session) -> Outcome:
        """Orders the documents of each row."""
        rows = [row for row in read_rows(Path(self.path)) if row.get("positive", list) and row.get("negative", list)]
        if not rows:
            raise InputError(f"{self.path}: no row has 'positive' and 'negative'; there is nothing to order")
        documents = [row.strings("positive") + row.strings("negative") for row in rows]
        scores = self._cosines(session, rows, documents)
        figures = {}
        if self.method != "embedding":
            orders = [np.argsort(-row, kind="stable")[: self.candidates] for row in scores]
            asked = [[texts[place] for place in order] for texts, order in zip(documents, orders, strict=True)]
            again = self._pointwise if self.method == "pointwise" else self._permutation
            ranks, figures = again(session, rows, asked)
            for row, order, rank in zip(scores, orders, ranks, strict=True):
                row[order] = row.max() + 1 - rank / len(rank)
        precision, reciprocal = [], []
        for row, values in zip(rows, scores, strict=True):
            relevant = np.arange(len(values)) < len(row.values["positive"])
            precision.append(metrics.average_precision(relevant, values))
            in_order = relevant[np.argsort(-values, kind="stable")]
            reciprocal.append(metrics.reciprocal_rank(in_order[None].astype(float), _MRR_RANKS)[0])
        figures[f"mrr_at_{_MRR_RANKS}"] = float(np.mean(reciprocal))
        return Outcome("map", np.array(precision), figures=figures)

    def _cosines(self, session: Session, rows: list[Row], documents: list[list[str]]) -> list[np.ndarray]:
        """float64 [documents] of each row; largest cosine with one of the row's queries."""
        queries = [_queries(row) for row in rows]
        vectors = [
            by_row(session.directions([text for some in texts for text in some], told), texts)
            for texts, told in ((queries, self.instruction or ""), (documents, self.document_instruction))
        ]
        return [np.max(of_queries @ of_documents.T, axis=0).astype(float)
                for of_queries, of_documents in zip(*vectors, strict=True)]  # fmt: skip

    def _pointwise(
        self, session: Session, rows: list[Row], documents: list[list[str]]
    ) -> tuple[list[np.ndarray], dict[str, float]]:
        """Rank of each document from 0, by how much likelier Yes is than No."""
        asked = [
            fill(self.prompt or _POINTWISE, row, {"query": _queries(row)[0], "passage": text})
            for row, texts in zip(rows, documents, strict=True)
            for text in texts
        ]
        scored = session.log_likelihoods([*asked, *asked], ["Yes"] * len(asked) + ["No"] * len(asked))
        yes, no = np.split(scored.values, 2)
        ranks = [_ranks(np.argsort(-row, kind="stable")) for row in by_row(yes - no, documents)]
        return ranks, {"num_truncated": float(scored.num_truncated)}

    def _permutation(
        self, session: Session, rows: list[Row], documents: list[list[str]]
    ) -> tuple[list[np.ndarray], dict[str, float]]:
        """Rank of each document from 0, as written; what is not written keeps its order behind the others."""
        numbered = [
            "\n\n".join(f"[{number}] {text}" for number, text in enumerate(texts, start=1)) for texts in documents
        ]
        prompts = [
            fill(self.prompt or _PERMUTATION, row, {"query": _queries(row)[0], "passages": passages})
            for row, passages in zip(rows, numbered, strict=True)
        ]
        room = _TOKENS_PER_NUMBER * max(map(len, documents))
        written = session.answers(prompts, max_new_tokens=room)
        orders = [permutation(answer or "", len(texts)) for answer, texts in zip(written, documents, strict=True)]
        unanswered = float(sum(answer is None for answer in written))
        return [_ranks(order) for order in orders], {"num_too_long": unanswered}


def permutation(answer: str, size: int) -> np.ndarray:
    """The order that an answer such as `[2] > [1]` gives of `size` things, as places from 0; int [size]."""
    named = [int(digits) - 1 for digits in re.findall(r"\[(\d+)\]", answer)]
    return np.array(list(dict.fromkeys([place for place in named if 0 <= place < size] + list(range(size)))))


def _ranks(order: np.ndarray) -> np.ndarray:
    ranks = np.empty(len(order))
    ranks[order] = np.arange(len(order))
    return ranks


def _queries(row: Row) -> list[str]:
    return row.strings("query") if isinstance(row.values.get("query"), list) else [row.get("query")]
