"""Tokenizes ranges of records, in this process or in many, and writes each as a shard of a token index."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple, TypeVar

import numpy as np
from etils import epath

from grit_jax import files
from grit_jax.data import derived
from grit_jax.data.records import BadRecords, Record, RecordError, add_bad
from grit_jax.data.sources import RECORDS_AT_ONCE, Source, open_source
from grit_jax.data.streams.stream import Stream
from grit_jax.errors import InputError
from grit_jax.text.prompts import Prompt, TokenizedPrompt, tokenize
from grit_jax.text.tokenizer import Tokenizer

T = TypeVar("T")

SHARD = 8192  # records tokenized and written at a time
_TWO_PROCESSES_FROM = 4 * SHARD  # records; starting processes for fewer takes longer than tokenizing them
_PROGRESS_SECONDS = 30


def tokenize_records(
    records: Sequence[Record], prompts: Callable[[Any, Tokenizer], list[Prompt]], tokenizer: Tokenizer
) -> list[list[TokenizedPrompt]]:
    """The tokenized texts of each record, untruncated; `prompts` is that of a stream."""
    texts = [prompts(record, tokenizer) for record in records]
    tokenized = iter(tokenize([prompt for record in texts for prompt in record], tokenizer))
    return [[next(tokenized) for _ in record] for record in texts]


class Reading(NamedTuple):
    """A file, and the stream that reads it."""

    source: Source
    stream: Stream


class Shard(NamedTuple):
    """A range of records that is tokenized and written at once.

    Attributes:
      reading: Index of its `Reading`.
      start: First record.
      stop: Last record, exclusive.
      path: The file to write.
      tokens: Whether to store tokens, or lengths alone.
    """

    reading: int
    start: int
    stop: int
    path: epath.Path
    tokens: bool


class Columns(NamedTuple):
    """The content of a range of records; texts, spans, tokens and endings are as in `TokenIndex`.

    Attributes:
      lines: int64 [records]; line or entry of each well-formed record.
      text_counts: int32 [records].
      num_positives: int32 [records].
      lengths: int32 [texts].
      hashes: int64 [texts].
      span_counts: int32 [texts].
      spans: int32 [spans, 2].
      tokens: uint8, uint16 or uint32 [tokens]; empty if only lengths are stored.
      endings: uint8 [texts].
      bad: uint8 [bytes]; the malformed records' `BadRecords` as JSON.
    """

    lines: np.ndarray
    text_counts: np.ndarray
    num_positives: np.ndarray
    lengths: np.ndarray
    hashes: np.ndarray
    span_counts: np.ndarray
    spans: np.ndarray
    tokens: np.ndarray
    endings: np.ndarray
    bad: np.ndarray

    def bad_records(self) -> tuple[BadRecords, ...]:
        """The malformed records."""
        return BadRecords.from_json(json.loads(self.bad.tobytes() or "[]"))


_DTYPES = {
    "lines": np.int64, "text_counts": np.int32, "num_positives": np.int32, "lengths": np.int32, "hashes": np.int64,
    "span_counts": np.int32, "endings": np.uint8,
}  # fmt: skip


def token_type(tokenizer: Tokenizer) -> np.dtype:
    """The smallest unsigned type that holds a tokenizer's ids."""
    return np.min_scalar_type(tokenizer.vocab_size - 1)


def read_shard(path: epath.Path) -> Columns | None:
    """The content of a shard; None if it is missing or damaged."""
    content = files.read_bytes(path)
    if content is None:
        return None
    try:
        with np.load(io.BytesIO(content)) as stored:
            return Columns(*(stored[name] for name in Columns._fields))
    except Exception:  # numpy and zipfile (which compares checksums) raise many types
        return None


