"""The next-token objective of the generative stream."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from grit_jax.config import Config
from grit_jax.data.batch import GenerativeBatch
from grit_jax.data.streams.stream import Stream
from grit_jax.losses.language import next_token_loss
from grit_jax.model.transformer import Transformer
from grit_jax.train.objectives.objective import Losses, Objective, Parts


class NextTokenObjective(Objective):
    """The weighted sum of -log p(next token)."""

    router_metric = "loss/router"
    split_axes = ("whole", "batch", "length")

    def __init__(self, stream: Stream, config: Config):
        super().__init__(stream)
        self.weight, self.router_weight = config.loss.generative_weight, config.loss.router_weight

    def parts(self, model: Transformer, kept: jax.Array, batch: GenerativeBatch, dtype: jnp.dtype) -> Parts:
        """The loss of this device's rows, and those of their tokens."""
        # Tied together, the table's gradient leaves before the layers' backward pass begins, and frees its memory.
        hidden, table = jax.lax.optimization_barrier((kept, model.output_table[...]))
        model.output_table[...] = table
        loss, of_tokens = next_token_loss(
            hidden,
            model.output_weights(dtype),
            model.logits,
            targets=batch.targets,
            loss_weights=batch.loss_weights,
        )
        return Parts(jnp.stack([of_tokens * batch.loss_weights, batch.loss_weights]), loss[None])

    def losses(self, split: jax.Array, sums: jax.Array, batch: GenerativeBatch) -> Losses:
        """L_gen of the batch."""
        return Losses(sums, jax.lax.stop_gradient(split))

    def total_weight(self, batch: GenerativeBatch) -> jax.Array:
        """Sum of the tokens' weights."""
        return jnp.sum(batch.loss_weights)
