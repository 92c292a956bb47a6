"""The generative stream: conversations, whose assistant turns are scored, and plain texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from grit_jax.config import Config, LossConfig
from grit_jax.data.batch import GenerativeBatch
from grit_jax.data.packing import ranges
from grit_jax.data.records import GenerativeRecord
from grit_jax.data.streams.stream import PlannedRows, Ranks, Role, RowPlan, Samples, Stream
from grit_jax.text import prompts
from grit_jax.text.prompts import Prompt
from grit_jax.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from grit_jax.data.usable import StreamFiles


class GenerativePlan(NamedTuple):
    """A batch of the stream.

    Attributes:
      rows: Its texts and their rows.
      token_weights: float32 [texts]; weight of each scored token of a text.
    """

    rows: RowPlan
    token_weights: np.ndarray


class GenerativeStream(Stream):
    """Texts whose tokens are predicted from those before them; one in each record."""

    name = "generative"
    record = GenerativeRecord
    no_room = "prompt leaves no room for a completion"
    first_target = 1  # a token is scored from the one before it
    code = 1

    def __init__(self, config: Config):
        data = config.data
        self.batch_size, self.row_length, self.packing = data.generative_batch, data.generative_max_length, data.packing
        self.num_chunks = config.train.generative_chunks
        self.limits_by_key = {"data.generative_max_length": data.generative_max_length}
        self._loss = config.loss

    @staticmethod
    def prompts(record: GenerativeRecord, tokenizer: Tokenizer) -> list[Prompt]:
        """The conversation, or the plain text."""
        if isinstance(record.turns, str):
            return [prompts.plain(record.turns, bos=tokenizer.bos)]
        return [prompts.conversation(record.turns, bos=tokenizer.bos, eos=tokenizer.eos)]

    def limits(self, text: np.ndarray) -> np.ndarray:
        """int32 [texts]: the tokens of a row."""
        return np.full(len(text), self.row_length, np.int32)

    def roles(self, text: np.ndarray, positives: np.ndarray) -> list[Role]:
        """Conversations."""
        return [Role("conversation", np.ones(len(text), bool), self.row_length)]

    def plan(self, files: StreamFiles, samples: Samples, ranks: Ranks, *, summed: bool) -> GenerativePlan:
        """The samples' conversations."""
        text = np.zeros(len(samples.file), int)
        scored = files.targets(samples, text)
        weights = np.ones(len(scored), np.float32) if summed else token_weights(scored, self._loss)
        return GenerativePlan(files.rows(samples, text), weights)

    def fill(self, plan: GenerativePlan, planned: PlannedRows) -> GenerativeBatch:
        """The batch; a token's weight is at the position before it, where it is predicted."""
        rows, lengths = planned.rows, planned.lengths
        targets = np.zeros_like(rows.tokens)
        targets[:, :-1] = rows.tokens[:, 1:] * (rows.segment_ids[:, 1:] == rows.segment_ids[:, :-1])
        owner = np.repeat(np.arange(len(lengths)), planned.num_spans)
        starts, ends = np.clip(planned.spans, self.first_target, lengths[owner, None]).T
        scored = ranges((np.cumsum(lengths) - lengths)[owner] + starts - 1, ends - starts)
        weights = np.zeros(int(lengths.sum()), np.float32)
        weights[scored] = np.repeat(plan.token_weights[planned.texts][owner], ends - starts)
        return GenerativeBatch(*rows[:3], targets, rows.spread(weights))

    def full_step(self) -> np.ndarray:
        """Conversations: int [texts]."""
        return np.full(self.batch_size, self.row_length)

    def empty(self, num_rows: int) -> GenerativeBatch:
        """Zeros of the batch's shapes and dtypes."""
        shape = num_rows, self.row_length
        ids, weights = (np.broadcast_to(np.zeros((), dtype), shape) for dtype in (np.int32, np.float32))
        return GenerativeBatch(*[ids] * 4, weights)


def token_weights(scored: np.ndarray, loss: LossConfig) -> np.ndarray:
    """float32 [samples]: weight of each scored token of a sample in L_gen.

    Args:
      scored: int [samples]; scored tokens of each sample, in sample order.
      loss: The normalisation; see `LossConfig.type`.
    """
    if loss.type == "token":
        return np.full(len(scored), 1 / len(scored), np.float32)
    size = loss.sub_batch_samples if loss.type == "mixed" and loss.sub_batch_samples else len(scored)
    starts = np.arange(0, len(scored), size)
    totals = np.add.reduceat(scored.astype(np.int64), starts)
    return np.repeat(1 / (len(starts) * totals), size)[: len(scored)].astype(np.float32)
