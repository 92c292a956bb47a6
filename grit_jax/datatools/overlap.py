"""Which texts of evaluation sets occur in training data: whole, or many words in a row."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from grit_jax.data.lines import read_text_lines
from grit_jax.data.qrels import find_qrels, read_qrels
from grit_jax.data.rows import read_objects, sound
from grit_jax.data.sources import files_below, refuse_twins
from grit_jax.errors import InputError

# Scripts that put nothing between words: Thai, Lao, Burmese, Khmer, Kana and Han. Each character stands for a word.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_UNSPACED_WORD = re.compile(f"[{_UNSPACED}]")
_UNSPACED_WEIGHT = 0.5  # words of about two characters
_FEWEST_WORDS = 4  # of texts that are not known to be queries or documents; "yes" is in every training set
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_SUFFIXES = (".jsonl", ".txt", ".tsv")
_ENDINGS = (*_SUFFIXES, *(f"{suffix}.gz" for suffix in _SUFFIXES))


class Match(NamedTuple):
    """A text of an evaluation set that occurs in training data.

    Attributes:
      evaluation: Its file and line.
      training: Where it occurs first.
      whole: Whether the training text is the same, words compared; else they share words in a row.
      document: Whether it is a document that queries are answered from, which training may know.
    """

    evaluation: str
    training: str
    whole: bool
    document: bool


def words_of(text: str) -> list[str]:
    """The words that are compared: no case, no punctuation; single characters of scripts without spaces."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def _num_words(words: Sequence[str]) -> float:
    return sum(_UNSPACED_WEIGHT if _UNSPACED_WORD.match(word) else 1 for word in words)


class EvaluationTexts:
    """The texts of evaluation sets, as hashes.

    Args:
      paths: Files (.jsonl, .txt with a text a line, .tsv; or with .gz), or folders of them. Of a folder in BEIR layout
        the queries of the test split's judgements count (all of them where there are none), and the documents; of
        documents only whole ones are found. Of other files every text of four words or more.
      ngram: Words in a row that count as an occurrence; 0 for whole texts only.

    Attributes:
      counts: Texts by file.

    Raises:
      InputError: There is no such file, or it cannot be read.
    """

    def __init__(self, paths: Sequence[Path], *, ngram: int):
        self._ngram, self.counts, self._places = ngram, dict[str, int](), list[tuple[str, int, bool]]()
        whole: list[int] = []
        parts: list[np.ndarray] = []
        owners: list[np.ndarray] = []
        for path, line, text, in_parts in _texts(paths):
            words = words_of(text)
            hashes = _hashes(words)
            item = len(self._places)
            self._places.append((str(path), line, not in_parts))
            self.counts[str(path)] = self.counts.get(str(path), 0) + 1
            whole.append(_whole(words))
            if ngram and in_parts and len(words) >= ngram:
                parts.append(_rolling(hashes, ngram))
                owners.append(np.full(len(parts[-1]), item))
        self._whole, self._whole_item = _table(np.array(whole, np.int64).view(np.uint64), np.arange(len(whole)))
        none = np.zeros(0, np.uint64)
        self._parts, self._part_item = _table(
            np.concatenate([none, *parts]), np.concatenate([none.astype(np.int64), *owners])
        )
        self._found: dict[int, Match] = {}

    def look_up(self, texts: Sequence[str], numbers: Sequence[int], where: Callable[[int], str]) -> None:
        """Looks for occurrences in training texts.

        Args:
          texts: Of some records.
          numbers: The record of each.
          where: Names the place of a record.
        """
        words = [words_of(text) for text in texts]
        whole = np.array([_whole(of_text) if of_text else 0 for of_text in words], np.int64).view(np.uint64)
        for text, item in _hits(whole, self._whole, self._whole_item):
            if words[text]:
                self._add(item, where(numbers[text]), whole=True)
        owner = np.repeat(np.arange(len(words)), [len(of_text) for of_text in words])
        if not self._ngram or not len(self._parts) or len(owner) < self._ngram:
            return
        parts = _rolling(_hashes([word for of_text in words for word in of_text]), self._ngram)
        inside = np.flatnonzero(owner[: len(parts)] == owner[self._ngram - 1 :])  # not over the end of a text
        for place, item in _hits(parts[inside], self._parts, self._part_item):
            self._add(item, where(numbers[owner[inside[place]]]), whole=False)

    def _add(self, item: int, where: str, *, whole: bool) -> None:
        before = self._found.get(item)
        if before is None or (whole and not before.whole):
            path, line, document = self._places[item]
            self._found[item] = Match(f"{path}:{line}", where, whole, document)

    def matches(self) -> list[Match]:
        """What was found, in the order of the evaluation sets."""
        return [self._found[item] for item in sorted(self._found)]


