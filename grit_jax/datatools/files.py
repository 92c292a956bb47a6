"""Writing GRIT rows, one at a time."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from grit_jax.data.records import RecordError, parse_record
from grit_jax.data.rows import Failed, LeftOut, Row
from grit_jax.data.sources import ARRAY_RECORD
from grit_jax.errors import InputError
from grit_jax.files import replacing


class Written(NamedTuple):
    """What `write_rows` did.

    Attributes:
      rows: Rows written.
      bad: Malformed rows that were left out, by fault.
      left_out: Sound rows that were left out, by reason.
      examples: The first row of each fault and reason, with file and line.
    """

    rows: int
    bad: Counter[str]
    left_out: Counter[str]
    examples: dict[str, str]


def write_rows(path: Path, rows: Iterable[tuple[str, Row] | Failed | LeftOut], *, skip_bad: bool = False) -> Written:
    """Writes GRIT rows to a .jsonl, .jsonl.gz or ArrayRecord file, which appears when all of them are there.

    Args:
      path: The file.
      rows: Where each row is from, and the row; or why it could not be read, or is left out.
      skip_bad: Whether rows that are no GRIT records are left out and counted.

    Raises:
      InputError: The ending is another, there is no row, or one is bad and `skip_bad` is false.
    """
    count, bad, left_out, examples = 0, Counter[str](), Counter[str](), {}
    with _writer(path) as write:
        for entry in rows:
            try:
                if isinstance(entry, LeftOut):
                    left_out[entry.kind] += 1
                    examples.setdefault(entry.kind, entry.where)
                    continue
                if isinstance(entry, Failed):
                    raise entry.error
                where, row = entry
                line = json.dumps(row, ensure_ascii=False)
                _check(line, where)
                write(line.encode())
                count += 1
            except RecordError as error:
                if not skip_bad:
                    raise InputError(f"{error} (--skip-bad leaves such rows out and counts them)") from error
                bad[error.kind] += 1
                examples.setdefault(error.kind, str(error))
        if not count:
            reasons = [f"{number:,} rows: {kind}, as {examples[kind]}" for kind, number in (bad + left_out).items()]
            raise InputError(f"{path}: there is no row to write{'; left out ' if reasons else ''}{'; '.join(reasons)}")
    return Written(count, bad, left_out, examples)


def _check(line: str, where: str) -> None:
    path, _, number = where.rpartition(":")
    try:
        line.encode()
    except UnicodeEncodeError as error:
        raise RecordError(where, "half a surrogate pair", "half of a surrogate pair is no character") from error
    parse_record(line, path=path, line_number=int(number))


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
