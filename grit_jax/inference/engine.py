"""Continuous batching: texts join and leave a batch while others are being completed.

A lane is a batch of rows with caches of one length; a text goes to the shortest lane that holds it. A step reads a
bounded number of tokens of new prompts, then writes a block of tokens for every text that has been read. Shapes are
few: after `Engine.warm_up` nothing is compiled.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import numpy as np

from grit_jax.config.ranges import NOT_NEGATIVE, SHARE, require
from grit_jax.data.batch import sizes
from grit_jax.errors import InputError
from grit_jax.inference.decode import (
    DecodeState,
    Logprobs,
    Sampling,
    clear,
    decode,
    empty_state,
    extend,
    write_prefix,
)
from grit_jax.inference.runner import ModelRunner, bucket
from grit_jax.model.transformer import KVCache

BLOCK = 8  # tokens of a text written in one device call

_SHORTEST_READ, _LONGEST_READ = 32, 512  # tokens of a prompt read in one call
_GROWTH = 4  # ratio of successive numbers of computed rows

Finish = Literal["stop", "length", "failed"]


@dataclasses.dataclass(frozen=True, eq=False)
class Continuation:
    """A text and how to continue it.

    Attributes:
      tokens: int32 [tokens]; the text, at least one token.
      max_new_tokens: Most tokens to write.
      temperature: 0 takes the likeliest token each time.
      top_p: Probability of the nucleus to draw from; the likeliest token is always in it.
      seed: Seed of the draws; tokens do not depend on the rest of the batch.
      logprobs: Whether to return log p of the tokens.
      prefix: Keys and values before `tokens`, numpy [layers, tokens, kv_heads, head_dim]; None without any.

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
        require("max_new_tokens", self.max_new_tokens, NOT_NEGATIVE, "it cannot be unlimited")
        require("temperature", self.temperature, NOT_NEGATIVE)
        require("top_p", self.top_p, SHARE)

    @property
    def num_cached(self) -> int:
        """Tokens of the prefix."""
        return self.prefix.keys.shape[1] if self.prefix else 0

    @property
    def num_slots(self) -> int:
        """Most tokens that its row will hold."""
        return self.num_cached + len(self.tokens) + self.max_new_tokens


class Block(NamedTuple):
    """The tokens that a step has written for a text.

    Attributes:
      continuation: Which text.
      tokens: int32 [tokens], without the end-of-sequence token.
      logprobs: Log p of these tokens, if wanted.
      finish: Why the text ended; None while it goes on. `failed` means logits that are not finite.
    """

    continuation: Continuation
    tokens: np.ndarray
    logprobs: Logprobs | None
    finish: Finish | None


class LaneSize(NamedTuple):
    """Rows of a lane, and tokens that each of them holds."""

    rows: int
    slots: int


