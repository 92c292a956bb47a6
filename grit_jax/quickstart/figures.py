"""The quickstart's measurements: retrieval against BM25, and loss per token against unigrams."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from grit_jax.config import InputError
from grit_jax.data.examples import tokenize_records
from grit_jax.data.records import EmbeddingRecord
from grit_jax.data.sources import find_files, open_source
from grit_jax.inference import GritModel
from grit_jax.tokenizer import Tokenizer


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
    queries, documents = (
        {row["_id"]: row["text"] for row in map(json.loads, (folder / f"{name}.jsonl").read_text().split("\n")[:-1])}
        for name in ("queries", "corpus")
    )
    with (folder / "qrels/test.tsv").open() as file:
        relevant = {row["query-id"]: row["corpus-id"] for row in csv.DictReader(file, delimiter="\t")}
    place = {name: number for number, name in enumerate(documents)}
    return RetrievalTask(
        list(queries.values()), list(documents.values()), np.array([place[relevant[name]] for name in queries])
    )


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

    With one relevant document the ideal gain is 1, so nDCG@10 is the mean of 1 / log2(1 + rank) for ranks up to 10
    (Järvelin and Kekäläinen, 2002), and recall@10 the share of such ranks.

    Args:
      ranks: int [queries]; rank of the relevant document, from 1.
    """
    found = ranks <= 10
    return {"ndcg_at_10": float(np.mean(found / np.log2(1 + ranks))), "recall_at_10": float(np.mean(found))}


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


def bm25_scores(task: RetrievalTask) -> np.ndarray:
    """BM25 scores [queries, documents] with the defaults of bm25s."""
    import bm25s

    retriever = bm25s.BM25()
    retriever.index(bm25s.tokenize(task.documents, show_progress=False), show_progress=False)
    queries: Any = bm25s.tokenize(task.queries, show_progress=False, return_ids=False)
    return np.stack([retriever.get_scores(query) if query else np.zeros(len(task.documents)) for query in queries])


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
        for (conversation,) in tokenize_records(list(source), tokenizer):
            for start, end in np.clip(conversation.spans, 1, max_length):
                yield conversation.tokens[start:end]
