"""Finds texts of evaluation sets in training data: whole, or a number of consecutive words."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from grit_jax.data.qrels import find_qrels, read_qrels
from grit_jax.data.sources import files_below, packed_or_not, refuse_twins
from grit_jax.data.text_files import read_objects, read_text_lines, sound, unpacked_name
from grit_jax.errors import InputError
from grit_jax.retrieval.documents import titled

# Scripts without spaces between words: Thai, Lao, Burmese, Khmer, Kana and Han. Each character counts as a word.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_UNSPACED_WORD = re.compile(f"[{_UNSPACED}]")
_UNSPACED_WEIGHT = 0.5  # words of about two characters
_FEWEST_WORDS = 4  # of texts not known to be queries or documents; "yes" is in every training set
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_SUFFIXES = (".jsonl", ".txt", ".tsv")
_ENDINGS = (*_SUFFIXES, *(f"{suffix}.gz" for suffix in _SUFFIXES))


class Match(NamedTuple):
    """A text of an evaluation set that occurs in training data.

    Attributes:
      evaluation: Its file and line.
      training: File and line of its first occurrence.
      whole: Whether the training text has the same words; otherwise they share consecutive words.
      document: Whether it is a corpus document, which training data may contain.
    """

    evaluation: str
    training: str
    whole: bool
    document: bool


def words_of(text: str) -> list[str]:
    """The words to compare, without case and punctuation; single characters of scripts without spaces."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def _num_words(words: Sequence[str]) -> float:
    return sum(_UNSPACED_WEIGHT if _UNSPACED_WORD.match(word) else 1 for word in words)


class EvaluationTexts:
    """The texts of evaluation sets, as hashes.

    Args:
      paths: Files (.jsonl, .txt with a text per line, .tsv; or with .gz), or folders of them. A folder in BEIR layout
        gives its documents, which are found only whole, and the queries of the test split's judgements, or all queries
        if there are none. Other files give every text of four words or more.
      ngram: Consecutive words that count as an occurrence; 0 for whole texts only.

    Attributes:
      counts: Texts by file.

    Raises:
      InputError: There is no such file, or it cannot be read.
    """

    def __init__(self, paths: Sequence[Path], *, ngram: int):
        self._ngram, self.counts, self._texts = ngram, Counter[str](), list[tuple[str, bool]]()
        whole: list[int] = []
        parts, owners = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
        for where, text, in_parts in _texts(paths):
            words = words_of(text)
            if ngram and in_parts and len(words) >= ngram:
                parts.append(_rolling(_hashes(words), ngram))
                owners.append(np.full(len(parts[-1]), len(self._texts)))
            self._texts.append((where, not in_parts))
            self.counts[where.rpartition(":")[0]] += 1
            whole.append(_whole(words))
        self._whole = _table(np.array(whole, np.int64).view(np.uint64), np.arange(len(whole)))
        self._parts = _table(np.concatenate(parts), np.concatenate(owners))
        self._found: dict[int, Match] = {}

    def look_up(self, texts: Sequence[str], owners: Sequence[int], where: Callable[[int], str]) -> None:
        """Looks for occurrences in training texts.

        Args:
          texts: The texts of some records.
          owners: The index of each text's record.
          where: Gives file and line of a record.
        """
        words = [words_of(text) for text in texts]
        whole = np.array([_whole(of_text) if of_text else 0 for of_text in words], np.int64).view(np.uint64)
        for text, found in _hits(whole, *self._whole):
            if words[text]:
                self._add(found, where(owners[text]), whole=True)
        text_of_word = np.repeat(np.arange(len(words)), [len(of_text) for of_text in words])
        if not self._ngram or not len(self._parts[0]) or len(text_of_word) < self._ngram:
            return
        parts = _rolling(_hashes([word for of_text in words for word in of_text]), self._ngram)
        # Not across the end of a text.
        inside = np.flatnonzero(text_of_word[: len(parts)] == text_of_word[self._ngram - 1 :])
        for part, found in _hits(parts[inside], *self._parts):
            self._add(found, where(owners[text_of_word[inside[part]]]), whole=False)

    def _add(self, found: int, where: str, *, whole: bool) -> None:
        before = self._found.get(found)
        if before is None or (whole and not before.whole):
            evaluation, document = self._texts[found]
            self._found[found] = Match(evaluation, where, whole, document)

    def matches(self) -> list[Match]:
        """The occurrences, in the order of the evaluation sets."""
        return [self._found[number] for number in sorted(self._found)]