class Engine:
    """Writes many texts at once with one model.

    Where the mesh spans several processes, all of them make the same calls.

    Args:
      runner: The model; its `batch_tokens` limit how many tokens a lane reads in a step before it writes.
      eos_id: Token that ends a text.
      lanes: Sizes, shortest slots first; rows are rounded up to a multiple of what the mesh splits a batch into.
      fewer_rows: Whether a lane that uses few of its rows computes only some of them. That is faster, and takes a
        program for each of a few numbers of rows.
    """

    def __init__(self, runner: ModelRunner, *, eos_id: int | None, lanes: Sequence[LaneSize], fewer_rows: bool = False):
        self._lanes = []
        for rows, slots in lanes:
            size = LaneSize(-(-rows // runner.shards) * runner.shards, slots)
            self._lanes.append(_Lane(runner, eos_id, size, fewest_rows=runner.shards if fewer_rows else size.rows))

    @property
    def num_waiting(self) -> int:
        """Texts that have no row yet."""
        return sum(len(lane.waiting) for lane in self._lanes)

    @property
    def num_active(self) -> int:
        """Texts being read or written."""
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
        """Compiles every program of an idle engine and returns how many; `progress` is called after each."""
        return sum(lane.warm_up(progress) for lane in self._lanes)

    @property
    def lane_rows(self) -> list[int]:
        """Rows of each lane."""
        return [lane.size.rows for lane in self._lanes]

    def lane(self, continuation: Continuation) -> int:
        """Index of the shortest lane that holds a text.

        Raises:
          InputError: It has no token, or does not fit the longest lane.
        """
        if not len(continuation.tokens):
            raise InputError("the prompt has no token; give it some text")
        limit = self._lanes[-1].size.slots
        if continuation.num_slots > limit:
            prompt = continuation.num_cached + len(continuation.tokens)
            raise InputError(
                f"a prompt of {prompt} tokens and {continuation.max_new_tokens} new ones are over the limit of "
                f"{limit}; shorten the prompt or ask for fewer"
            )
        return next(index for index, lane in enumerate(self._lanes) if lane.size.slots >= continuation.num_slots)

    def submit(self, continuation: Continuation) -> None:
        """Queues a text for its lane; errors as in `lane`."""
        self._lanes[self.lane(continuation)].waiting.append(continuation)

    def cancel(self, continuation: Continuation) -> None:
        """Ends a text, unless it has ended already."""
        for lane in self._lanes:
            lane.remove(continuation)

    def step(self) -> list[Block]:
        """Reads some tokens of prompts, then writes and returns a block of each text that has been read."""
        self.start()
        return self.finish()

    def start(self) -> None:
        """The first half of `step`: gives the device its work; the host is free until it calls `finish`."""
        for lane in self._lanes:
            lane.start()

    def finish(self) -> list[Block]:
        """The second half: waits for the blocks of the texts that have not been cancelled since."""
        return [block for lane in self._lanes for block in lane.finish()]


@dataclasses.dataclass(eq=False)
class _Row:
    """A row in use.

    Attributes:
      index: Its index in the lane.
      continuation: The text in it.
      length: Tokens whose keys and values it holds.
      num_read: Tokens of the prompt among them.
      num_written: Tokens after the prompt.
    """

    index: int
    continuation: Continuation
    length: int = 0
    num_read: int = 0
    num_written: int = 0

    @property
    def unread(self) -> np.ndarray:
        return self.continuation.tokens[self.num_read :]


class _Call:
    """Rows that one device call computes: all of the lane, or `rows` and padding.

    Attributes:
      size: Number of computed rows.
      slots: Index among these of each of `rows`.
      resting: Rows in use that are computed only incidentally and must keep their state.
      indices: int32 [size]; indices of the computed rows in the lane; None for all rows.
    """

    def __init__(self, lane: _Lane, rows: Sequence[_Row], size: int):
        self.size, self.indices = size, None
        if size == lane.size.rows:
            self.slots = [(row.index, row) for row in rows]
            self.resting = [row for row in lane.active.values() if row not in rows]
        else:
            self.slots, self.resting = list(enumerate(rows)), []
            self.indices = np.full(size, lane.size.rows, np.int32)  # beyond the lane: padding
            self.indices[: len(rows)] = [row.index for row in rows]

    def lengths(self) -> np.ndarray:
        """int32 [size]; tokens that each row holds."""
        lengths = np.zeros(self.size, np.int32)
        for slot, row in [*self.slots, *((row.index, row) for row in self.resting)]:
            lengths[slot] = row.length
        return lengths


class _Started(NamedTuple):
    """Rows whose next block the device is writing, with their indices in the call."""

    slots: list[tuple[int, _Row]]
    tokens: jax.Array
    logprobs: Logprobs | None


class _Lane:
    """Rows of one length, and the texts that wait for one."""

    def __init__(self, runner: ModelRunner, eos_id: int | None, size: LaneSize, *, fewest_rows: int):
        self._runner, self._eos_id, self.size = runner, eos_id, size
        self.waiting: deque[Continuation] = deque()
        self.active: dict[Continuation, _Row] = {}
        self._free = list(reversed(range(size.rows)))
        self._used: set[int] = set()  # rows that a text has been in
        # The numbers of rows that a call may compute; it takes the smallest that suffices.
        self._row_counts = sizes(fewest_rows, size.rows, growth=_GROWTH)
        self._started: _Started | None = None
        self._dtype = np.dtype(runner.execution.dtype)
        with jax.set_mesh(runner.mesh):
            self.state: DecodeState = empty_state(
                runner.model, runner.params, rows=size.rows, slots=size.slots, dtype=self._dtype
            )

    def warm_up(self, progress: Callable[[int], None]) -> int:
        config = self._runner.model.config

        def zeros(length: int) -> KVCache:
            return KVCache(*[np.zeros((config.num_layers, length, config.num_kv_heads, config.head_dim))] * 2)

        calls = [
            *(lambda rows=rows, length=length: self._extend([], rows, length)
              for rows in self._row_counts for length in self._read_lengths(rows)),
            *(lambda rows=rows: self._sample([], rows) for rows in self._row_counts),
            *(lambda length=length: self._write_prefix(zeros(length), 0, 0) for length in self._read_lengths(1)),
            lambda: self._clear(0),
        ]  # fmt: skip
        for call in calls:
            call()
            jax.block_until_ready(self.state)
            progress(1)
        return len(calls)

    def remove(self, continuation: Continuation) -> None:
        if continuation in self.active:
            self._free.append(self.active.pop(continuation).index)
        elif continuation in self.waiting:
            self.waiting.remove(continuation)

    def start(self) -> None:
        assert self._started is None, "the last step is not finished"
        while self.waiting and self._free:
            continuation = self.waiting.popleft()
            self.active[continuation] = self._new_row(continuation)
        num_read, limit = 0, self._runner.batch_tokens
        while num_read < limit and (unread := [row for row in self.active.values() if len(row.unread)]):
            num_read += self._read(unread)
        if ready := [row for row in self.active.values() if not len(row.unread)]:
            self._started = self._sample(ready, self._enough(len(ready)))

    def finish(self) -> list[Block]:
        started, self._started = self._started, None
        if not started:
            return []
        tokens, logprobs = jax.tree.map(np.asarray, (started.tokens, started.logprobs))
        return [
            self._block(row, tokens[slot], jax.tree.map(lambda x, slot=slot: x[slot], logprobs))
            for slot, row in started.slots
            if row.continuation in self.active
        ]

    def _new_row(self, continuation: Continuation) -> _Row:
        row = _Row(self._free.pop(), continuation)
        if row.index in self._used:
            self._clear(row.index)
        self._used.add(row.index)
        if continuation.prefix:
            longest = self._read_lengths(1)[-1]
            for start in range(0, continuation.num_cached, longest):
                piece = KVCache(*(x[:, start : start + longest] for x in continuation.prefix))
                self._write_prefix(piece, row.index, start)
            row.length = continuation.num_cached
        return row

    def _clear(self, row: int) -> None:
        with jax.set_mesh(self._runner.mesh):
            self.state = clear(self.state, np.int32(row))

    def _write_prefix(self, piece: KVCache, row: int, start: int) -> None:
        padding = bucket(piece.keys.shape[1], at_least=_SHORTEST_READ) - piece.keys.shape[1]
        padded = KVCache(*(np.pad(x.astype(self._dtype), ((0, 0), (0, padding), (0, 0), (0, 0))) for x in piece))
        with jax.set_mesh(self._runner.mesh):
            self.state = write_prefix(self.state, padded, np.int32(row), np.int32(start))

    def _read(self, unread: list[_Row]) -> int:
        """Reads the next tokens of the prompts that have waited longest, and returns how many, padding included.

        Of the compiled shapes, it takes the one that pads least.
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

    def _extend(self, rows: list[_Row], size: int, length: int) -> None:
        call, runner = _Call(self, rows, size), self._runner
        tokens, lengths = np.zeros((size, length), np.int32), np.zeros(size, np.int32)
        for slot, row in call.slots:
            piece = row.unread[:length]
            tokens[slot, : len(piece)], lengths[slot] = piece, len(piece)
        with jax.set_mesh(runner.mesh):
            self.state = extend(runner.model, runner.params, self.state, tokens, call.lengths(), lengths, call.indices)
        for slot, row in call.slots:
            row.length += int(lengths[slot])
            row.num_read += int(lengths[slot])

    def _sample(self, rows: list[_Row], size: int) -> _Started:
        call, runner = _Call(self, rows, size), self._runner
        seeds, temperature, top_p = np.zeros(size, np.uint32), np.zeros(size, np.float32), np.ones(size, np.float32)
        for slot, row in call.slots:
            how = row.continuation
            seeds[slot], temperature[slot], top_p[slot] = how.seed & 0xFFFFFFFF, how.temperature, how.top_p
        wanted = any(row.continuation.logprobs for row in rows)
        sampling = Sampling(seeds, temperature, top_p, np.bool_(wanted))
        with jax.set_mesh(runner.mesh):
            tokens, logprobs, self.state = decode(
                runner.model, runner.params, self.state, call.lengths(), sampling, call.indices, steps=BLOCK
            )
        return _Started(call.slots, tokens, logprobs if wanted else None)

    def _block(self, row: _Row, tokens: np.ndarray, logprobs: Logprobs | None) -> Block:
        """The new tokens of a row, which becomes free if the text has ended."""
        how = row.continuation
        kept = min(len(tokens), how.max_new_tokens - row.num_written)
        ends = np.flatnonzero((tokens[:kept] == self._eos_id) | (tokens[:kept] < 0))
        row.num_written += kept
        row.length += len(tokens)
        finish: Finish | None = None
        if len(ends):
            kept, finish = int(ends[0]), "failed" if tokens[ends[0]] < 0 else "stop"
        elif row.num_written == how.max_new_tokens:
            finish = "length"
        if finish:
            self.remove(how)
        return Block(how, tokens[:kept], jax.tree.map(lambda x: x[:kept], logprobs) if how.logprobs else None, finish)

    def _enough(self, count: int) -> int:
        return next(rows for rows in self._row_counts if rows >= count)

    def _read_lengths(self, rows: int) -> list[int]:
        """Lengths in which `rows` rows are read."""
        longest = max(_SHORTEST_READ, min(_LONGEST_READ, self.size.slots, self._runner.batch_tokens // rows))
        return [_SHORTEST_READ * 2**k for k in range((longest // _SHORTEST_READ).bit_length())]
