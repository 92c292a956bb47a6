"""Foreign data sets as GRIT rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from grit_jax.config import InputError
from grit_jax.data.records import RecordError
from grit_jax.data.rows import Failed, Row, read_cells, read_objects, read_values
from grit_jax.data.sources import find_files, open_source

Rows = Iterator[tuple[str, Row] | Failed]

_QUERY = ("query", "anchor", "question", "sentence1", "premise")
_POSITIVE = ("positive", "pos", "positives", "positive_passages", "answer", "response", "passage", "sentence2")
_NEGATIVE = ("negative", "neg", "negatives", "negative_passages", "hard_negative", "sentence3")
_SCORE = ("score", "label", "similarity_score", "similarity")
_COLUMNS = frozenset((*_QUERY, *_POSITIVE, *_NEGATIVE, *_SCORE, *(f"negative_{i}" for i in range(1, 65))))


class _FaultError(Exception):
    """What is wrong with a row: kind and message."""


def beir(source: Path, *, instruction: str, split: str) -> Rows:
    """Queries of a BEIR folder with the documents that `qrels/<split>.tsv` judges: over 0 positive, 0 negative.

    Raises:
      InputError: A file is missing.
    """
    qrels = source / "qrels" / f"{split}.tsv"
    judged: dict[str, list[tuple[str, str, float]]] = {}
    wanted: set[str] = set()
    for entry in read_cells(qrels, frozenset({"query-id", "corpus-id", "score"})):
        if isinstance(entry, Failed):
            yield entry
            continue
        where, cells = entry
        values = [cells[name] for name in ("query-id", "corpus-id", "score")] if isinstance(cells, dict) else cells
        try:
            query, document, score = values[0], values[-2], float(values[-1])
        except (ValueError, IndexError):
            yield _failed(where, "no judgement", f"holds {values}; a judgement is query-id, corpus-id and score")
            continue
        judged.setdefault(query, []).append((where, document, score))
        wanted.add(document)
    documents = {}
    for entry in read_objects(_packed(source / "corpus.jsonl")):
        if isinstance(entry, Failed):
            yield entry
        elif str(entry[1].get("_id")) in wanted:  # a corpus is larger than what is judged of it
            documents[str(entry[1]["_id"])] = f"{entry[1].get('title') or ''} {entry[1].get('text') or ''}".strip()
    for entry in read_objects(_packed(source / "queries.jsonl")):
        if isinstance(entry, Failed):
            yield entry
            continue
        where, row = entry
        judgements = judged.get(str(row.get("_id")), [])
        missing = [(line, name) for line, name, _ in judgements if name not in documents]
        if missing:
            line, name = missing[0]
            yield _failed(line, "no such document", f"document {name!r} is not in {source / 'corpus.jsonl'}")
        elif any(score > 0 for _, _, score in judgements):
            positives = [documents[name] for _, name, score in judgements if score > 0]
            negatives = [documents[name] for _, name, score in judgements if score <= 0]
            yield where, _embedding_row(row.get("text"), positives, negatives, instruction)


def triples(source: Path, *, instruction: str, min_score: float | None) -> Rows:
    """Query, positive and negatives: MS MARCO's triples and sentence-transformers' pairs and triplets.

    A .tsv or .csv file has them in columns, named by a header or in this order; a JSONL or JSON file in lists, or under
    keys such as query or anchor, positive or pos, negative or negative_1; a text may be an object with title and text.

    Args:
      source: The file.
      instruction: That queries get.
      min_score: Rows with a smaller score or label are left out, as their second text is no positive.
    """
    name = source.name.removesuffix(".gz")
    if name.endswith((".tsv", ".csv")):
        entries: Iterator[Any] = read_cells(source, _COLUMNS)
    else:
        entries = read_values(source)
    for entry in entries:
        if isinstance(entry, Failed):
            yield entry
            continue
        where, row = entry
        try:
            row = _triple(row, instruction, min_score)
        except _FaultError as error:
            yield _failed(where, *error.args)
        else:
            if row:
                yield where, row


def alpaca(source: Path) -> Rows:
    """Rows with instruction, input (which may be empty) and output."""

    def turns(row: Row) -> list[str]:
        task, more, answer = (row.get(key) or "" for key in ("instruction", "input", "output"))
        if not all(isinstance(text, str) for text in (task, more, answer)) or not task or not answer:
            raise _FaultError("no instruction or output", '"instruction" and "output" must be texts that are not empty')
        return [f"{task}\n{more}" if more else task, answer]

    return _conversations(source, turns)


def sharegpt(source: Path) -> Rows:
    """Rows with `conversations`: a list of `{"from": "human" | "gpt" | "system", "value": text}`."""
    roles = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant"}

    def turns(row: Row) -> list[str]:
        parts = row.get("conversations")
        if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
            raise _FaultError("no conversations", '"conversations" must be a list of objects with "from" and "value"')
        return _turns([(roles.get(str(part.get("from")), str(part.get("from"))), part.get("value")) for part in parts])

    return _conversations(source, turns)


def openai(source: Path) -> Rows:
    """Rows with `messages`: a list of `{"role": "user" | "assistant" | "system", "content": text or parts}`."""

    def content(value: Any) -> Any:
        if isinstance(value, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
            return "".join(str(part.get("text", "")) for part in value)
        return value

    def turns(row: Row) -> list[str]:
        parts = row.get("messages")
        if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
            raise _FaultError("no messages", '"messages" must be a list of objects with "role" and "content"')
        return _turns([(str(part.get("role")), content(part.get("content"))) for part in parts])

    return _conversations(source, turns)


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


def _conversations(source: Path, turns: Callable[[Row], list[str]]) -> Rows:
    for entry in read_objects(source):
        if isinstance(entry, Failed):
            yield entry
            continue
        where, row = entry
        try:
            yield where, {"text": turns(row)}
        except _FaultError as error:
            yield _failed(where, *error.args)


def _turns(messages: list[tuple[str, Any]]) -> list[str]:
    """User and assistant texts in turn; a system message stands before the first user's."""
    system = ""
    if messages and messages[0][0] == "system":
        if not isinstance(messages[0][1], str):
            raise _FaultError("no text", "the system message holds no text")
        system, messages = messages[0][1].strip(), messages[1:]
    roles = [role for role, _ in messages]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        shown = ", ".join(roles[:8]) + (", ..." if len(roles) > 8 else "")
        raise _FaultError(
            "roles not in turn", f"the roles are {shown or 'none'}; they must be user and assistant in turn, user first"
        )
    texts = []
    for number, (_, text) in enumerate(messages, start=1):
        if not isinstance(text, str) or not text.strip():
            raise _FaultError("no text", f"message {number} holds no text")
        texts.append(text)
    return [f"{system}\n\n{texts[0]}" if system else texts[0], *texts[1:]]


