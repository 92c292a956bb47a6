"""Continuous batching: texts join a batch and leave it while others are being written.

A lane is a batch of rows with caches of one length; a text goes to the shortest lane that holds it. A step reads the
next tokens of prompts that have just joined, a bounded number at a time, then writes a block of tokens of every text
that has been read. Shapes are few and known before: after `Engine.warm_up` nothing is compiled.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from grit_jax.config.ranges import NOT_NEGATIVE, SHARE, require
from grit_jax.data.batch import sizes
from grit_jax.errors import InputError
from grit_jax.model.decode import (
    DecodeState,
    Logprobs,
    Sampling,
    clear,
    decode,
    empty_state,
    extend,
    write_prefix,
)
from grit_jax.model.transformer import KVCache, Params, Transformer
from grit_jax.parallel import sharding

BLOCK = 8  # tokens that are written in one call of the device

_SHORTEST_READ, _LONGEST_READ = 32, 512  # tokens of a prompt that are read in one call
_GROWTH = 4  # from one number of computed rows to the next


@dataclasses.dataclass(frozen=True, eq=False)
class Continuation:
    """A text and how it is continued.

    Attributes:
      tokens: int32 [tokens]; what is read, at least one.
      max_new_tokens: Most tokens that are written.
      temperature: 0 takes the likeliest token each time.
      top_p: Probability of the nucleus that is drawn from; its likeliest token is always in it.
      seed: Seed of the draws; tokens do not depend on what else is in the batch.
      logprobs: Whether log p of the tokens is wanted.
      prefix: Keys and values of what is before `tokens`, numpy [layers, tokens, kv_heads, head_dim]; None for nothing.

    Raises:
      InputError: A number is out of its range.
    """

    tokens: np.ndarray
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    logprobs: bool = False
    prefix: KVCache | None = None

    def __post_init__(self):
        require("max_new_tokens", self.max_new_tokens, NOT_NEGATIVE, "there is no number for no limit")
        require("temperature", self.temperature, NOT_NEGATIVE)
        require("top_p", self.top_p, SHARE)

    @property
    def num_cached(self) -> int:
        """Tokens of the prefix."""
        return self.prefix.keys.shape[1] if self.prefix else 0

    @property
    def num_slots(self) -> int:
        """Tokens that its row holds at the end."""
        return self.num_cached + len(self.tokens) + self.max_new_tokens


class Block(NamedTuple):
    """What a step has written of a text.

    Attributes:
      continuation: Which one.
      tokens: int32 [tokens], without the end-of-sequence token.
      logprobs: Of these tokens, where they are wanted.
      finish: Why there will be no more; None where there will. `failed` is for logits that are not finite.
    """

    continuation: Continuation
    tokens: np.ndarray
    logprobs: Logprobs | None
    finish: Literal["stop", "length", "failed"] | None


class LaneSize(NamedTuple):
    """Rows of a lane, and tokens that each of them holds."""

    rows: int
    slots: int


class Engine:
    """Writes many texts at once with one model.

    Where the mesh spans several processes, all of them make the same calls.

    Args:
      model: Abstract model.
      params: Its parameters, placed on `mesh`.
      mesh: Where it runs.
      dtype: Type of activations and caches.
      eos_id: Token that ends a text.
      lanes: Sizes, shortest slots first; rows are rounded up to what the mesh divides.
      read_tokens: Tokens of prompts, padding included, after which a lane reads no more before it writes in a step.
      fewer_rows: Whether a lane of which few rows are in use computes only some of them. That is faster, and takes a
        program for each of a few numbers of rows.
    """

    def __init__(
        self,
        model: Transformer,
        params: Params,
        *,
        mesh: Mesh,
        dtype: jax.typing.DTypeLike,
        eos_id: int | None,
        lanes: Sequence[LaneSize],
        read_tokens: int,
        fewer_rows: bool = False,
    ):
        shards = sharding.axis_size(mesh, "batch")
        whole = [LaneSize(-(-size.rows // shards) * shards, size.slots) for size in lanes]
        self._lanes = [
            _Lane(
                model, params, mesh, np.dtype(dtype), eos_id, size,
                read_tokens=read_tokens, fewest_rows=shards if fewer_rows else size.rows,
            )
            for size in whole
        ]  # fmt: skip

    @property
    def most_slots(self) -> int:
        """Tokens that a row of the longest lane holds."""
        return self._lanes[-1].size.slots

    @property
    def num_waiting(self) -> int:
        """Texts that have no row yet."""
        return sum(len(lane.waiting) for lane in self._lanes)

    @property
    def num_active(self) -> int:
        """Texts that are read or written."""
        return sum(len(lane.active) for lane in self._lanes)

    @property
    def is_busy(self) -> bool:
        """Whether `step` has anything to do."""
        return self.num_waiting + self.num_active > 0

    @property
    def cache_bytes(self) -> int:
        """Memory of the caches of all lanes."""
        return sum(leaf.nbytes for lane in self._lanes for leaf in jax.tree.leaves(lane.state.cache))

    def warm_up(self, progress: Callable[[int], None] = lambda _: None) -> int:
        """Compiles every program, while no text is there, and returns how many; `progress` is called after each."""
        return sum(lane.warm_up(progress) for lane in self._lanes)

    @property
    def lane_rows(self) -> list[int]:
        """Rows of each lane."""
        return [lane.size.rows for lane in self._lanes]

    def lane(self, continuation: Continuation) -> int:
        """Number of the lane that a text is written in, the shortest that holds it.

        Raises:
          InputError: It has nothing to read, or does not fit the longest lane.
        """
        if not len(continuation.tokens):
            raise InputError("the prompt has no token; give it some text")
        if continuation.num_slots > self.most_slots:
            prompt = continuation.num_cached + len(continuation.tokens)
            raise InputError(
                f"a prompt of {prompt} tokens and {continuation.max_new_tokens} new ones are over the limit of "
                f"{self.most_slots}; shorten the prompt or ask for fewer"
            )
        return next(number for number, lane in enumerate(self._lanes) if lane.size.slots >= continuation.num_slots)

    def submit(self, continuation: Continuation) -> None:
        """Adds a text, to be written from the next step on that has room for it; errors as of `lane`."""
        self._lanes[self.lane(continuation)].waiting.append(continuation)

    def cancel(self, continuation: Continuation) -> None:
        """Ends a text; one that has ended already is let be."""
        for lane in self._lanes:
            lane.remove(continuation)

    def step(self) -> list[Block]:
        """Reads some, writes a block of each text that has been read, and returns what is new."""
        self.start()
        return self.finish()

    def start(self) -> None:
        """The first half of `step`: the device has its work then, and the host is free until it calls `finish`."""
        for lane in self._lanes:
            lane.start()

    def finish(self) -> list[Block]:
        """The second half: waits for what was started; a text that was cancelled since has no block."""
        return [block for lane in self._lanes for block in lane.finish()]


@dataclasses.dataclass(eq=False)
class _Row:
    """A row in use.

    Attributes:
      number: Its place in the lane.
      continuation: What is in it.
      length: Tokens whose keys and values it holds.
      num_read: Tokens of the prompt among them.
      num_written: Tokens after the prompt.
    """

    number: int
    continuation: Continuation
    length: int = 0
    num_read: int = 0
    num_written: int = 0

    @property
    def unread(self) -> np.ndarray:
        return self.continuation.tokens[self.num_read :]


class _Started(NamedTuple):
    """Rows whose next block the device writes, by their place in it."""

    places: list[tuple[int, _Row]]
    tokens: jax.Array
    logprobs: Logprobs | None


class _Lane:
    """Rows of one length, and the texts that wait for one."""

    def __init__(
        self,
        model: Transformer,
        params: Params,
        mesh: Mesh,
        dtype: np.dtype,
        eos_id: int | None,
        size: LaneSize,
        *,
        read_tokens: int,
        fewest_rows: int,
    ):
        self._model, self._params, self._mesh, self._eos_id = model, params, mesh, eos_id
        self.size = size
        self.waiting: deque[Continuation] = deque()
        self.active: dict[Continuation, _Row] = {}
        self._free = list(reversed(range(size.rows)))
        self._used: set[int] = set()  # rows that a text has been in
        # A call computes as few rows as hold what there is, of these numbers.
        self._row_counts = sizes(fewest_rows, size.rows, growth=_GROWTH)
        self._read_tokens = read_tokens
        self._started: _Started | None = None
        with jax.set_mesh(mesh):
            self.state: DecodeState = empty_state(model, params, rows=size.rows, slots=size.slots, dtype=dtype)

    def warm_up(self, progress: Callable[[int], None]) -> int:
        config = self._model.config
        layers, of_token = config.num_layers, (config.num_kv_heads, config.head_dim)
        calls = [
            *(lambda rows=rows, length=length: self._extend([], rows, length)
              for rows in self._row_counts for length in self._read_lengths(rows)),
            *(lambda rows=rows: self._sample([], rows) for rows in self._row_counts),
            *(lambda length=length: self._write_prefix(KVCache(*[np.zeros((layers, length, *of_token))] * 2), 0, 0)
              for length in self._read_lengths(1)),
            lambda: self._clear(0),
        ]  # fmt: skip
        for call in calls:
            call()
            jax.block_until_ready(self.state)
            progress(1)
        return len(calls)

    def remove(self, continuation: Continuation) -> None:
        if continuation in self.active:
            self._free.append(self.active.pop(continuation).number)
        elif continuation in self.waiting:
            self.waiting.remove(continuation)

    def start(self) -> None:
        assert self._started is None, "the last step is not finished"
        while self.waiting and self._free:
            continuation = self.waiting.popleft()
            self.active[continuation] = self._new_row(continuation)
        num_read = 0
        while num_read < self._read_tokens and (unread := [row for row in self.active.values() if len(row.unread)]):
            num_read += self._read(unread)
        ready = [row for row in self.active.values() if not len(row.unread)]
        if ready:
            rows = self._enough(len(ready))
            self._started = _Started(self._places(ready, rows), *self._sample(ready, rows))

    def finish(self) -> list[Block]:
        started, self._started = self._started, None
        if not started:
            return []
        tokens, logprobs = jax.tree.map(np.asarray, (started.tokens, started.logprobs))
        return [
            self._block(row, tokens[place], jax.tree.map(lambda x, place=place: x[place], logprobs))
            for place, row in started.places
            if row.continuation in self.active
        ]

    def _new_row(self, continuation: Continuation) -> _Row:
        row = _Row(self._free.pop(), continuation)
        if row.number in self._used:
            self._clear(row.number)
        self._used.add(row.number)
        if continuation.prefix:
            longest = self._read_lengths(1)[-1]
            for start in range(0, continuation.num_cached, longest):
                piece = KVCache(*(x[:, start : start + longest] for x in continuation.prefix))
                self._write_prefix(piece, row.number, start)
            row.length = continuation.num_cached
        return row

    def _clear(self, row: int) -> None:
        with jax.set_mesh(self._mesh):
            self.state = clear(self.state, np.int32(row))

    def _write_prefix(self, piece: KVCache, row: int, start: int) -> None:
        padding = bucket(piece.keys.shape[1], at_least=_SHORTEST_READ) - piece.keys.shape[1]
        dtype = jax.tree.leaves(self.state.cache)[0].dtype
        padded = KVCache(*(np.pad(x.astype(dtype), ((0, 0), (0, padding), (0, 0), (0, 0))) for x in piece))
        with jax.set_mesh(self._mesh):
            self.state = write_prefix(self.state, padded, np.int32(row), np.int32(start))

    def _read(self, unread: list[_Row]) -> int:
        """Reads the next tokens of the prompts that have waited longest, and returns how many, padding included.

        Of the numbers of rows that are compiled for, it takes the one that pads least.
        """
        calls = []
        for rows in reversed([rows for rows in self._row_counts if rows <= self._enough(len(unread))]):
            longest, lengths = max(len(row.unread) for row in unread[:rows]), self._read_lengths(rows)
            length = next((length for length in lengths if length >= longest), lengths[-1])
            useful = sum(min(len(row.unread), length) for row in unread[:rows])
            calls.append((rows * length / useful, rows, length))
        _, rows, length = min(calls, key=lambda call: call[0])
        self._extend(unread[:rows], rows, length)
        return rows * length

    def _extend(self, some: list[_Row], rows: int, length: int) -> None:
        tokens, starts, lengths = np.zeros((rows, length), np.int32), np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        for place, row in self._places(some, rows):
            piece = row.unread[:length]
            tokens[place, : len(piece)], starts[place], lengths[place] = piece, row.length, len(piece)
        for row in self._resting(some, rows):
            starts[row.number] = row.length
        with jax.set_mesh(self._mesh):
            self.state = extend(
                self._model, self._params, self.state, tokens, starts, lengths, self._numbers(some, rows)
            )
        for place, row in self._places(some, rows):
            row.length += int(lengths[place])
            row.num_read += int(lengths[place])

    def _sample(self, some: list[_Row], rows: int) -> tuple[jax.Array, Logprobs | None]:
        seeds, lengths = np.zeros(rows, np.uint32), np.zeros(rows, np.int32)
        temperature, top_p = np.zeros(rows, np.float32), np.ones(rows, np.float32)
        for place, row in self._places(some, rows):
            how = row.continuation
            seeds[place], lengths[place] = how.seed & 0xFFFFFFFF, row.length
            temperature[place], top_p[place] = how.temperature, how.top_p
        for row in self._resting(some, rows):
            lengths[row.number] = row.length
        wanted = any(row.continuation.logprobs for row in some)
        sampling = Sampling(seeds, temperature, top_p, np.bool_(wanted))
        with jax.set_mesh(self._mesh):
            tokens, logprobs, self.state = decode(
                self._model, self._params, self.state, lengths, sampling, self._numbers(some, rows), steps=BLOCK
            )
        return tokens, logprobs if wanted else None

    def _block(self, row: _Row, tokens: np.ndarray, logprobs: Logprobs | None) -> Block:
        """What is kept of the tokens of a row, which is free afterwards where the text has ended."""
        how = row.continuation
        kept = min(len(tokens), how.max_new_tokens - row.num_written)
        ends = np.flatnonzero((tokens[:kept] == self._eos_id) | (tokens[:kept] < 0))
        row.num_written += kept
        row.length += len(tokens)
        finish: Literal["stop", "length", "failed"] | None = None
        if len(ends):
            kept, finish = int(ends[0]), "failed" if tokens[ends[0]] < 0 else "stop"
        elif row.num_written == how.max_new_tokens:
            finish = "length"
        if finish:
            self.remove(how)
        told = jax.tree.map(lambda x: x[:kept], logprobs) if how.logprobs else None
        return Block(how, tokens[:kept], told, finish)

    def _enough(self, count: int) -> int:
        return next(rows for rows in self._row_counts if rows >= count)

    def _read_lengths(self, rows: int) -> list[int]:
        """Lengths that so many rows are read with."""
        longest = max(_SHORTEST_READ, min(_LONGEST_READ, self.size.slots, self._read_tokens // rows))
        return [_SHORTEST_READ * 2**k for k in range((longest // _SHORTEST_READ).bit_length())]

    def _places(self, some: list[_Row], rows: int) -> list[tuple[int, _Row]]:
        """Where each row is among those that are computed."""
        return [(row.number if rows == self.size.rows else place, row) for place, row in enumerate(some)]

    def _resting(self, some: list[_Row], rows: int) -> list[_Row]:
        """Rows in use that are computed without need; they must not lose what they hold."""
        return [row for row in self.active.values() if row not in some] if rows == self.size.rows else []

    def _numbers(self, some: list[_Row], rows: int) -> np.ndarray | None:
        if rows == self.size.rows:
            return None
        numbers = np.full(rows, self.size.rows, np.int32)  # beyond the lane: padding
        numbers[: len(some)] = [row.number for row in some]
        return numbers


def bucket(size: int, *, at_least: int) -> int:
    """The next power of two times `at_least`, so that few shapes are compiled."""
    while at_least < size:
        at_least *= 2
    return at_least
