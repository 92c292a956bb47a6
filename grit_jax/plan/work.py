"""The content of a planned step: texts at their limits, at a share of them, or those of real data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from grit_jax.checkpoints.opening import open_model
from grit_jax.config import Config, TransformerConfig
from grit_jax.data.index_builder import build_indexes
from grit_jax.data.schedule import Schedule
from grit_jax.data.sources import find_files
from grit_jax.data.streams import STREAMS, readers
from grit_jax.data.streams.stream import Stream
from grit_jax.errors import InputError
from grit_jax.train.memory import packed_rows, rows_at_once
from grit_jax.train.metrics import model_flops
from grit_jax.train.objectives.objective import Objective
from grit_jax.train.resolve import resolve_tokenizer

_SAMPLED_STEPS = 16

Lengths = Mapping[str, np.ndarray]  # int [texts]: tokens of each text of a step, by stream


@dataclasses.dataclass(frozen=True)
class Work:
    """The content of a planned step.

    Attributes:
      rows: Rows of each stream's batch, all devices together.
      rows_at_once: Most rows that pass through the model at once, all devices together.
      tokens: Tokens that are not padding.
      flops: Model FLOPs: forward and backward, without recomputation and padding.
      capacity: Tokens that the rows have room for, padding included.
    """

    rows: dict[str, int]
    rows_at_once: int
    tokens: int
    flops: float
    capacity: int


def lengths_at_limits(streams: Sequence[Stream], fill: float = 1.0) -> Lengths:
    """Texts with a share `fill` of the tokens that their limits allow."""
    return {stream.name: np.maximum(1, stream.full_step() * fill).astype(int) for stream in streams}


def lengths_of_data(config: Config, streams: Sequence[Stream]) -> Lengths:
    """The texts of the longest of 16 evenly spaced steps of the run, from the config's data on this machine.

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
    files = find_files(config.data.train)
    read = build_indexes(files, tokenizer, readers(config, streams), skip_bad=config.data.skip_bad, tokens=False)
    schedule = Schedule(read, streams, data=config.data, train=config.train, num_shards=1)
    steps = np.unique(np.linspace(0, config.train.steps - 1, _SAMPLED_STEPS).astype(int)).tolist()
    found = [{name: plan.rows.length for name, plan in schedule.step(step).items()} for step in steps]
    return max(found, key=lambda lengths: sum(map(np.sum, lengths.values())))


def planned_work(architecture: TransformerConfig, objectives: Sequence[Objective], shards: int, texts: Lengths) -> Work:
    """A step with texts of these lengths.

    Args:
      architecture: Resolved architecture.
      objectives: Objectives of the training.
      shards: Number of equal parts into which a batch's rows are divided.
      texts: Lengths of the texts of a step.
    """
    rows, pairs, through_head, capacity = {}, 0.0, 0, 0
    for objective in objectives:
        stream, tokens = objective.stream, texts[objective.name]
        rows[stream.name] = packed_rows(stream, tokens, shards)
        capacity += rows[stream.name] * stream.row_length
        pairs += float(np.sum(np.square(tokens, dtype=float))) / (2 if objective.causal else 1)
        through_head += int(tokens.sum()) if objective.uses_head else 0
    total = sum(int(tokens.sum()) for tokens in texts.values())
    flops = model_flops(architecture, tokens=total, tokens_through_head=through_head, attention_pairs=pairs)
    at_once = shards * max(rows_at_once(each.stream, rows[each.name], shards) for each in objectives)
    return Work(rows, at_once, total, flops, capacity)


def rows_by_stream(work: Work) -> dict[str, int]:
    """Rows of every stream; 0 for an untrained one."""
    return dict.fromkeys(STREAMS, 0) | work.rows


def described_rows(work: Work) -> str:
    """`rows_by_stream` as text."""
    return f"{' and '.join(f'{rows:,} {name}' for name, rows in rows_by_stream(work).items())} rows"