def _triple(row: Any, instruction: str, min_score: float | None) -> Row | None:
    if isinstance(row, list):
        if len(row) < 2:
            raise _FaultError("too few texts", f"has {len(row)} texts; at least a query and a positive are needed")
        return _embedding_row(row[0], [row[1]], row[2:], instruction)
    if not isinstance(row, dict):
        raise _FaultError(
            "not an object", f"found a JSON {type(row).__name__}; it must be an object or a list of texts"
        )
    row = {str(key).strip().lower(): value for key, value in row.items()}
    score = next((row[key] for key in _SCORE if key in row), None)
    if score is not None:
        try:
            value = float(score)
        except (TypeError, ValueError) as error:
            raise _FaultError("no score", f"score {score!r} is no number") from error
        if min_score is None:
            raise InputError(
                "the rows have scores, and a low one says that the second text is no positive; "
                "give --min-score to say from which on it is"
            )
        if value < min_score:
            return None
    found = [next((row[key] for key in keys if key in row), None) for keys in (_QUERY, _POSITIVE)]
    if None in found:
        raise _FaultError(
            "no query or positive",
            f"has {', '.join(sorted(row)[:8])}; a query is under {', '.join(_QUERY)}, a positive under "
            f"{', '.join(_POSITIVE)}",
        )
    negatives: list[Any] = []
    for key, value in row.items():
        if key in _NEGATIVE or key.startswith("negative_"):
            negatives += value if isinstance(value, list) else [value]
    positives = found[1] if isinstance(found[1], list) else [found[1]]
    return _embedding_row(found[0], positives, negatives, instruction)


def _embedding_row(query: Any, positives: list[Any], negatives: list[Any], instruction: str) -> Row:
    def passage(value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("text"), str):
            return ["", f"{value.get('title') or ''} {value['text']}".strip()]
        return ["", value]

    return {
        "query": [instruction, query],
        "pos": [passage(value) for value in positives],
        "neg": [passage(value) for value in negatives if value not in ("", None)],
    }


def _failed(where: str, kind: str, message: str) -> Failed:
    return Failed(RecordError(where, kind, message))


def _packed(path: Path) -> Path:
    """The file, or the one that ends in .gz."""
    return path if path.exists() else path.with_name(f"{path.name}.gz")
