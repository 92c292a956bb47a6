"""The quickstart's measurements: retrieval against BM25, and loss per token against unigrams."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from grit_jax.data.records import EmbeddingRecord
from grit_jax.data.sources import find_files, open_source
from grit_jax.data.streams.generative import GenerativeStream
from grit_jax.data.tokenizing import tokenize_records
from grit_jax.errors import InputError
from grit_jax.evaluation import metrics
from grit_jax.evaluation.retrieval import read_collection
from grit_jax.inference.model import GritModel
from grit_jax.text.tokenizer import Tokenizer


class RetrievalTask(NamedTuple):
    """Queries over a corpus, one relevant document each.

    Attributes:
      queries: Texts.
      documents: Texts.
      relevant: int [queries]; the number of each query's document.
    """

    queries: list[str]
    documents: list[str]
    relevant: np.ndarray


def read_task(folder: Path) -> RetrievalTask:
    """Reads a folder in BEIR layout whose queries have one relevant document each."""
    collection = read_collection(folder, "test")
    place = {name: number for number, name in enumerate(collection.documents)}
    relevant = [place[name] for (name,) in collection.judgements.values()]
    return RetrievalTask(list(collection.queries.values()), list(collection.documents.values()), np.array(relevant))


def task_of_records(path: str | Path) -> RetrievalTask:
    """Makes a task of GRIT data: the queries of embedding records over the first positives of all of them.

    Raises:
      InputError: No embedding record is there.
    """
    sources = map(open_source, find_files(str(path)))
    records = [record for source in sources for record in source if isinstance(record, EmbeddingRecord)]
    if not records:
        raise InputError(f"{path}: no embedding records; a search is measured with held-out queries and positives")
    places: dict[str, int] = {}
    relevant = [places.setdefault(record.positives[0].text, len(places)) for record in records]
    return RetrievalTask([record.query.text for record in records], list(places), np.array(relevant))


def retrieval_figures(ranks: np.ndarray) -> dict[str, float]:
    """Figures of a ranking in which each query has one relevant document.

    Args:
      ranks: int [queries]; rank of the relevant document, from 1.
    """
    gains, judged = (ranks[:, None] == np.arange(1, 11)).astype(float), [np.ones(1)] * len(ranks)
    return {
        "ndcg_at_10": float(np.mean(metrics.ndcg(gains, judged, 10))),
        "recall_at_10": float(np.mean(metrics.recall(gains, judged, 10))),
    }


def ranks_of(scores: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """Rank, int [queries], of the relevant document in scores [queries, documents]; ties count against it."""
    own = np.take_along_axis(scores, relevant[:, None], axis=1)
    return np.sum(scores >= own, axis=1)


def model_scores(
    model: GritModel, task: RetrievalTask, *, instruction: str, max_lengths: tuple[int, int]
) -> np.ndarray:
    """Cosine similarities [queries, documents]; queries carry the instruction, documents none."""
    queries = model.encode(task.queries, instruction=instruction, max_length=max_lengths[0])
    return queries @ model.encode(task.documents, max_length=max_lengths[1]).T


def unigram_loss(train: Path, held_out: Path, tokenizer: Tokenizer, *, max_length: int) -> float:
    """Held-out loss per scored token of the add-one smoothed frequencies of scored training tokens, in nats."""
    counts = [np.ones(tokenizer.vocab_size), np.zeros(tokenizer.vocab_size)]
    for number, folder in enumerate((train, held_out)):
        for tokens in _scored_tokens(folder, tokenizer, max_length):
            np.add.at(counts[number], tokens, 1)
    log_frequency = np.log(counts[0] / counts[0].sum())
    return float(-np.sum(counts[1] * log_frequency) / counts[1].sum())


def _scored_tokens(folder: Path, tokenizer: Tokenizer, max_length: int) -> Iterator[np.ndarray]:
    for source in map(open_source, find_files(str(folder))):
        for (conversation,) in tokenize_records(list(source), GenerativeStream.prompts, tokenizer):
            for start, end in np.clip(conversation.spans, 1, max_length):
                yield conversation.tokens[start:end]
