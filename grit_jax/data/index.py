"""Token counts of every text of a file, made once per file and tokenizer."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from grit_jax.data.examples import record_prompts
from grit_jax.data.records import EmbeddingRecord, Stream
from grit_jax.data.sources import JsonlSource
from grit_jax.prompts import tokenize
from grit_jax.tokenizer import Tokenizer

_FORMAT = 1  # raised when what is stored, or how prompts are formatted, changes
_RECORDS_AT_ONCE = 1024


@dataclasses.dataclass(frozen=True)
class FileIndex:
    """What the schedule needs to know of a file.

    Attributes:
      path: The file.
      stream: Its stream.
      text_starts: int64 [records + 1]; texts of record r are `text_starts[r]:text_starts[r + 1]`: query, positives,
        negatives; or one conversation.
      num_positives: int32 [records]; 0 for a conversation.
      lengths: int32 [texts]; tokens of the formatted text, untruncated.
      hashes: int64 [texts]; of the formatted text.
      span_starts: int64 [texts + 1]; spans of text t are `span_starts[t]:span_starts[t + 1]`.
      spans: int32 [spans, 2]; token ranges that are pooled or scored.
    """

    path: Path
    stream: Stream
    text_starts: np.ndarray
    num_positives: np.ndarray
    lengths: np.ndarray
    hashes: np.ndarray
    span_starts: np.ndarray
    spans: np.ndarray

    @property
    def num_records(self) -> int:
        """Records in the file."""
        return len(self.num_positives)


_ARRAYS = tuple(field.name for field in dataclasses.fields(FileIndex) if field.name not in ("path", "stream"))


def num_targets(index: FileIndex, limit: int) -> np.ndarray:
    """int32 [texts]: span tokens left when texts are cut to `limit` tokens.

    A generative token is scored from the one before it, so the first token of a conversation never counts.
    """
    first = 1 if index.stream == "generative" else 0
    spans = np.clip(index.spans, first, limit)
    counts = np.concatenate([[0], np.cumsum(spans[:, 1] - spans[:, 0])])
    return (counts[index.span_starts[1:]] - counts[index.span_starts[:-1]]).astype(np.int32)


def build_index(source: JsonlSource, tokenizer: Tokenizer) -> FileIndex:
    """Counts a file's tokens, or reads the counts of an earlier call with the same file and tokenizer.

    They are kept in `.grit_index/` beside the file, or under the user's cache folder where that is read-only.
    """
    stat = source.path.stat()
    key = (str(source.path.resolve()), stat.st_size, stat.st_mtime_ns, tokenizer.fingerprint, _FORMAT)
    name = f"{source.path.name}-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.npz"
    folders = (source.path.parent / ".grit_index", _user_cache())
    for folder in folders:
        arrays = _load(folder / name)
        if arrays:
            return FileIndex(source.path, source.stream, **arrays)
    arrays = _count(source, tokenizer)
    for folder in folders:
        try:
            _save(folder / name, arrays)
            break
        except OSError:
            continue
    return FileIndex(source.path, source.stream, **arrays)


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grit_jax" / "index"


def _count(source: JsonlSource, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    text_counts, num_positives, lengths, hashes, span_counts, spans = [], [], [], [], [], []
    for start in range(0, len(source), _RECORDS_AT_ONCE):
        records = [source[number] for number in range(start, min(start + _RECORDS_AT_ONCE, len(source)))]
        texts = [record_prompts(record, tokenizer) for record in records]
        text_counts += [len(prompts) for prompts in texts]
        num_positives += [len(record.positives) if isinstance(record, EmbeddingRecord) else 0 for record in records]
        prompts = [prompt for record in texts for prompt in record]
        hashes += [int.from_bytes(hashlib.blake2b(prompt.text.encode(), digest_size=7).digest()) for prompt in prompts]
        for tokenized in tokenize(prompts, tokenizer):
            lengths.append(len(tokenized.tokens))
            span_counts.append(len(tokenized.spans))
            spans.append(tokenized.spans)
    return {
        "text_starts": np.concatenate([[0], np.cumsum(text_counts)]).astype(np.int64),
        "num_positives": np.array(num_positives, np.int32),
        "lengths": np.array(lengths, np.int32),
        "hashes": np.array(hashes, np.int64),
        "span_starts": np.concatenate([[0], np.cumsum(span_counts)]).astype(np.int64),
        "spans": np.concatenate(spans),
    }


def _load(path: Path) -> dict[str, np.ndarray] | None:
    try:
        with path.open("rb") as file, np.load(file) as stored:
            return {name: stored[name] for name in _ARRAYS}
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        return None  # missing or damaged: counted again


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        np.savez(file, allow_pickle=False, **arrays)
    os.replace(file.name, path)
