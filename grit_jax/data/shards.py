"""Ranges of records tokenized, in this process or in many, and written as they are finished."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from grit_jax import files
from grit_jax.data import cache
from grit_jax.data.examples import text_hash
from grit_jax.data.index import BadRecords, add_bad
from grit_jax.data.records import RecordError
from grit_jax.data.sources import Source, open_source
from grit_jax.data.streams.base import Stream
from grit_jax.errors import InputError
from grit_jax.text.prompts import Prompt, TokenizedPrompt, tokenize
from grit_jax.text.tokenizer import Tokenizer

SHARD = 8192  # records tokenized and written at a time
_RECORDS_AT_ONCE = 1024
_TWO_PROCESSES_FROM = 4 * SHARD  # records; starting processes for fewer takes longer than tokenizing them
_REPORT_EVERY = 30  # seconds


class Reading(NamedTuple):
    """A file that is tokenized, and the stream whose texts are made of it."""

    source: Source
    stream: Stream


class Shard(NamedTuple):
    """A range of records that is tokenized at once, and where what is found is written.

    Attributes:
      reading: Number of its `Reading`.
      start: First record.
      stop: Last record, exclusive.
      path: Where it is written.
      tokens: Whether tokens are kept, or lengths alone.
    """

    reading: int
    start: int
    stop: int
    path: epath.Path
    tokens: bool


class Columns(NamedTuple):
    """What is found in a range of records; texts, spans, tokens and endings are as in `FileIndex`.

    Attributes:
      lines: int64 [records]; of the well-formed records.
      text_counts: int32 [records].
      num_positives: int32 [records].
      lengths: int32 [texts].
      hashes: int64 [texts].
      span_counts: int32 [texts].
      spans: int32 [spans, 2].
      tokens: uint8, uint16 or uint32 [tokens]; none where lengths alone are kept.
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

    def bad_records(self) -> list[BadRecords]:
        """The malformed records."""
        return [
            BadRecords(kind, count, tuple(examples)) for kind, count, examples in json.loads(self.bad.tobytes() or "[]")
        ]


def token_type(tokenizer: Tokenizer) -> np.dtype:
    """The smallest type of unsigned integers that holds a tokenizer's ids."""
    return np.min_scalar_type(tokenizer.vocab_size - 1)


def read_shard(path: epath.Path) -> Columns | None:
    """What was found in a shard; None where it is missing or damaged."""
    content = files.read_bytes(path)
    if content is None:
        return None
    try:
        with np.load(io.BytesIO(content)) as stored:
            return Columns(*(stored[name] for name in Columns._fields))
    except Exception:  # numpy and zipfile, which compares checksums, raise many kinds
        return None


