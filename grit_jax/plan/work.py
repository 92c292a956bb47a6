"""What one step is planned to hold: texts at their limits, at a share of them, or those of real data."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from grit_jax.config import Config, InputError, TransformerConfig
from grit_jax.data.indexing import build_indexes
from grit_jax.data.packing import pack
from grit_jax.data.schedule import Schedule
from grit_jax.data.sources import find_files
from grit_jax.loading import open_model
from grit_jax.train.metrics import model_flops
from grit_jax.train.resolve import resolve_tokenizer

_SAMPLED_STEPS = 16


class Lengths(NamedTuple):
    """Tokens of each text of a step; a stream that is not trained has none.

    Attributes:
      embedding: int [queries + passages].
      generative: int [conversations].
    """

    embedding: np.ndarray
    generative: np.ndarray


@dataclasses.dataclass(frozen=True)
class Work:
    """What one step is planned to hold.

    Attributes:
      rows: Rows of the embedding and of the generative batch, all devices together; 0 for a stream not trained.
      tokens: Tokens that are not padding.
      flops: Model FLOPs: forward and backward, without recomputation and padding.
    """

    rows: tuple[int, int]
    tokens: int
    flops: float


def lengths_at_limits(config: Config, fill: float = 1.0) -> Lengths:
    """Texts that have `fill` times the tokens that their limits allow."""
    data, train = config.data, config.train
    embedding = [data.query_max_length] * data.embedding_batch
    embedding += [data.passage_max_length] * data.embedding_batch * data.group_size
    generative = [data.generative_max_length] * data.generative_batch
    streams = (embedding * train.embeds, generative * train.generates)
    return Lengths(*(np.maximum(1, np.array(limits) * fill).astype(int) for limits in streams))


def lengths_of_data(config: Config) -> Lengths:
    """The texts of the longest of 16 steps, spread over the run, of the config's data on this machine.

    Raises:
      InputError: Data or tokenizer cannot be read.
    """
    tokenizer = resolve_tokenizer(config, open_model(config.model.init) if config.model.init else None)
    trained = config.model.architecture.vocab_size
    if tokenizer.vocab_size > trained:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and model.architecture.vocab_size is {trained}; "
            "name the model's own with model.tokenizer or model.init"
        )
    indexes = build_indexes(find_files(config.data.train), tokenizer, skip_bad=config.data.skip_bad, tokens=False)
    schedule = Schedule(indexes, data=config.data, loss=config.loss, train=config.train, row_multiples=(1, 1))
    steps = np.unique(np.linspace(0, config.train.steps - 1, _SAMPLED_STEPS).astype(int)).tolist()
    none = np.zeros(0, int)
    found = [
        Lengths(*(plan.rows.length if plan else none for plan in schedule.step(step))) for step in steps
    ]  # fmt: skip
    return max(found, key=lambda lengths: sum(map(np.sum, lengths)))


def planned_work(config: Config, multiples: tuple[int, int], lengths: Lengths) -> Work:
    """A step with texts of these lengths.

    Args:
      config: With its architecture resolved.
      multiples: What the row counts are multiples of.
      lengths: Of the texts.
    """
    architecture: TransformerConfig = config.model.architecture
    row_lengths = (config.data.embedding_row_length, config.data.generative_max_length)
    causal = (config.model.embedding.attention == "causal", True)
    rows, pairs = [], 0.0
    for tokens, row_length, multiple, is_causal in zip(lengths, row_lengths, multiples, causal, strict=True):
        full = pack(tokens, row_length=row_length, max_segments=row_length).num_rows
        rows.append(math.ceil(full / multiple) * multiple)
        pairs += float(np.sum(np.square(tokens, dtype=float))) / (2 if is_causal else 1)
    tokens, generated = sum(int(each.sum()) for each in lengths), int(lengths.generative.sum())
    flops = model_flops(architecture, tokens=tokens, generative_tokens=generated, attention_pairs=pairs)
    return Work((rows[0], rows[1]), tokens, flops)
