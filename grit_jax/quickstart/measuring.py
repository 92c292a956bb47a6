"""The quickstart's measurements: retrieval scores, and the loss per token of a unigram model."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from grit_jax.data.sources import find_files
from grit_jax.evaluation.likelihood import read_generative
from grit_jax.evaluation.retrieval import read_collection
from grit_jax.evaluation.scores import ndcg, recall
from grit_jax.inference.model import GritModel
from grit_jax.text.tokenizer import Tokenizer


class RetrievalTask(NamedTuple):
    """Queries over a corpus, one relevant document each.

    Attributes:
      queries: Texts.
      documents: Texts.
      relevant: int [queries]; index of each query's document.
    """

    queries: list[str]
    documents: list[str]
    relevant: np.ndarray


def read_task(folder: Path) -> RetrievalTask:
    """Reads a folder in BEIR layout whose queries have one relevant document each."""
    collection = read_collection(folder, "test")
    index = {name: i for i, name in enumerate(collection.documents)}
    relevant = [index[name] for (name,) in collection.judgements.values()]
    return RetrievalTask(list(collection.queries.values()), list(collection.documents.values()), np.array(relevant))


def retrieval_scores(ranks: np.ndarray) -> dict[str, float]:
    """nDCG@10 and recall@10 of a ranking in which each query has one relevant document.

    Args:
      ranks: int [queries]; rank of the relevant document, from 1.
    """
    gains, judged = (ranks[:, None] == np.arange(1, 11)).astype(float), [np.ones(1)] * len(ranks)
    scores = {"ndcg_at_10": ndcg(gains, judged, 10), "recall_at_10": recall(gains, judged, 10)}
    return {name: float(np.mean(values)) for name, values in scores.items()}


def ranks_of(scores: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """Rank, int [queries], of the relevant document in scores [queries, documents]; ties count against it."""
    own = np.take_along_axis(scores, relevant[:, None], axis=1)
    return np.sum(scores >= own, axis=1)


def model_scores(
    model: GritModel, task: RetrievalTask, *, instruction: str, max_lengths: tuple[int, int]
) -> np.ndarray:
    """Cosine similarities [queries, documents]; queries carry the instruction, documents none.

    Args:
      model: The model to measure.
      task: Queries and documents.
      instruction: Instruction of the queries.
      max_lengths: Most tokens of a query and of a document.
    """
    queries = model.encode(task.queries, instruction=instruction, max_length=max_lengths[0])
    return queries @ model.encode(task.documents, max_length=max_lengths[1]).T


def unigram_loss(train: Path, held_out: Path, tokenizer: Tokenizer, *, max_length: int) -> float:
    """Held-out loss per scored token, in nats, of the add-one smoothed frequencies of scored training tokens."""

    def counts(folder: Path) -> np.ndarray:
        counted = np.zeros(tokenizer.vocab_size)
        for text in read_generative(find_files(str(folder)), tokenizer):
            for start, end in np.clip(text.spans, 1, max_length):
                np.add.at(counted, text.tokens[start:end], 1)
        return counted

    smoothed, expected = 1 + counts(train), counts(held_out)
    return float(-np.sum(expected * np.log(smoothed / smoothed.sum())) / expected.sum())
