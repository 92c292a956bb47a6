"""Foreign data sets as GRIT records: BEIR folders, pairs and triples, conversations, and GRIT files themselves.

Every record is converted as its authors mean it, refused with file and line, or left out and counted.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any

from grit_jax.config import jsonfile
from grit_jax.data.qrels import Judgement, find_qrels, read_qrels
from grit_jax.data.records import RecordError
from grit_jax.data.sources import find_files, open_source, packed_or_not
from grit_jax.data.text_files import Entry, Row, converted, read_cells, read_objects, read_values, unpacked_name
from grit_jax.datatools import labels
from grit_jax.datatools.chats import alpaca, openai, sharegpt
from grit_jax.datatools.record_writer import LeftOut
from grit_jax.errors import InputError
from grit_jax.retrieval.documents import titled

__all__ = ["alpaca", "beir", "grit", "openai", "sharegpt", "triples"]

Rows = Iterator[Entry[Row]]

_QUERY = (
    "query", "anchor", "question", "question1", "sentence1", "sentence_a", "premise", "#1 string",
)  # fmt: skip
_POSITIVE = (
    "positive", "pos", "positives", "positive_passages", "answer", "response", "passage", "question2", "sentence2",
    "sentence_b", "hypothesis", "sentence", "#2 string",
)  # fmt: skip
_NEGATIVE = ("negative", "neg", "negatives", "negative_passages", "hard_negative", "sentence3")
_OTHER = ("id", "index", "pairid", "pair_id", "genre", "captionid", "promptid", "qid1", "qid2", "#1 id", "#2 id")
_COLUMNS = frozenset(
    (*_QUERY, *_POSITIVE, *_NEGATIVE, *_OTHER, *labels.COLUMNS, *(f"negative_{i}" for i in range(1, 65)))
)


def beir(source: Path, *, instruction: str, split: str) -> Rows:
    """Queries of a BEIR folder with the documents that the split's judgements name: over 0 positive, 0 negative.

    Raises:
      InputError: A file is missing.
    """
    qrels = find_qrels(source, split)
    if qrels is None:
        raise InputError(f"{source / 'qrels' / f'{split}.tsv'}: cannot be read: there is no such file")
    judged: dict[str, dict[str, tuple[str, Judgement]]] = {}  # with file and line, by query and document
    contradicted: dict[str, tuple[str, Judgement]] = {}  # by query
    for entry in read_qrels(qrels):
        if isinstance(entry, RecordError):
            yield entry
            continue
        where, judgement = entry
        before = judged.setdefault(judgement.query, {}).setdefault(judgement.document, entry)
        if before is not entry and before[1].score == judgement.score:
            yield LeftOut("judgements that repeat an earlier one", where)
        elif before is not entry:
            contradicted.setdefault(judgement.query, entry)
    wanted = {document for judgements in judged.values() for document in judgements}
    documents: dict[str, str] = {}

    def add_document(named: tuple[str, Row]) -> None:
        name, row = named
        text = _titled(row | {"text": row.get("text") or ""})
        if documents.setdefault(name, text) != text:
            raise RecordError("an id twice", f"'_id' {name!r} is another text's already; give each its own")

    corpus = source / "corpus.jsonl"
    for entry in converted(_with_ids(corpus, wanted), add_document):
        if isinstance(entry, RecordError):
            yield entry
    seen: set[str] = set()

    def with_documents(named: tuple[str, Row]) -> Row:
        name, row = named
        if name in seen:
            raise RecordError("an id twice", f"'_id' {name!r} is another query's already; give each its own")
        seen.add(name)
        judgements = judged[name].values()
        for where, judgement in judgements:
            if judgement.document not in documents:
                raise RecordError("no such document", f"document {judgement.document!r} is not in {corpus}", where)
        if name in contradicted:
            where, again = contradicted[name]
            message = f"judges document {again.document!r} a second time, with another score"
            raise RecordError("judged twice", message, where)
        positives = [documents[judgement.document] for _, judgement in judgements if judgement.score > 0]
        negatives = [documents[judgement.document] for _, judgement in judgements if judgement.score <= 0]
        if not positives:
            raise LeftOut("queries for which no document is judged relevant")
        return _embedding_row(row.get("text"), positives, negatives, instruction)

    queries = source / "queries.jsonl"
    yield from converted(_with_ids(queries, judged), with_documents)
    for name in judged.keys() - seen:
        for where, _ in judged[name].values():
            yield RecordError("no such query", f"query {name!r} is not in {queries}", where)


def triples(source: Path, *, instruction: str, min_score: float | None) -> Rows:
    """Query, positive and negatives: MS MARCO's triples, sentence-transformers' pairs and triplets, QQP, SNLI and more.

    A .tsv or .csv file has them in columns, named by a header or in this order; a JSONL or JSON file in lists, or under
    keys such as query or anchor, positive or pos, negative or negative_1. A text may be an object with title and text.
    Rows whose label or score says that the second text is no positive are left out; see `labels.require_positive_pair`.

    Args:
      source: The file.
      instruction: Instruction of the queries.
      min_score: Lowest score of a record to convert.

    Raises:
      InputError: The file cannot be read, half of its header is unknown, or `min_score` is missing or not applicable.
    """

    def convert(row: Any) -> Row:
        if isinstance(row, list):
            return _listed(row, instruction, min_score)
        if not isinstance(row, dict):
            found = f"found a JSON {type(row).__name__}; it must be an object or a list of texts"
            raise RecordError("not an object", found)
        return _named(row, instruction, min_score)

    is_table = unpacked_name(source).endswith((".tsv", ".csv"))
    entries: Iterator[Any] = _table_rows(source) if is_table else read_values(source)
    return converted(entries, convert)


def grit(source: Path) -> Rows:
    """GRIT records as they are, from any file or folder that training reads.

    Raises:
      InputError: There is no such file.
    """
    for path in find_files(str(source)):
        records = open_source(path, skip_bad=True)
        for index, record in enumerate(records.checked()):
            if isinstance(record, RecordError):
                yield record
            else:
                (line,) = records.lines(index, index + 1)
                yield records.where(index), json.loads(line.decode("utf-8-sig"))


def _with_ids(path: Path, wanted: Container[str]) -> Iterator[Entry[tuple[str, Row]]]:
    """The objects of a file, or of the one with .gz, that have one of these ids."""
    rows = converted(read_objects(packed_or_not(path)), _with_id)
    return (entry for entry in rows if isinstance(entry, RecordError) or entry[1][0] in wanted)


def _with_id(row: Row) -> tuple[str, Row]:
    name = row.get("_id")
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise RecordError("no id", f"'_id' is {name!r:.60}; it must be a text or a whole number")
    return str(name), row


def _table_rows(source: Path) -> Iterator[Entry[Any]]:
    for number, entry in enumerate(read_cells(source, _COLUMNS)):
        if not isinstance(entry, RecordError) and isinstance(entry[1], list):
            where, cells = entry
            known = [cell.strip().lower() for cell in cells if cell.strip().lower() in _COLUMNS]
            if not number and known:
                raise InputError(
                    f"{where}: looks like a header, but only {known[0]!r} is known; name a query "
                    f"({', '.join(_QUERY)}) and a positive ({', '.join(_POSITIVE)})"
                )
            if any("\t" in cell for cell in cells):
                message = "holds tabs; a file with tab-separated columns must end in .tsv"
                entry = RecordError("tabs in a .csv", message, where)
        yield entry


def _listed(row: list[Any], instruction: str, min_score: float | None) -> Row:
    """The record of a list of texts without names."""
    if len(row) < 2:
        raise RecordError("too few texts", f"has {len(row)} texts; at least a query and a positive are needed")
    numbers = [cell for cell in row if isinstance(cell, str) and _is_number(cell)]
    if len(numbers) == len(row) or (numbers and len(row) > 2):
        raise RecordError("a number for a text", f"{numbers[0]!r} is a score or an id, not a text; name the columns")
    if min_score is not None:
        raise RecordError("no score", "has texts without names, so it has no score, which --min-score needs")
    return _embedding_row(row[0], [row[1]], row[2:], instruction)


def _named(row: Row, instruction: str, min_score: float | None) -> Row:
    named = {str(key).strip().lower(): value for key, value in row.items()}
    if len(named) < len(row):
        raise RecordError("a key twice", f"{_listing(row)}: two of these keys differ in case or spaces alone")
    labels.require_positive_pair(named, min_score)
    found = [next((named[key] for key in keys if key in named), None) for keys in (_QUERY, _POSITIVE)]
    if None in found:
        raise RecordError(
            "no query or positive",
            f"has {_listing(sorted(named)[:8])}; a query is under {', '.join(_QUERY)}, a positive under "
            f"{', '.join(_POSITIVE)}",
        )
    negatives: list[Any] = []
    for key, value in named.items():
        if key in _NEGATIVE or key.startswith("negative_"):
            negatives += value if isinstance(value, list) else [value]
    positives = found[1] if isinstance(found[1], list) else [found[1]]
    return _embedding_row(found[0], positives, negatives, instruction)


def _listing(keys: Iterable[str]) -> str:
    return ", ".join(map(jsonfile.named, keys))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _embedding_row(query: Any, positives: list[Any], negatives: list[Any], instruction: str) -> Row:
    """The record of a query with its instruction, and of passages without one.

    A passage is a text, or an object with `text` and optionally `title`. Negatives that are null or blank are dropped.

    Raises:
      RecordError: The query or a positive is blank, or a negative is also a positive.
    """
    found = [_passage(value) for value in positives]
    for what, text in (("query", query), *(("positive", text) for _, text in found)):
        if _is_blank(text):
            raise RecordError("no text", f"the {what} has no text")
    against = [pair for value in negatives if not _is_blank((pair := _passage(value))[1])]
    known = {text.strip() for _, text in found if isinstance(text, str)}
    for _, text in against:
        if isinstance(text, str) and text.strip() in known:
            raise RecordError("a negative is a positive", f"{text!r:.60} is a negative and a positive of the query")
    return {"query": [instruction, query], "pos": found, "neg": against}


def _passage(value: Any) -> list[Any]:
    return ["", _titled(value) if isinstance(value, dict) and "text" in value else value]


def _titled(row: Row) -> Any:
    """Title and text of a passage; `text` alone if it is not a string."""
    title, text = row.get("title"), row.get("text")
    if title is not None and not isinstance(title, str):
        raise RecordError("no title", f'"title" is {title!r:.60}; it must be a text')
    return titled(title, text) if isinstance(text, str) else text


def _is_blank(text: Any) -> bool:
    return text is None or (isinstance(text, str) and not text.strip())
