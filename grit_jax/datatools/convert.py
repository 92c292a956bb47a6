"""Foreign data sets as GRIT rows: BEIR folders, pairs and triples, conversations, and GRIT files themselves.

No row changes its meaning in silence: it is used as its authors mean it, refused with file and line, or left out and
counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from grit_jax.config import jsonfile
from grit_jax.data.qrels import Judgement, find_qrels, read_qrels
from grit_jax.data.records import RecordError
from grit_jax.data.rows import Failed, LeftOut, Row, failed, read_cells, read_objects, read_values, unpacked_name
from grit_jax.data.sources import find_files, open_source
from grit_jax.datatools import labels
from grit_jax.datatools.chats import alpaca, openai, sharegpt
from grit_jax.datatools.faults import FaultError, Rows, converted, embedding_row, titled
from grit_jax.errors import InputError

__all__ = ["alpaca", "beir", "grit", "openai", "sharegpt", "triples"]

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
    judged: dict[str, dict[str, Judgement]] = {}
    twofold: dict[str, Judgement] = {}
    for entry in read_qrels(qrels):
        if isinstance(entry, Failed):
            yield entry
            continue
        before = judged.setdefault(entry.query, {}).setdefault(entry.document, entry)
        if before is not entry and before.score == entry.score:
            yield LeftOut(entry.where, "judgements that repeat an earlier one")
        elif before is not entry:
            twofold.setdefault(entry.query, entry)
    wanted = {document for judgements in judged.values() for document in judgements}
    documents: dict[str, str] = {}
    for entry in _with_ids(_packed(source / "corpus.jsonl")):
        if isinstance(entry, Failed):
            yield entry
            continue
        where, name, row = entry
        if name not in wanted:  # a corpus is larger than what is judged of it
            continue
        try:
            text = titled(row | {"text": row.get("text") or ""})
        except FaultError as error:
            yield failed(where, error.kind, error.message)
            continue
        if documents.setdefault(name, text) != text:
            yield failed(where, "an id twice", f"'_id' {name!r} is another text's already; give each its own")

    def with_documents(query: tuple[str, Row]) -> Row | str:
        name, row = query
        judgements = judged[name].values()
        for judgement in judgements:
            if judgement.document not in documents:
                known = f"document {judgement.document!r} is not in {source / 'corpus.jsonl'}"
                raise FaultError("no such document", known, judgement.where)
        if name in twofold:
            again = f"judges document {twofold[name].document!r} a second time, with another score"
            raise FaultError("judged twice", again, twofold[name].where)
        positives = [documents[one.document] for one in judgements if one.score > 0]
        negatives = [documents[one.document] for one in judgements if one.score <= 0]
        return embedding_row(row.get("text"), positives, negatives, instruction) if positives else _NO_POSITIVE

    seen: set[str] = set()
    for entry in _with_ids(_packed(source / "queries.jsonl")):
        if isinstance(entry, Failed):
            yield entry
            continue
        where, name, row = entry
        if name not in judged:
            continue
        if name in seen:
            yield failed(where, "an id twice", f"'_id' {name!r} is another query's already; give each its own")
            continue
        seen.add(name)
        yield from converted([(where, (name, row))], with_documents)
    for name in judged.keys() - seen:
        for judgement in judged[name].values():
            message = f"query {name!r} is not in {source / 'queries.jsonl'}"
            yield failed(judgement.where, "no such query", message)


def triples(source: Path, *, instruction: str, min_score: float | None) -> Rows:
    """Query, positive and negatives: MS MARCO's triples, sentence-transformers' pairs and triplets, QQP, SNLI and more.

    A .tsv or .csv file has them in columns, named by a header or in this order; a JSONL or JSON file in lists, or under
    keys such as query or anchor, positive or pos, negative or negative_1; a text may be an object with title and text.
    Of rows with labels or scores those are left out whose second text is no positive; see `labels.refused`.

    Args:
      source: The file.
      instruction: That queries get.
      min_score: Rows with a smaller score are left out.

    Raises:
      InputError: The file cannot be read, half of its header is not known, or `min_score` is missing or out of place.
    """

    def convert(row: Any) -> Row | str:
        if isinstance(row, list):
            return _listed(row, instruction, min_score)
        if not isinstance(row, dict):
            found = f"found a JSON {type(row).__name__}; it must be an object or a list of texts"
            raise FaultError("not an object", found)
        return _named(row, instruction, min_score)

    is_table = unpacked_name(source).endswith((".tsv", ".csv"))
    entries: Iterator[Any] = _table_rows(source) if is_table else read_values(source)
    return converted(entries, convert)


def grit(source: Path) -> Rows:
    """GRIT rows as they are, from any file or folder that training reads.

    Raises:
      InputError: There is no such file.
    """
    for path in find_files(str(source)):
        records = open_source(path, skip_bad=True)
        for number in range(len(records)):
            line = records.lines(number, number + 1)[0]
            try:
                records.parse(number, line)
            except RecordError as error:
                yield Failed(error)
            else:
                yield records.where(number), json.loads(line.decode("utf-8-sig"))


_NO_POSITIVE = "queries for which no document is judged relevant"


def _with_ids(path: Path) -> Iterator[tuple[str, str, Row] | Failed]:
    for entry in read_objects(path):
        if isinstance(entry, Failed):
            yield entry
            continue
        where, row = entry
        name = row.get("_id")
        if isinstance(name, str | int) and not isinstance(name, bool):
            yield where, str(name), row
        else:
            yield failed(where, "no id", f"'_id' is {name!r:.60}; it must be a text or a whole number")


def _table_rows(source: Path) -> Iterator[tuple[str, Any] | Failed]:
    for number, entry in enumerate(read_cells(source, _COLUMNS)):
        if not isinstance(entry, Failed) and isinstance(entry[1], list):
            where, cells = entry
            known = [cell.strip().lower() for cell in cells if cell.strip().lower() in _COLUMNS]
            if not number and known:
                raise InputError(
                    f"{where}: looks like a header, of which {known[0]!r} alone is known; name a query "
                    f"({', '.join(_QUERY)}) and a positive ({', '.join(_POSITIVE)})"
                )
            if any("\t" in cell for cell in cells):
                yield failed(where, "tabs in a .csv", "holds tabs; name a file whose columns they part .tsv")
                continue
        yield entry


def _listed(row: list[Any], instruction: str, min_score: float | None) -> Row:
    """A row of texts without names."""
    if len(row) < 2:
        raise FaultError("too few texts", f"has {len(row)} texts; at least a query and a positive are needed")
    numbers = [cell for cell in row if isinstance(cell, str) and _is_number(cell)]
    if len(numbers) == len(row) or (numbers and len(row) > 2):
        raise FaultError("a number for a text", f"{numbers[0]!r} is a score or an id, not a text; name the columns")
    if min_score is not None:
        raise FaultError("no score", "has texts without names, and so no score, which --min-score asks for")
    return embedding_row(row[0], [row[1]], row[2:], instruction)


def _named(row: Row, instruction: str, min_score: float | None) -> Row | str:
    named = {str(key).strip().lower(): value for key, value in row.items()}
    if len(named) < len(row):
        raise FaultError("a key twice", f"{_listing(row)}: two of these keys differ in case or spaces alone")
    if reason := labels.refused(named, min_score):
        return reason
    found = [next((named[key] for key in keys if key in named), None) for keys in (_QUERY, _POSITIVE)]
    if None in found:
        raise FaultError(
            "no query or positive",
            f"has {_listing(sorted(named)[:8])}; a query is under {', '.join(_QUERY)}, a positive under "
            f"{', '.join(_POSITIVE)}",
        )
    negatives: list[Any] = []
    for key, value in named.items():
        if key in _NEGATIVE or key.startswith("negative_"):
            negatives += value if isinstance(value, list) else [value]
    positives = found[1] if isinstance(found[1], list) else [found[1]]
    return embedding_row(found[0], positives, negatives, instruction)


def _listing(keys: Iterable[str]) -> str:
    return ", ".join(map(jsonfile.named, keys))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _packed(path: Path) -> Path:
    """The file, or the one that ends in .gz."""
    return path if path.exists() else path.with_name(f"{path.name}.gz")