def _whole(words: list[str]) -> int:
    return hash((" ".join(words), "whole"))


def _hashes(words: list[str]) -> np.ndarray:
    return np.array([hash(word) for word in words], np.int64).view(np.uint64)


def _rolling(hashes: np.ndarray, length: int) -> np.ndarray:
    """uint64 [words - length + 1]: a hash of each run of `length` words."""
    count = len(hashes) - length + 1
    result = np.zeros(count, np.uint64)
    for place in range(length):
        result = result * _FACTOR + hashes[place : place + count]
        result ^= result >> np.uint64(29)
    return result


def _table(keys: np.ndarray, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(keys, kind="stable")
    return keys[order], items[order]


def _hits(keys: np.ndarray, table: np.ndarray, items: np.ndarray) -> Iterator[tuple[int, int]]:
    """Places of keys that are in the table, with each item that has the key."""
    first, last = np.searchsorted(table, keys, side="left"), np.searchsorted(table, keys, side="right")
    for place in np.flatnonzero(first < last).tolist():
        for item in items[first[place] : last[place]].tolist():
            yield place, item


def _texts(paths: Sequence[Path]) -> Iterator[tuple[Path, int, str, bool]]:
    """File, line and text, and whether parts of it count."""
    for path in paths:
        if path.is_dir():
            yield from _folder_texts(path)
        elif not path.exists():
            raise InputError(f"--against {path}: no such file or folder")
        elif not path.name.removesuffix(".gz").endswith(_SUFFIXES):
            raise InputError(f"--against {path}: must end in {', '.join(_SUFFIXES)}, or those with .gz")
        else:
            yield from _file_texts(path)


def _folder_texts(folder: Path) -> Iterator[tuple[Path, int, str, bool]]:
    found = sorted(files_below(epath.Path(folder), _ENDINGS))
    refuse_twins(found, _ENDINGS)
    if not found:
        raise InputError(f"--against {folder}: no {', '.join(_SUFFIXES)} file in this folder")
    paths = list(map(Path, found))
    beir_folders = {path.parent for path in paths if _first(path.parent, "queries.jsonl")}
    for beir_folder in sorted(beir_folders):
        yield from _beir_texts(beir_folder)
    for path in paths:
        inside = path.parent in beir_folders or (path.parent.name == "qrels" and path.parent.parent in beir_folders)
        if not inside:
            yield from _file_texts(path)


def _first(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.exists()), None)


def _beir_texts(folder: Path) -> Iterator[tuple[Path, int, str, bool]]:
    judged: set[str] | None = None
    if qrels := find_qrels(folder, "test"):
        judged = {judgement.query for judgement in sound(read_qrels(qrels))}
    names = set()
    for name, keys in (("queries.jsonl", ("text",)), ("corpus.jsonl", ("title", "text"))):
        path = _first(folder, name)
        for line, row in _objects(path) if path else ():
            if name == "queries.jsonl":
                names.add(str(row.get("_id")))
                if judged is not None and str(row.get("_id")) not in judged:
                    continue
            text = " ".join(str(row.get(key) or "") for key in keys).strip()
            if path and words_of(text):
                yield path, line, text, name == "queries.jsonl"
        if judged is not None and name == "queries.jsonl" and not judged & names:
            raise InputError(f"--against {qrels}: judges no query of {path}; correct its ids, or remove it")


def _file_texts(path: Path) -> Iterator[tuple[Path, int, str, bool]]:
    if path.name.removesuffix(".gz").endswith(".jsonl"):
        rows: Any = ((line, list(_strings(row))) for line, row in _objects(path))
    else:
        rows = ((line, text.split("\t")) for line, text in read_text_lines(path))
    for line, texts in rows:
        for text in texts:
            if _num_words(words_of(text)) >= _FEWEST_WORDS:
                yield path, line, text, True


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for where, row in sound(read_objects(path)):
        yield int(where.rpartition(":")[2]), row


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)
