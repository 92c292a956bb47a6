"""Orders the candidates of a query by embeddings, or by what the model writes about them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Literal

import numpy as np

from grit_jax.config.ranges import require_positive
from grit_jax.errors import InputError
from grit_jax.evaluation.prompted import fill
from grit_jax.evaluation.reading import EvaluationRecord, read_records, split_by
from grit_jax.evaluation.scores import average_precision, reciprocal_rank
from grit_jax.evaluation.task import EmbeddingTask, Outcome, Session

_MRR_RANKS = 10
_TOKENS_PER_NUMBER = 8  # of "[12] > " if every character is a token
_POINTWISE = (
    "Passage: {passage}\n\nQuery: {query}\n\nDoes the passage answer the query, or treat what it asks about? Answer "
    "with Yes or No."
)
_PERMUTATION = (
    "{passages}\n\nQuery: {query}\n\nPut the passages above in order, the most relevant to the query first. Answer "
    "with their numbers alone, such as [2] > [1]."
)

_Ranks = tuple[list[np.ndarray], dict[str, float]]  # ranks of each record's documents, from 0, and further scores


@dataclasses.dataclass(frozen=True)
class Reranking(EmbeddingTask):
    """How far relevant documents come before others: mean average precision.

    `path` is a .jsonl file with `query` (a text, or several for one need), `positive` and `negative` (lists of texts);
    records without either are left out. By embedding, documents are ordered by their largest cosine with a query. By
    generation, the model reorders the first `candidates` of that order for the first query, and the others follow.

    Attributes:
      document_instruction: Instruction of the documents.
      method: `embedding`; `pointwise`, the order of log p("Yes") - log p("No"); `permutation`, as the model writes.
      candidates: Documents that the model reorders.
      prompt: Its prompt, with `{query}` and `{passage}`, or `{passages}` for a permutation; null for one in English.
    """

    document_instruction: str = ""
    method: Literal["embedding", "pointwise", "permutation"] = "embedding"
    candidates: int = 10
    prompt: str | None = None

    def __post_init__(self):
        require_positive("candidates", self.candidates)

    def evaluate(self, session: Session) -> Outcome:
        """Orders the documents of each record."""
        records = [
            record for record in read_records(Path(self.path))
            if record.get("positive", list) and record.get("negative", list)
        ]  # fmt: skip
        if not records:
            raise InputError(f"{self.path}: no record has 'positive' and 'negative'; there is nothing to order")
        documents = [record.strings("positive") + record.strings("negative") for record in records]
        similarities = self._cosines(session, records, documents)
        scores = {}
        if self.method != "embedding":
            orders = [np.argsort(-each, kind="stable")[: self.candidates] for each in similarities]
            candidates = [[texts[i] for i in order] for texts, order in zip(documents, orders, strict=True)]
            reorder = self._pointwise if self.method == "pointwise" else self._permutation
            ranks, scores = reorder(session, records, candidates)
            for each, order, rank in zip(similarities, orders, ranks, strict=True):
                each[order] = each.max() + 1 - rank / len(rank)
        precision, reciprocal = [], []
        for record, each in zip(records, similarities, strict=True):
            relevant = np.arange(len(each)) < len(record.values["positive"])
            precision.append(average_precision(relevant, each))
            in_order = relevant[np.argsort(-each, kind="stable")]
            reciprocal.append(reciprocal_rank(in_order[None].astype(float), _MRR_RANKS)[0])
        scores[f"mrr_at_{_MRR_RANKS}"] = float(np.mean(reciprocal))
        return Outcome("map", np.array(precision), scores=scores)

    def _cosines(
        self, session: Session, records: list[EvaluationRecord], documents: list[list[str]]
    ) -> list[np.ndarray]:
        """float64 [documents] of each record: the largest cosine with one of its queries."""
        queries = [record.one_or_more("query") for record in records]
        vectors = [
            split_by(groups, session.directions([text for group in groups for text in group], instruction))
            for groups, instruction in ((queries, self.instruction), (documents, self.document_instruction))
        ]
        return [np.max(of_queries @ of_documents.T, axis=0).astype(float)
                for of_queries, of_documents in zip(*vectors, strict=True)]  # fmt: skip

    def _pointwise(self, session: Session, records: list[EvaluationRecord], documents: list[list[str]]) -> _Ranks:
        """By how much likelier Yes is than No."""
        prompts = [
            fill(self.prompt or _POINTWISE, record, {"query": record.one_or_more("query")[0], "passage": text})
            for record, texts in zip(records, documents, strict=True)
            for text in texts
        ]
        scored = session.log_likelihoods([*prompts, *prompts], ["Yes"] * len(prompts) + ["No"] * len(prompts))
        yes, no = np.split(scored.values, 2)
        ranks = [_ranks(np.argsort(-each, kind="stable")) for each in split_by(documents, yes - no)]
        return ranks, {"num_truncated": float(scored.num_truncated)}

    def _permutation(self, session: Session, records: list[EvaluationRecord], documents: list[list[str]]) -> _Ranks:
        """As the model writes them; documents that it does not name follow in their order."""
        numbered = ["\n\n".join(f"[{i}] {text}" for i, text in enumerate(texts, start=1)) for texts in documents]
        prompts = [
            fill(self.prompt or _PERMUTATION, record, {"query": record.one_or_more("query")[0], "passages": passages})
            for record, passages in zip(records, numbered, strict=True)
        ]
        written = session.completions(prompts, max_new_tokens=_TOKENS_PER_NUMBER * max(map(len, documents)))
        orders = [permutation(each or "", len(texts)) for each, texts in zip(written, documents, strict=True)]
        return [_ranks(order) for order in orders], {"num_too_long": float(written.count(None))}


def permutation(completion: str, size: int) -> np.ndarray:
    """The order of `size` items in a completion such as `[2] > [1]`, as indices from 0; int [size]."""
    named = [int(digits) - 1 for digits in re.findall(r"\[(\d+)\]", completion)]
    return np.array(list(dict.fromkeys([i for i in named if 0 <= i < size] + list(range(size)))))


def _ranks(order: np.ndarray) -> np.ndarray:
    return np.argsort(order).astype(float)
