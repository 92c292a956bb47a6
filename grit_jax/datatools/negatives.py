"""Hard negatives: passages that a keyword search or a model ranks high and that answer nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from grit_jax.data.records import EmbeddingRecord, EmbeddingText
from grit_jax.data.rows import Failed, Row, read_objects
from grit_jax.data.sources import Source
from grit_jax.errors import InputError
from grit_jax.evaluation.bm25 import Bm25

if TYPE_CHECKING:
    from grit_jax.inference.model import GritModel

_QUERIES_AT_ONCE, _PASSAGES_AT_ONCE = 256, 16384
_GATHERED_BYTES = 1 << 28  # of scores, which every device holds while they are gathered


class Mining(NamedTuple):
    """What is taken.

    Attributes:
      count: Negatives of a query.
      first: Best rank that is taken, from 1, among the passages that may be.
      last: Worst rank that is taken.
      ceiling: Passages that score more than this share of the query's lowest positive are left out, as they may be
        positives nobody has marked (NV-Retriever's positive-aware mining, Moreira et al. 2024); None leaves out none.
      draw: Whether `count` are drawn at random from the ranks; else the best are taken.
      keep: Whether the record's own negatives stay, before the mined ones.
      seed: Of the draws.
    """

    count: int = 1
    first: int = 1
    last: int = 100
    ceiling: float | None = 0.95
    draw: bool = False
    keep: bool = False
    seed: int = 0


class Mined(NamedTuple):
    """What mining did.

    Attributes:
      short: Queries that got fewer negatives than asked for.
      over_ceiling: Passages ranked before the last one taken that scored over the ceiling, of all queries.
    """

    short: int
    over_ceiling: int


class Passages:
    """The different passages of a file of records, by number, read when they are asked for.

    Args:
      source: Records whose positives and negatives are searched.
      corpus: JSONL with more: `text`, and `title` where there is one, as in a BEIR folder.

    Raises:
      InputError: The records are not embedding records, or have no passage with a text.
    """

    def __init__(self, source: Source, corpus: Path | None = None):
        if source.kind is not EmbeddingRecord:
            raise InputError(
                f"{source.path}: holds {source.kind.kind} records; negatives are those of embedding records"
            )
        self._source = source
        self._numbers: dict[int, int] = {}
        self._places: list[tuple[int, int] | EmbeddingText] = []
        self._digest = hashlib.sha256()
        for number in range(len(source)):
            record = source[number]
            self._digest.update(repr(record).encode())
            for place, text in enumerate(_passages(record)):
                self._add(text, (number, place))
        for entry in read_objects(corpus) if corpus else ():
            if isinstance(entry, Failed):
                raise entry.error
            where, row = entry
            if not isinstance(row.get("text"), str):
                raise InputError(f'{where}: no string under "text"')
            text = EmbeddingText("", f"{row.get('title') or ''} {row['text']}".strip())
            self._digest.update(repr(text).encode())
            self._add(text, text)
        if not self._places:
            raise InputError(f"{source.path}: every passage is blank; there is nothing to search")

    def _add(self, text: EmbeddingText, place: Any) -> None:
        key = _key(text)
        if key not in self._numbers and text.text.strip():
            self._numbers[key] = len(self._places)
            self._places.append(place)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> EmbeddingText:
        place = self._places[number]
        if isinstance(place, EmbeddingText):
            return place
        record, which = place
        return _passages(self._source[record])[which]

    @property
    def fingerprint(self) -> str:
        """Equal for the same records and passages in the same order."""
        return self._digest.hexdigest()[:16]

    def number(self, text: EmbeddingText) -> int | None:
        """Number of a passage, None where it is no passage."""
        return self._numbers.get(_key(text))


class Searcher(Protocol):
    """Scores of queries against all passages."""

    def scores(self, queries: Sequence[EmbeddingText]) -> np.ndarray:
        """float32 [queries, passages]."""
        ...


class KeywordSearcher:
    """BM25; a passage without a word of the query scores -inf."""

    def __init__(self, passages: Passages):
        self._index = Bm25([passages[number].text for number in range(len(passages))])

    def scores(self, queries: Sequence[EmbeddingText]) -> np.ndarray:
        """float32 [queries, passages]."""
        scores = self._index.scores([query.text for query in queries])
        return np.where(scores > 0, scores, -np.inf)


class ModelSearcher:
    """Exact search with a model's vectors, on all of its devices.

    In a job of many processes each embeds and searches a share of the passages, with a model on its own devices, and
    every process gets all scores: all must make the same calls.

    Args:
      model: What embeds.
      passages: What is searched.
      max_lengths: Tokens kept of a query and of a passage.
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
        """float32 [queries, passages]; cosines where the model's vectors have unit length."""
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
    """The records with mined negatives, in their order; the same call gives the same.

    A passage equal to the query or to a positive of an equal query is never a negative.

    Args:
      source: The records.
      passages: Made from them.
      searcher: What ranks.
      mining: What is taken.
      done: Called at the end.
      progress: Called with numbers of records.
    """
    positives_of: dict[int, set[int]] = {}
    for record in source:
        assert isinstance(record, EmbeddingRecord)
        found = (passages.number(text) for text in record.positives)
        positives_of.setdefault(_key(record.query), set()).update(number for number in found if number is not None)
    short = over = 0
    for start in range(0, len(source), _QUERIES_AT_ONCE):
        numbers = range(start, min(start + _QUERIES_AT_ONCE, len(source)))
        records = [source[number] for number in numbers]
        assert all(isinstance(record, EmbeddingRecord) for record in records)
        scores = searcher.scores([record.query for record in records])  # ty: ignore
        for number, record, row in zip(numbers, records, scores, strict=True):
            assert isinstance(record, EmbeddingRecord)
            known = positives_of[_key(record.query)]
            itself = passages.number(EmbeddingText(record.query.instruction, record.query.text))
            same_text = passages.number(EmbeddingText("", record.query.text))
            excluded = known | {place for place in (itself, same_text) if place is not None}
            kept = record.negatives if mining.keep else ()
            excluded |= {place for text in kept if (place := passages.number(text)) is not None}
            own = [place for text in record.positives if (place := passages.number(text)) is not None]
            chosen, above = choose(row, mining, own=own, excluded=excluded, number=number)
            over += above
            short += len(chosen) < mining.count
            negatives = [*kept, *(passages[place] for place in chosen)]
            yield (
                source.where(number),
                {
                    "query": list(record.query),
                    "pos": [list(text) for text in record.positives],
                    "neg": [list(text) for text in negatives],
                },
            )
        progress(len(records))
    done(Mined(short, over))


def choose(
    scores: np.ndarray, mining: Mining, *, own: Sequence[int], excluded: set[int], number: int
) -> tuple[list[int], int]:
    """The negatives of one query, best first, and how many better ones the ceiling left out.

    Args:
      scores: float32 [passages].
      mining: What is taken.
      own: The query's positives.
      excluded: Passages that are never taken.
      number: Of the record; draws depend on it and the seed.
    """
    allowed = scores.astype(np.float32, copy=True)
    allowed[list(excluded)] = -np.inf
    above = 0
    if mining.ceiling is not None and own:
        limit = float(np.min(scores[list(own)]))
        # Of a negative score, too, a share is less than the score.
        limit -= abs(limit) * (1 - mining.ceiling) if np.isfinite(limit) else 0
        over = allowed > limit
        above = int(over.sum())
        allowed[over] = -np.inf
    most = min(mining.last, len(allowed))
    best = np.argpartition(-allowed, most - 1)[:most] if most < len(allowed) else np.arange(len(allowed))
    border = np.min(allowed[best])
    # Ties are broken by number, also those with what argpartition left out.
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
    """float32 [texts, embed]; each with its own instruction."""
    vectors: np.ndarray | None = None
    for instruction in dict.fromkeys(text.instruction for text in texts):
        mine = [place for place, text in enumerate(texts) if text.instruction == instruction and text.text.strip()]
        # An empty query, which training drops, has no direction.
        encoded = model.encode([texts[place].text for place in mine], instruction=instruction, max_length=max_length)
        vectors = np.zeros((len(texts), encoded.shape[1]), np.float32) if vectors is None else vectors
        vectors[mine] = encoded
    assert vectors is not None
    return vectors
