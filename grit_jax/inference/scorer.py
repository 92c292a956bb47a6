"""Scores tokenized texts: log likelihoods of some of their tokens, or all logits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grit_jax.data.packing import fill_single_rows
from grit_jax.errors import InputError
from grit_jax.inference.runner import ModelRunner, bucket, one_behind
from grit_jax.losses.language import target_log_likelihoods
from grit_jax.model.transformer import bind
from grit_jax.parallel import sharding
from grit_jax.parallel.execution import Execution
from grit_jax.text.prompts import TokenizedPrompt


class Likelihoods(NamedTuple):
    """How likely a model finds texts.

    Attributes:
      values: float64 [texts]; sum of log p of the scored tokens, in nats.
      num_tokens: int64 [texts]; scored tokens.
      greedy: bool [texts]; whether each scored token is the likeliest one.
      num_truncated: Texts cut to the model's limit.
    """

    values: np.ndarray
    num_tokens: np.ndarray
    greedy: np.ndarray
    num_truncated: int


class _Batch(NamedTuple):
    """Scores being computed: of each the text, log p, and whether it is the likeliest; and the number of texts."""

    owners: list[int]
    scores: jax.Array
    likeliest: jax.Array
    num_texts: int


class Scorer:
    """Scores texts with a model."""

    def __init__(self, runner: ModelRunner):
        self._runner, self._max_length = runner, runner.model.config.max_length

    def score(
        self, texts: Sequence[TokenizedPrompt], batch_tokens: int | None, progress: Callable[[int], None]
    ) -> Likelihoods:
        """The likelihoods of the spans of texts; see `GritModel.score`."""
        prefixes: dict[bytes, list[int]] = {}  # the texts by all of their tokens but the last
        for index, (tokens, spans, _) in enumerate(texts):
            if not 1 < len(tokens) <= self._max_length or not np.any(spans[:, 1] > 1):
                raise InputError(
                    f"text {index} has {len(tokens)} tokens; a text has 2 to {self._max_length}, and any but the "
                    "first can be scored"
                )
            prefixes.setdefault(tokens[:-1].tobytes(), []).append(index)
        values, num_tokens = np.zeros(len(texts)), np.zeros(len(texts), np.int64)
        greedy = np.ones(len(texts), bool)
        for owners, scores, likeliest, num_texts in one_behind(self._start(texts, prefixes, batch_tokens)):
            np.add.at(values, owners, np.asarray(scores, np.float64)[: len(owners)])
            np.add.at(num_tokens, owners, 1)
            np.logical_and.at(greedy, owners, np.asarray(likeliest)[: len(owners)])
            progress(num_texts)
        return Likelihoods(values, num_tokens, greedy, 0)

    def _start(
        self, texts: Sequence[TokenizedPrompt], prefixes: Mapping[bytes, list[int]], batch_tokens: int | None
    ) -> Iterator[_Batch]:
        """Gives the device one batch after another."""
        runner, members = self._runner, list(prefixes.values())
        for packed in runner.packed([np.frombuffer(key, np.int32) for key in prefixes], batch_tokens):
            owners, indices, targets = [], [], []
            for prefix, start in zip(packed.texts.tolist(), packed.starts.tolist(), strict=True):
                for text in members[prefix]:
                    for first, last in np.maximum(texts[text].spans, 1).tolist():
                        owners += [text] * (last - first)
                        indices += range(start + first - 1, start + last - 1)
                        targets += texts[text].tokens[first:last].tolist()
            size = bucket(len(indices), at_least=max(64, runner.shards))
            padded = (np.pad(np.array(x, np.int32), (0, size - len(x))) for x in (indices, targets))
            with jax.set_mesh(runner.mesh):
                found = _score(runner.model, runner.params, *packed.rows[:3], *padded, execution=runner.execution)
            yield _Batch(owners, *found, sum(len(members[prefix]) for prefix in packed.texts))

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Logits of the next token after each token of a text, float32 [tokens, vocab]."""
        runner = self._runner
        length = runner.row_length(len(tokens))
        rows = fill_single_rows([tokens] * runner.shards, num_rows=runner.shards, row_length=length)
        with jax.set_mesh(runner.mesh):
            logits = _logits(runner.model, runner.params, rows.tokens, rows.segment_ids, execution=runner.execution)
        return np.asarray(logits[0, : len(tokens)], np.float32)


@functools.partial(jax.jit, static_argnums=0, static_argnames="execution")
def _score(model, params, tokens, segment_ids, positions, indices, targets, *, execution: Execution):
    """Log p of `targets` after the tokens at `indices` of the flattened rows, and whether they are the likeliest."""
    model = bind(model, params)
    hidden, _ = model(tokens, model.mask(segment_ids, positions, causal=True), execution)
    chosen = hidden.reshape(-1, hidden.shape[-1])[indices]
    found = target_log_likelihoods(chosen, model.output_layer(execution.dtype), targets)
    return jax.tree.map(lambda x: sharding.constrain(x, "whole"), found)


@functools.partial(jax.jit, static_argnums=0, static_argnames="execution")
def _logits(model, params, tokens, segment_ids, *, execution: Execution):
    model = bind(model, params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = model(tokens, model.mask(segment_ids, positions, causal=True), execution)
    return sharding.constrain(model.output_layer(execution.dtype)(hidden), "whole", "whole", "whole")