def make_shards(shards: Sequence[Shard], readings: Sequence[Reading], tokenizer: Tokenizer, *, skip_bad: bool) -> None:
    """Makes and writes the shards, on all cores if they are many.

    Hosts that share a folder may do this at the same time: each takes the shards in its own random order and skips
    those already written, so they divide the work without a lock.

    Raises:
      InputError: A record is malformed and `skip_bad` is false, or a shard cannot be written.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_records = sum(shard.stop - shard.start for shard in shards)
    if num_records < _TWO_PROCESSES_FROM or cores == 1:
        for shard in shards:
            refuse_bad(_make_shard(shard, readings, tokenizer), skip_bad)
        return
    order = list(shards)
    random.shuffle(order)
    _make_in_processes(order, readings, tokenizer, processes=min(cores, len(shards)), skip_bad=skip_bad)


def tokenize_range(reading: Reading, start: int, stop: int, tokenizer: Tokenizer, *, tokens: bool = True) -> Columns:
    """Tokenizes records `start` to `stop`, exclusive; malformed ones are left out and listed in `bad`."""
    (source, stream), kept = reading, token_type(tokenizer)
    columns: dict[str, list[Any]] = {name: [] for name in Columns._fields}
    bad: dict[str, BadRecords] = {}
    for begin in range(start, stop, RECORDS_AT_ONCE):
        records, lines = [], []
        for index, record in enumerate(source.records(begin, min(begin + RECORDS_AT_ONCE, stop)), begin):
            if isinstance(record, RecordError):
                add_bad(bad, BadRecords.of(record))
            else:
                records.append(record)
                lines.append(source.line_number(index))
        texts = [stream.prompts(record, tokenizer) for record in records]
        tokenized = _tokenized(texts, lines, source, tokenizer)
        columns["lines"] += lines
        columns["text_counts"] += [len(prompts) for prompts in texts]
        columns["num_positives"] += [stream.num_positives(record) for record in records]
        columns["hashes"] += [prompt.hash for record in texts for prompt in record]
        columns["lengths"] += [len(text.tokens) for text in tokenized]
        columns["span_counts"] += [len(text.spans) for text in tokenized]
        columns["spans"] += [text.spans for text in tokenized]
        columns["endings"] += [text.ending for text in tokenized]
        columns["tokens"] += [text.tokens.astype(kept) for text in tokenized if tokens]
    arrays = {name: np.array(columns[name], dtype) for name, dtype in _DTYPES.items()}
    return Columns(
        **arrays,
        spans=np.concatenate([np.zeros((0, 2), np.int32), *columns["spans"]]),
        tokens=np.concatenate([np.zeros(0, kept), *columns["tokens"]]),
        bad=np.frombuffer(json.dumps(list(bad.values())).encode(), np.uint8),
    )


def _tokenized(
    texts: Sequence[Sequence[Prompt]], lines: Sequence[int], source: Source, tokenizer: Tokenizer
) -> list[TokenizedPrompt]:
    """Tokenizes the texts of some records; an error names the line."""
    try:
        return tokenize([prompt for record in texts for prompt in record], tokenizer)
    except InputError:
        for line, record in zip(lines, texts, strict=True):
            try:
                tokenize(record, tokenizer)
            except InputError as error:
                raise InputError(f"{source.path}:{line}: {error}") from error
        raise


def _make_shard(shard: Shard, readings: Sequence[Reading], tokenizer: Tokenizer) -> tuple[BadRecords, ...]:
    """Makes a shard unless it is already there, and returns its malformed records."""
    columns = read_shard(shard.path)
    if columns is None:
        reading = readings[shard.reading]
        columns = tokenize_range(reading, shard.start, shard.stop, tokenizer, tokens=shard.tokens)
        reading.source.refuse_changed()  # or the shard would mix two versions
        content = io.BytesIO()
        np.savez(content, allow_pickle=False, **columns._asdict())
        try:
            files.write_bytes(shard.path, content.getvalue())
        except FileNotFoundError:
            pass  # another host has merged all shards and removed their folder
        except OSError as error:
            raise InputError(f"{shard.path}: cannot be written ({error}); {derived.MAKE_ROOM}") from error
    return columns.bad_records()


def refuse_bad(bad: Sequence[BadRecords], skip_bad: bool) -> None:
    """Checks that malformed records, if any, are to be skipped.

    Raises:
      InputError: They are not.
    """
    if bad and not skip_bad:
        raise InputError(f"{bad[0].examples[0]} (data.skip_bad=true leaves such records out and counts them)")


def _make_in_processes(
    shards: Sequence[Shard], readings: Sequence[Reading], tokenizer: Tokenizer, *, processes: int, skip_bad: bool
) -> None:
    opened = [
        (os.fspath(source.path), source.record_types, source.record_type, source.version, stream)
        for source, stream in readings
    ]
    setup = pickle.dumps((tokenizer.files(), opened))
    # Not multiprocessing: its processes run the user's main module again, and forking is not safe once JAX has threads.
    command = [sys.executable, "-c", "from grit_jax.data.tokenizing import serve; serve()"]
    settings = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TOKENIZERS_PARALLELISM": "false"}
    started: list[subprocess.Popen[bytes]] = []
    own = threading.local()  # each thread has its own process

    def make(shard: Shard) -> tuple[BadRecords, ...]:
        request = pickle.dumps(shard)
        if not hasattr(own, "process"):
            own.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | settings
            )
            started.append(own.process)
            request = setup + request
        try:
            own.process.stdin.write(request)
            own.process.stdin.flush()
            reply = pickle.load(own.process.stdout)
        except (OSError, EOFError) as error:
            code = own.process.wait()
            memory = " (killed: is there memory for all of them?)" if code == -signal.SIGKILL else ""
            raise RuntimeError(f"a process that tokenizes ended with exit code {code}{memory}") from error
        if isinstance(reply, BaseException):
            raise reply
        return reply

    num_records = sum(shard.stop - shard.start for shard in shards)
    pool = ThreadPoolExecutor(processes)
    try:
        made = as_completed([pool.submit(make, shard) for shard in shards])
        for future in _with_progress(made, len(shards), f"tokenizing {num_records:,} records, {processes} processes"):
            refuse_bad(future.result(), skip_bad)
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in started:
            process.kill()
        raise
    finally:
        pool.shutdown()
        for process in started:
            with contextlib.suppress(OSError), process:  # closing its pipes ends it
                pass


def _with_progress(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """The items; now and then prints progress to stderr."""
    started = printed = time.monotonic()
    for number, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - printed >= _PROGRESS_SECONDS:
            printed = now
            left = (now - started) / number * (total - number)
            print(f"{what}: {number / total:.0%}, {left / 60:.0f} min left", file=sys.stderr, flush=True)


def serve() -> None:
    """Makes the shards that arrive on stdin until it is closed; replies on stdout."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one closes stdin
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr
    tokenizer_files, opened = pickle.load(requests)
    tokenizer = Tokenizer.from_files(tokenizer_files)
    readings: list[Reading] = []
    while True:
        try:
            shard = pickle.load(requests)
        except EOFError:
            return
        try:
            readings = readings or [
                Reading(open_source(path, record_types=types, record_type=record_type, version=version), stream)
                for path, types, record_type, version, stream in opened
            ]
            reply: Any = _make_shard(shard, readings, tokenizer)
        except (InputError, OSError, files.UnreachableError) as error:
            reply = error
        try:
            pickle.dump(reply, replies)
            replies.flush()
        except BrokenPipeError:
            return
