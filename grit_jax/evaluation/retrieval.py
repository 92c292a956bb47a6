"""Retrieval in BEIR layout: exact search over the whole corpus."""

from __future__ import annotations

import dataclasses
from collections.abc import Container
from pathlib import Path
from typing import NamedTuple

import numpy as np

from grit_jax.data.qrels import find_qrels, read_qrels
from grit_jax.data.text_files import sound
from grit_jax.errors import InputError
from grit_jax.evaluation.reading import existing, read_records
from grit_jax.evaluation.scores import ndcg, recall, reciprocal_rank
from grit_jax.evaluation.task import EmbeddingTask, Outcome, Session
from grit_jax.retrieval.documents import parse_document
from grit_jax.retrieval.exact_search import Searchable
from grit_jax.retrieval.quantization import Dtype, pack

_SHALLOW, _DEEP = 10, 100  # ranks that scores consider


class Collection(NamedTuple):
    """A folder in BEIR layout, read for one split.

    Documents are in descending order of their ids: trec_eval ranks the larger of two ids with equal scores first.

    Attributes:
      queries: Text by id, for the queries that the split judges.
      documents: Title and text by id.
      judgements: Relevance by query id, then document id; in the order of the queries.
    """

    queries: dict[str, str]
    documents: dict[str, str]
    judgements: dict[str, dict[str, float]]


class Ranking(NamedTuple):
    """The best documents of each query.

    Attributes:
      scores: float32 [queries, ranks]; minus infinity where there is no document.
      documents: int [queries, ranks]; indices into the collection's documents.
    """

    scores: np.ndarray
    documents: np.ndarray


def collection_files(folder: Path, split: str) -> list[Path]:
    """Corpus, queries and judgements."""
    judgements = find_qrels(folder, split) or folder / "qrels" / f"{split}.tsv"
    return [folder / "corpus.jsonl", folder / "queries.jsonl", judgements]


def texts_by_id(path: Path, judged: Container[str] | None = None) -> dict[str, str]:
    """Text of each document by id, its title first where it has one.

    Args:
      path: The file.
      judged: Ids that must be unique; None for all. Other ids that repeat get their line appended.

    Raises:
      InputError: The file is missing or malformed, or an id that must be unique is not.
    """
    documents: dict[str, str] = {}
    for record in read_records(path):
        document = parse_document(record.values, record.where, id_required=True)
        name = document.id
        if name in documents:
            if judged is None or name in judged:
                raise InputError(f"{record.where}: '_id' {name!r} appears a second time; ids must differ")
            name = f"{name} at {record.where}"
        documents[name] = document.embedded
    return documents


def read_collection(folder: Path, split: str) -> Collection:
    """Reads a folder in BEIR layout.

    Raises:
      InputError: A file is missing or malformed, a judged query is missing, or judgements contradict each other.
    """
    corpus_file, queries_file, judgements_file = collection_files(folder, split)
    texts = texts_by_id(queries_file)
    judgements: dict[str, dict[str, float]] = {}
    for where, (query, document, score) in sound(read_qrels(existing(judgements_file))):
        if query not in texts:
            raise InputError(f"{where}: query {query!r} is not in {existing(queries_file)}; add or remove it")
        if judgements.setdefault(query, {}).setdefault(document, score) != score:
            raise InputError(f"{where}: judges document {document!r} a second time, with another score; remove one")
    if not judgements:
        raise InputError(f"{judgements_file}: judges nothing; put judgements in it")
    documents = texts_by_id(corpus_file, {name for judged in judgements.values() for name in judged})
    queries = {query: text for query, text in texts.items() if query in judgements}
    return Collection(
        queries, dict(sorted(documents.items(), reverse=True)), {query: judgements[query] for query in queries}
    )


@dataclasses.dataclass(frozen=True)
class Retrieval(EmbeddingTask):
    """Documents for queries. `path` is a folder in BEIR layout; the main score is nDCG@10.

    Attributes:
      split: Judgements that count, `qrels/{split}.tsv` or another form that `read_qrels` reads.
      document_instruction: Instruction of the documents.
      stored_dtype: Dtype of the documents' vectors, which are compared in float32 like those of a store.
      ignore_identical_ids: Whether to leave out the document with the query's own id, if queries are documents too.
    """

    split: str = "test"
    document_instruction: str = ""
    stored_dtype: Dtype = "float32"
    ignore_identical_ids: bool = False

    def files(self) -> list[Path]:
        """Corpus, queries and judgements."""
        return collection_files(Path(self.path), self.split)

    def evaluate(self, session: Session) -> Outcome:
        """Ranks all documents for each judged query."""
        collection = read_collection(Path(self.path), self.split)
        queries = session.directions(list(collection.queries.values()), self.instruction)
        documents = session.directions(list(collection.documents.values()), self.document_instruction)
        searchable = Searchable(**pack(documents, self.stored_dtype))
        ranking = Ranking(*searchable.top_k(queries, _DEEP + self.ignore_identical_ids))
        if self.ignore_identical_ids:
            ranking = without_own_ids(ranking, collection)
        return outcome(ranking, collection)


def without_own_ids(ranking: Ranking, collection: Collection) -> Ranking:
    """The ranking with one rank less, in which no document has its query's id."""
    index = {name: i for i, name in enumerate(collection.documents)}
    own = np.array([index.get(query, -1) for query in collection.queries])
    last = np.argsort(ranking.documents == own[:, None], axis=1, kind="stable")  # own documents go to the end
    scores, documents = (np.take_along_axis(x, last, axis=1) for x in ranking)
    scores[documents == own[:, None]] = -np.inf
    return Ranking(scores[:, :_DEEP], documents[:, :_DEEP])


def outcome(ranking: Ranking, collection: Collection) -> Outcome:
    """nDCG@10 and the other scores of a ranking."""
    names = list(collection.documents)
    gains, judged = np.zeros(ranking.documents.shape), []
    for query, relevance in enumerate(collection.judgements.values()):
        found = [relevance.get(names[i], 0.0) for i in ranking.documents[query]]
        gains[query] = np.where(np.isfinite(ranking.scores[query]), found, 0.0)
        judged.append(np.array(list(relevance.values())))
    scores = {
        f"recall_at_{_SHALLOW}": float(np.mean(recall(gains, judged, _SHALLOW))),
        f"recall_at_{_DEEP}": float(np.mean(recall(gains, judged, _DEEP))),
        f"mrr_at_{_SHALLOW}": float(np.mean(reciprocal_rank(gains, _SHALLOW))),
    }
    return Outcome(f"ndcg_at_{_SHALLOW}", ndcg(gains, judged, _SHALLOW), scores=scores)
