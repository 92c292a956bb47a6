"""Hard negatives: passages that keyword search or a model ranks high but that do not answer the query."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from grit_jax.data.records import EmbeddingRecord, EmbeddingText
from grit_jax.data.sources import Source
from grit_jax.data.text_files import Row, read_objects, sound
from grit_jax.errors import InputError
from grit_jax.evaluation.bm25 import Bm25
from grit_jax.retrieval.documents import titled

if TYPE_CHECKING:
    from grit_jax.inference.model import GritModel

_QUERIES_AT_ONCE, _PASSAGES_AT_ONCE = 256, 16384
_GATHERED_BYTES = 1 << 28  # of scores, which every device holds while gathering them


class Mining(NamedTuple):
    """The settings of mining.

    Attributes:
      count: Negatives per query.
      first: Best rank to take, from 1, among the allowed passages.
      last: Worst rank to take.
      ceiling: Passages that score more than this share of the query's lowest positive are left out as possible
        unlabelled positives (positive-aware mining of NV-Retriever, Moreira et al. 2024); None leaves out none.
      draw: Whether to draw `count` of the ranks at random instead of taking the best.
      keep: Whether to keep the record's own negatives, before the mined ones.
      seed: Seed of the draws.
    """

    count: int = 1
    first: int = 1
    last: int = 100
    ceiling: float | None = 0.95
    draw: bool = False
    keep: bool = False
    seed: int = 0


class Mined(NamedTuple):
    """The outcome of mining.

    Attributes:
      short: Queries with fewer negatives than `Mining.count`.
      over_ceiling: Passages over the ceiling, of all queries.
    """

    short: int
    over_ceiling: int


class Passages:
    """The distinct passages of a file of records by index, read on demand.

    Args:
      source: Records whose positives and negatives to search.
      corpus: JSONL with more passages, `text` and optionally `title`, as in a BEIR folder.

    Raises:
      InputError: The records are not embedding records, or have no passage with a text.
    """

    def __init__(self, source: Source, corpus: Path | None = None):
        if source.record_type is not EmbeddingRecord:
            raise InputError(
                f"{source.path}: holds {source.record_type.name} records; negatives are those of embedding records"
            )
        self._source = source
        self._indices: dict[int, int] = {}
        self._origins: list[tuple[int, int] | EmbeddingText] = []  # record and index of the passage in it, or itself
        self._digest = hashlib.sha256()
        for number, record in enumerate(source):
            self._digest.update(repr(record).encode())
            for i, text in enumerate(_passages(record)):
                self._add(text, (number, i))
        for where, row in sound(read_objects(corpus)) if corpus else ():
            if not isinstance(row.get("text"), str):
                raise InputError(f'{where}: no string under "text"')
            text = EmbeddingText("", titled(row.get("title"), row["text"]))
            self._digest.update(repr(text).encode())
            self._add(text, text)
        if not self._origins:
            raise InputError(f"{source.path}: every passage is blank; there is nothing to search")

    def _add(self, text: EmbeddingText, origin: Any) -> None:
        key = _key(text)
        if key not in self._indices and text.text.strip():
            self._indices[key] = len(self._origins)
            self._origins.append(origin)

    def __len__(self) -> int:
        return len(self._origins)

    def __getitem__(self, index: int) -> EmbeddingText:
        origin = self._origins[index]
        if isinstance(origin, EmbeddingText):
            return origin
        number, i = origin
        return _passages(self._source[number])[i]

    @property
    def fingerprint(self) -> str:
        """Equal for the same records and passages in the same order."""
        return self._digest.hexdigest()[:16]

    def indices(self, texts: Iterable[EmbeddingText]) -> list[int]:
        """The indices of those texts that are passages."""
        return [self._indices[key] for key in map(_key, texts) if key in self._indices]


class Searcher(Protocol):
    """Scores queries against all passages."""

    def scores(self, queries: Sequence[EmbeddingText]) -> np.ndarray:
        """Scores, float32 [queries, passages]."""
        ...


class KeywordSearcher:
    """BM25; a passage that shares no word with the query scores -inf."""

    def __init__(self, passages: Passages):
        self._index = Bm25([passages[number].text for number in range(len(passages))])

    def scores(self, queries: Sequence[EmbeddingText]) -> np.ndarray:
        """Scores, float32 [queries, passages]."""
        scores = self._index.scores([query.text for query in queries])
        return np.where(scores > 0, scores, -np.inf)


class ModelSearcher:
    """Exact search with a model's vectors, on all of its devices.

    In a job of many processes all must make the same calls; each embeds and searches a share of the passages with a
    model on its own devices, and gets all scores.

    Args:
      model: The model that embeds.
      passages: The passages to search.
      max_lengths: Most tokens to keep of a query and of a passage.
      progress: Called with numbers of passages that this process has embedded.
    """

    def __init__(
        self,
        model: GritModel,
        passages: Passages,
        *,
        max_lengths: tuple[int, int],
        progress: Callable[[int], None] = lambda _: None,
    ):
        from grit_jax.parallel.distributed import own_share
        from grit_jax.retrieval.exact_search import Searchable

        self._model, self._max_lengths, self._size = model, max_lengths, len(passages)
        mine, blocks = own_share(len(passages)), []
        for start in range(0, len(mine), _PASSAGES_AT_ONCE):
            texts = [passages[number] for number in mine[start : start + _PASSAGES_AT_ONCE]]
            blocks.append(_encode(model, texts, max_lengths[1]))
            progress(len(texts))
        self._passages = Searchable(np.concatenate(blocks))

    def scores(self, queries: Sequence[EmbeddingText]) -> np.ndarray:
        """Scores, float32 [queries, passages]; cosines if the model's vectors have unit length."""
        from grit_jax.parallel.distributed import gathered, own_share

        mine = [queries[number] for number in own_share(len(queries))]
        vectors = np.concatenate(gathered(_encode(self._model, mine, self._max_lengths[0])))[: len(queries)]
        scores = self._passages.scores(vectors)  # of this process's passages
        rows = max(1, _GATHERED_BYTES // (4 * self._size))
        blocks = [gathered(scores[first : first + rows]) for first in range(0, len(scores), rows)]
        return np.concatenate([np.concatenate(block, axis=1) for block in blocks])[:, : self._size]


def mine(
    source: Source,
    passages: Passages,
    searcher: Searcher,
    mining: Mining,
    *,
    done: Callable[[Mined], None] = lambda _: None,
    progress: Callable[[int], None] = lambda _: None,
) -> Iterator[tuple[str, Row]]:
    """The records with mined negatives, in their order; equal calls give equal results.

    A passage equal to the query or to a positive of an equal query is never a negative.

    Args:
      source: The records.
      passages: The passages of the records.
      searcher: Ranks the passages.
      mining: The settings.
      done: Called at the end.
      progress: Called with numbers of records.
    """
    positives_of: dict[int, set[int]] = {}
    for record in source:
        assert isinstance(record, EmbeddingRecord)
        positives_of.setdefault(_key(record.query), set()).update(passages.indices(record.positives))
    short = over = 0
    for start in range(0, len(source), _QUERIES_AT_ONCE):
        numbers = range(start, min(start + _QUERIES_AT_ONCE, len(source)))
        records = [source[number] for number in numbers]
        assert all(isinstance(record, EmbeddingRecord) for record in records)
        scores = searcher.scores([record.query for record in records])  # ty: ignore
        for number, record, row in zip(numbers, records, scores, strict=True):
            assert isinstance(record, EmbeddingRecord)
            kept = record.negatives if mining.keep else ()
            same_text = EmbeddingText("", record.query.text)
            excluded = positives_of[_key(record.query)].union(passages.indices([record.query, same_text, *kept]))
            own = passages.indices(record.positives)
            chosen, above = choose(row, mining, own=own, excluded=excluded, number=number)
            over += above
            short += len(chosen) < mining.count
            texts = {"pos": record.positives, "neg": [*kept, *map(passages.__getitem__, chosen)]}
            lists = {key: [list(text) for text in some] for key, some in texts.items()}
            yield source.where(number), {"query": list(record.query), **lists}
        progress(len(records))
    done(Mined(short, over))


def choose(
    scores: np.ndarray, mining: Mining, *, own: Sequence[int], excluded: set[int], number: int
) -> tuple[list[int], int]:
    """The negatives of one query, best first, and the number of passages over the ceiling.

    Args:
      scores: float32 [passages].
      mining: The settings.
      own: The query's positives.
      excluded: Passages never to take.
      number: Number of the record; draws depend on it and the seed.
    """
    allowed = scores.astype(np.float32, copy=True)
    allowed[list(excluded)] = -np.inf
    above = 0
    if mining.ceiling is not None and own:
        limit = float(np.min(scores[list(own)]))
        # A share of a negative score must be lower than the score, too.
        limit -= abs(limit) * (1 - mining.ceiling) if np.isfinite(limit) else 0
        over = allowed > limit
        above = int(over.sum())
        allowed[over] = -np.inf
    most = min(mining.last, len(allowed))
    best = np.argpartition(-allowed, most - 1)[:most] if most < len(allowed) else np.arange(len(allowed))
    border = np.min(allowed[best])
    # Ties are broken by index, even with passages that argpartition left out.
    ranked = np.flatnonzero(allowed >= border) if np.isfinite(border) else np.flatnonzero(np.isfinite(allowed))
    ranked = ranked[np.lexsort((ranked, -allowed[ranked]))][mining.first - 1 : mining.last]
    if mining.draw:
        generator = np.random.default_rng((mining.seed, number))
        ranked = ranked[np.sort(generator.permutation(len(ranked))[: mining.count])]
    return ranked[: mining.count].tolist(), above


def _passages(record: Any) -> tuple[EmbeddingText, ...]:
    return (*record.positives, *record.negatives)


def _key(text: EmbeddingText) -> int:
    return int.from_bytes(hashlib.blake2b(repr(tuple(text)).encode(), digest_size=8).digest())


def _encode(model: GritModel, texts: Sequence[EmbeddingText], max_length: int) -> np.ndarray:
    """Vectors of texts, float32 [texts, embed], each with its own instruction."""
    vectors: np.ndarray | None = None
    for instruction in dict.fromkeys(text.instruction for text in texts):
        # An empty query, which training drops, has no direction.
        mine = [i for i, text in enumerate(texts) if text.instruction == instruction and text.text.strip()]
        encoded = model.encode([texts[i].text for i in mine], instruction=instruction, max_length=max_length)
        vectors = np.zeros((len(texts), encoded.shape[1]), np.float32) if vectors is None else vectors
        vectors[mine] = encoded
    assert vectors is not None
    return vectors
