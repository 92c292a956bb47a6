"""Writing GRIT records, one at a time."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from grit_jax.data.records import BadRecords, RecordError, add_bad, parse_record
from grit_jax.data.sources import ARRAY_RECORD
from grit_jax.data.text_files import Entry, Row
from grit_jax.errors import InputError
from grit_jax.files import replacing


class LeftOut(RecordError):
    """A well-formed record with nothing to train on, such as a pair labelled as unrelated."""

    def __init__(self, fault: str, where: str = ""):
        super().__init__(fault, "", where)

    def __str__(self) -> str:
        """File and line."""
        return self.where


class Written(NamedTuple):
    """The outcome of `write_records`.

    Attributes:
      count: Number of records written.
      bad: Malformed records left out, by fault.
      left_out: Well-formed records left out, by reason.
    """

    count: int
    bad: dict[str, BadRecords]
    left_out: dict[str, BadRecords]


def write_records(path: Path, rows: Iterable[Entry[Row]], *, skip_bad: bool = False) -> Written:
    """Writes GRIT records to a .jsonl, .jsonl.gz or ArrayRecord file, which appears once all are written.

    Args:
      path: The file.
      rows: The records' JSON objects, each with file and line; a `LeftOut` is counted, other errors are faults.
      skip_bad: Whether to leave out and count faulty objects, and those that are not GRIT records.

    Raises:
      InputError: The suffix is unknown, there is no record, or one is bad and `skip_bad` is false.
    """
    count, bad, left_out = 0, dict[str, BadRecords](), dict[str, BadRecords]()
    with _writer(path) as write:
        for entry in rows:
            try:
                if isinstance(entry, RecordError):
                    raise entry
                write(_line(*entry))
                count += 1
            except LeftOut as reason:
                add_bad(left_out, BadRecords.of(reason))
            except RecordError as error:
                if not skip_bad:
                    raise InputError(f"{error} (--skip-bad leaves such records out and counts them)") from error
                add_bad(bad, BadRecords.of(error))
        if not count:
            reasons = [
                f"{some.count:,} records: {some.fault}, as {some.examples[0]}" for some in (bad | left_out).values()
            ]
            raise InputError(f"{path}: no record to write{'; left out ' if reasons else ''}{'; '.join(reasons)}")
    return Written(count, bad, left_out)


def _line(where: str, row: Row) -> bytes:
    line = json.dumps(row, ensure_ascii=False)
    try:
        encoded = line.encode()
    except UnicodeEncodeError as error:
        message = "half of a surrogate pair is not a character"
        raise RecordError("half a surrogate pair", message, where) from error
    parse_record(line, where)
    return encoded


@contextlib.contextmanager
def _writer(path: Path) -> Generator[Callable[[bytes], Any]]:
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        with replacing(path) as raw:
            packed: Any = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if path.suffix == ".gz" else raw
            yield lambda line: packed.write(line + b"\n")
            if packed is not raw:
                packed.close()
    elif path.name.endswith(ARRAY_RECORD):
        from array_record.python.array_record_module import ArrayRecordWriter  # ty: ignore[import-not-found]

        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        try:
            writer = ArrayRecordWriter(str(partial), "group_size:1")  # records are read one by one
            yield writer.write
            writer.close()
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    else:
        raise InputError(f"{path}: must end in .jsonl, .jsonl.gz, .array_record or .arrayrecord")
