"""The next-token loss and the balance loss of experts. Weights come with the batch: nothing is averaged here."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grit_jax.execution import num_chunks, wide
from grit_jax.sharding import constrain


def next_token_loss(
    hidden: Float[Array, "batch length embed"],
    output_layer: Callable[[Float[Array, "batch block embed"]], Float[Array, "batch block vocab"]],
    *,
    targets: Int[Array, "batch length"],
    loss_weights: Float[Array, "batch length"],
    block: int = 256,
) -> Float[Array, ""]:
    """sum(loss_weights * -log p(target)), with logits made for `block` positions of each row at a time.

    `output_layer` gives float32 logits; the backward pass makes them again, so that no more than one block of them
    exists.
    """
    batch, length, _ = hidden.shape
    block = length // num_chunks(length, block)

    def blocks(x):
        return x.reshape(batch, length // block, block, *x.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def block_loss(total, block_inputs):
        x, target, weight = block_inputs
        logits = constrain(output_layer(x), "batch", "length", "activation_vocab")
        picked = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        return total + jnp.sum(weight * (jax.nn.logsumexp(logits, axis=-1) - picked)), None

    zero = jnp.zeros((), wide(hidden))
    return jax.lax.scan(block_loss, zero, (blocks(hidden), blocks(targets), blocks(loss_weights)))[0]


def balance_loss(
    choices: Float[Array, "per_token experts"], probabilities: Float[Array, " experts"], tokens: Float[Array, ""]
) -> Float[Array, ""]:
    """Experts * sum_{k,e} f[k,e] * P[e]: smallest when tokens are spread evenly (Fedus et al., arXiv 2101.03961).

    f[k,e] is the share of tokens whose k-th choice is expert e and P[e] the mean probability, from the sums of
    `RouterStats`.
    """
    tokens = jnp.maximum(tokens, 1.0)
    return choices.shape[1] * jnp.sum((choices / tokens) @ (probabilities / tokens))