def make_shards(shards: Sequence[Shard], readings: Sequence[Reading], tokenizer: Tokenizer, *, skip_bad: bool) -> None:
    """Makes and writes the shards, with all cores where they are many.

    Hosts that share a folder may do this at the same time: each takes the shards in an order of its own and leaves out
    what another has written by then, so they divide the work and need no lock.

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
    """Tokenizes records `start` to `stop`, exclusive; malformed ones are left out and named in `bad`."""
    columns: dict[str, list[Any]] = {name: [] for name in Columns._fields}
    source, stream = reading
    bad: dict[str, BadRecords] = {}
    kept = token_type(tokenizer)
    for begin in range(start, stop, _RECORDS_AT_ONCE):
        records, lines = [], []
        for number, line in enumerate(source.lines(begin, min(begin + _RECORDS_AT_ONCE, stop)), begin):
            try:
                records.append(source.parse(number, line))
                lines.append(source.line_number(number))
            except RecordError as error:
                add_bad(bad, [BadRecords(error.kind, 1, (str(error),))])
        texts = [stream.prompts(record, tokenizer) for record in records]
        columns["lines"] += lines
        columns["text_counts"] += [len(prompts) for prompts in texts]
        columns["num_positives"] += [stream.num_positives(record) for record in records]
        columns["hashes"] += [text_hash(prompt) for record in texts for prompt in record]
        tokenized = _tokenized(texts, lines, source, tokenizer)
        columns["lengths"] += [len(text.tokens) for text in tokenized]
        columns["span_counts"] += [len(text.spans) for text in tokenized]
        columns["spans"] += [text.spans for text in tokenized]
        columns["endings"] += [text.ending for text in tokenized]
        if tokens and tokenized:
            columns["tokens"].append(np.concatenate([text.tokens for text in tokenized]).astype(kept))
    return Columns(
        lines=np.array(columns["lines"], np.int64),
        text_counts=np.array(columns["text_counts"], np.int32),
        num_positives=np.array(columns["num_positives"], np.int32),
        lengths=np.array(columns["lengths"], np.int32),
        hashes=np.array(columns["hashes"], np.int64),
        span_counts=np.array(columns["span_counts"], np.int32),
        spans=np.concatenate([np.zeros((0, 2), np.int32), *columns["spans"]]),
        tokens=np.concatenate([np.zeros(0, kept), *columns["tokens"]]),
        endings=np.array(columns["endings"], np.uint8),
        bad=np.frombuffer(json.dumps(list(bad.values())).encode(), np.uint8),
    )


def _tokenized(
    texts: Sequence[Sequence[Prompt]], lines: Sequence[int], source: Source, tokenizer: Tokenizer
) -> list[TokenizedPrompt]:
    """The texts of some records; an error names the line."""
    try:
        return tokenize([prompt for record in texts for prompt in record], tokenizer)
    except InputError:
        for line, record in zip(lines, texts, strict=True):
            try:
                tokenize(record, tokenizer)
            except InputError as error:
                raise InputError(f"{source.path}:{line}: {error}") from error
        raise


def _make_shard(shard: Shard, readings: Sequence[Reading], tokenizer: Tokenizer) -> list[BadRecords]:
    """Makes a shard unless that has been done, and returns its malformed records."""
    columns = read_shard(shard.path)
    if columns is None:
        reading = readings[shard.reading]
        columns = tokenize_range(reading, shard.start, shard.stop, tokenizer, tokens=shard.tokens)
        reading.source.refuse_changed()  # what is kept is that of the version that was opened
        content = io.BytesIO()
        np.savez(content, allow_pickle=False, **columns._asdict())
        try:
            files.write_bytes(shard.path, content.getvalue())
        except FileNotFoundError:
            pass  # another host has joined all shards and removed their folder
        except OSError as error:
            raise InputError(f"{shard.path}: cannot be written ({error}); {cache.MAKE_ROOM}") from error
    return columns.bad_records()


def refuse_bad(bad: Sequence[BadRecords], skip_bad: bool) -> None:
    """Returns where there is no malformed record, or where they are skipped.

    Raises:
      InputError: There is one that is not.
    """
    if bad and not skip_bad:
        raise InputError(f"{bad[0].examples[0]} (data.skip_bad=true leaves such records out and counts them)")


def _make_in_processes(
    shards: Sequence[Shard], readings: Sequence[Reading], tokenizer: Tokenizer, *, processes: int, skip_bad: bool
) -> None:
    opened = [
        (os.fspath(source.path), source.kinds, source.kind, source.version, stream) for source, stream in readings
    ]
    setup = pickle.dumps((tokenizer.files(), opened))
    todo: queue.SimpleQueue[Shard] = queue.SimpleQueue()
    for shard in shards:
        todo.put(shard)
    replies: queue.SimpleQueue[Any] = queue.SimpleQueue()
    # Not multiprocessing: its processes run the user's main module again, and forking is not safe once JAX has threads.
    command = [sys.executable, "-c", "from grit_jax.data.shards import serve; serve()"]
    settings = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TOKENIZERS_PARALLELISM": "false"}
    started = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | settings)
        for _ in range(processes)
    ]
    threads = [threading.Thread(target=_feed, args=(process, setup, todo, replies)) for process in started]
    for thread in threads:
        thread.start()
    try:
        num_records = sum(shard.stop - shard.start for shard in shards)
        for _ in _with_reports(len(shards), f"tokenizing {num_records:,} records, {processes} processes"):
            reply = replies.get()
            if isinstance(reply, BaseException):
                raise reply
            refuse_bad(reply, skip_bad)
    except BaseException:
        for process in started:
            process.kill()
        raise
    finally:
        for thread in threads:
            thread.join()


def _with_reports(total: int, what: str) -> Iterator[int]:
    """The numbers below `total`; says on stderr now and then how many have been taken."""
    started = reported = time.monotonic()
    for number in range(total):
        yield number
        now = time.monotonic()
        if now - reported >= _REPORT_EVERY:
            reported = now
            left = (now - started) / (number + 1) * (total - number - 1)
            print(f"{what}: {(number + 1) / total:.0%}, {left / 60:.0f} min left", file=sys.stderr, flush=True)


def _feed(
    process: subprocess.Popen[bytes], setup: bytes, todo: queue.SimpleQueue[Shard], replies: queue.SimpleQueue[Any]
) -> None:
    """Hands shards to one process and its answers on."""
    assert process.stdin
    assert process.stdout
    try:
        process.stdin.write(setup)
        while True:
            shard = todo.get_nowait()
            pickle.dump(shard, process.stdin)
            process.stdin.flush()
            replies.put(pickle.load(process.stdout))
    except queue.Empty:
        pass
    except (OSError, EOFError):
        code = process.wait()
        memory = " (killed: is there memory for all of them?)" if code == -signal.SIGKILL else ""
        replies.put(RuntimeError(f"a process that tokenizes ended with exit code {code}{memory}"))
    finally:
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.wait()
        process.stdout.close()


def serve() -> None:
    """Makes the shards that come in on stdin until it is closed; the answers go to stdout."""
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
                Reading(open_source(path, kinds=kinds, kind=kind, version=version), stream)
                for path, kinds, kind, version, stream in opened
            ]
            reply: Any = _make_shard(shard, readings, tokenizer)
        except (InputError, OSError, files.UnreachableError) as error:
            reply = error
        try:
            pickle.dump(reply, replies)
            replies.flush()
        except BrokenPipeError:
            return
