"""Random records as the model reads them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from grit_jax.config import Config
from grit_jax.data.records import Record, RecordError
from grit_jax.data.sources import find_files, open_source
from grit_jax.data.streams import all_streams
from grit_jax.data.streams.stream import Stream
from grit_jax.errors import InputError
from grit_jax.text.prompts import tokenize
from grit_jax.text.tokenizer import Tokenizer


class Piece(NamedTuple):
    """Part of a text, and whether its tokens are pooled or scored."""

    text: str
    counts: bool


class Shown(NamedTuple):
    """A text of a record.

    Attributes:
      role: Its role in the record, such as query, positive, negative or conversation.
      pieces: The parts that the model reads, special tokens included.
      tokens: Number of tokens that the model reads.
      counted: How many of these are pooled or scored.
      cut: Number of tokens over the limit, which the model does not read.
    """

    role: str
    pieces: list[Piece]
    tokens: int
    counted: int
    cut: int


def draw(config: Config, tokenizer: Tokenizer, *, count: int, seed: int) -> Iterator[tuple[str, list[Shown]]]:
    """Random records of `data.train` with file and line, drawn uniformly and without repetition.

    Raises:
      InputError: Files are missing, or a record drawn is malformed and `data.skip_bad` is false.
    """
    data, streams = config.data, all_streams(config)
    sources = [open_source(path, skip_bad=data.skip_bad) for path in find_files(data.train)]
    ends = np.cumsum([len(source) for source in sources])
    order = np.random.default_rng(seed).choice(int(ends[-1]), size=min(4 * count, int(ends[-1])), replace=False)
    left = count
    for number in order.tolist():
        if not left:
            return
        file = int(np.searchsorted(ends, number, side="right"))
        source, index = sources[file], number - int(ends[file]) + len(sources[file])
        (record,) = source.records(index, index + 1)
        if not isinstance(record, RecordError):
            left -= 1
            yield source.where(index), show(record, streams, tokenizer)
        elif not data.skip_bad:
            raise InputError(f"{record} (--data.skip_bad=true skips such records)") from record


def show(record: Record, streams: Sequence[Stream], tokenizer: Tokenizer) -> list[Shown]:
    """The texts of a record as the first stream for it reads them, cut at their limits."""
    stream = next(stream for stream in streams if isinstance(record, stream.record))
    texts = stream.prompts(record, tokenizer)
    number = np.arange(len(texts))
    roles, limits = stream.roles(number, np.full(len(texts), stream.num_positives(record))), stream.limits(number)
    encodings = tokenizer.encode_batch([prompt.text for prompt in texts])
    shown = []
    for number, (prompt, whole, encoding) in enumerate(zip(texts, tokenize(texts, tokenizer), encodings, strict=True)):
        role, limit = next(role.name for role in roles if role.mine[number]), int(limits[number])
        borders = [0, *encoding.starts[1:].tolist(), len(prompt.text)]
        read = [prompt.text[borders[i] : borders[i + 1]] for i in whole.kept(limit).tolist()]
        counts = np.zeros(len(read), bool)
        for start, end in whole.cut(limit).spans:
            counts[max(start, stream.first_target) : end] = True
        tokens = itertools.groupby(zip(read, counts.tolist(), strict=True), key=lambda token: token[1])
        pieces = [Piece("".join(text for text, _ in group), counted) for counted, group in tokens]
        shown.append(Shown(role, pieces, len(read), int(counts.sum()), len(whole.tokens) - len(read)))
    return shown