def _whole(words: list[str]) -> int:
    return hash((" ".join(words), "whole"))


def _hashes(words: list[str]) -> np.ndarray:
    return np.array([hash(word) for word in words], np.int64).view(np.uint64)


def _rolling(hashes: np.ndarray, length: int) -> np.ndarray:
    """uint64 [words - length + 1]: a hash of each run of `length` words."""
    count = len(hashes) - length + 1
    result = np.zeros(count, np.uint64)
    for start in range(length):
        result = result * _FACTOR + hashes[start : start + count]
        result ^= result >> np.uint64(29)
    return result


def _table(keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(keys, kind="stable")
    return keys[order], values[order]


def _hits(keys: np.ndarray, table: np.ndarray, values: np.ndarray) -> Iterator[tuple[int, int]]:
    """Indices of keys that are in a sorted table, with each value that has the key."""
    first, last = np.searchsorted(table, keys, side="left"), np.searchsorted(table, keys, side="right")
    for index in np.flatnonzero(first < last).tolist():
        for value in values[first[index] : last[index]].tolist():
            yield index, value


def _texts(paths: Sequence[Path]) -> Iterator[tuple[str, str, bool]]:
    """File and line, text, and whether parts of it count."""
    for path in paths:
        if path.is_dir():
            yield from _folder_texts(path)
        elif not path.exists():
            raise InputError(f"--against {path}: no such file or folder")
        elif not path.name.removesuffix(".gz").endswith(_SUFFIXES):
            raise InputError(f"--against {path}: must end in {', '.join(_SUFFIXES)}, or those with .gz")
        else:
            yield from _file_texts(path)


def _folder_texts(folder: Path) -> Iterator[tuple[str, str, bool]]:
    found = sorted(files_below(epath.Path(folder), _ENDINGS))
    refuse_twins(found, _ENDINGS)
    if not found:
        raise InputError(f"--against {folder}: no {', '.join(_SUFFIXES)} file in this folder")
    paths = list(map(Path, found))
    beir_folders = {path.parent for path in paths if unpacked_name(path) == "queries.jsonl"}
    for beir_folder in sorted(beir_folders):
        yield from _beir_texts(beir_folder)
    for path in paths:
        inside = path.parent in beir_folders or (path.parent.name == "qrels" and path.parent.parent in beir_folders)
        if not inside:
            yield from _file_texts(path)


def _beir_texts(folder: Path) -> Iterator[tuple[str, str, bool]]:
    queries, corpus = (packed_or_not(folder / name) for name in ("queries.jsonl", "corpus.jsonl"))
    qrels = find_qrels(folder, "test")
    judged = {judgement.query for _, judgement in sound(read_qrels(qrels))} if qrels else None
    found = False
    for where, row in sound(read_objects(queries)):
        if judged is None or str(row.get("_id")) in judged:
            found = True
            text = str(row.get("text") or "").strip()
            if words_of(text):
                yield where, text, True
    if judged is not None and not found:
        raise InputError(f"--against {qrels}: judges no query of {queries}; correct its ids, or remove it")
    for where, row in sound(read_objects(corpus)) if corpus.exists() else ():
        text = titled(row.get("title"), row.get("text") or "")
        if words_of(text):
            yield where, text, False


def _file_texts(path: Path) -> Iterator[tuple[str, str, bool]]:
    if unpacked_name(path).endswith(".jsonl"):
        rows = ((where, _strings(row)) for where, row in sound(read_objects(path)))
    else:
        rows = ((where, text.split("\t")) for where, text in sound(read_text_lines(path)))
    for where, texts in rows:
        for text in texts:
            if _num_words(words_of(text)) >= _FEWEST_WORDS:
                yield where, text, True


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)
