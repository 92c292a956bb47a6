"""The losses of GRIT. Weights come with the batch, so nothing is averaged here."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grit_jax.precision import wide
from grit_jax.sharding import constrain


def contrastive_loss(
    query: Float[Array, "queries embed"],
    passage: Float[Array, "passages embed"],
    *,
    temperature: float,
    query_weights: Float[Array, " queries"],
    passage_ids: Int[Array, " passages"],
) -> Float[Array, ""]:
    """InfoNCE over the global batch: sum_i weight_i * -log softmax_j(query_i . passage_j / temperature)[positive_i].

    The positive of query i is passage i * (passages / queries). Passages that carry the positive's id, and
    fillers (id -1), are left out of a query's negatives. Float32 throughout.
    """
    num_queries, num_passages = query.shape[0], passage.shape[0]
    positive = jnp.arange(num_queries) * (num_passages // num_queries)
    scores = jnp.einsum("id,jd->ij", query, passage, precision=jax.lax.Precision.HIGHEST) / temperature
    scores = constrain(scores, "batch", "passages")
    not_negative = (passage_ids == passage_ids[positive][:, None]) | (passage_ids == -1)
    scores = jnp.where(not_negative & (jnp.arange(num_passages) != positive[:, None]), -jnp.inf, scores)
    target = jnp.take_along_axis(scores, positive[:, None], axis=1)[:, 0]
    nll = jax.nn.logsumexp(scores, axis=1) - target
    return jnp.sum(query_weights * nll)


def next_token_loss(
    hidden: Float[Array, "batch length embed"],
    output_layer: Callable[[Float[Array, "block embed"]], Float[Array, "block vocab"]],
    *,
    targets: Int[Array, "batch length"],
    loss_weights: Float[Array, "batch length"],
    block: int = 1024,
) -> Float[Array, ""]:
    """sum(loss_weights * -log p(target)), with logits made for up to `block` tokens at a time.

    `output_layer` gives float32 logits; the backward pass makes them again, so that no more than one block of them
    exists. Tokens that weigh something come first, and blocks without any are skipped: prompts and padding cost no
    logits.
    """
    order = jnp.argsort(loss_weights.reshape(-1) == 0, stable=True)
    block = next(size for size in range(min(block, len(order)), 0, -1) if len(order) % size == 0)

    def blocks(x):
        return x.reshape(len(order), -1)[order].reshape(-1, block, *x.shape[2:])

    def block_loss(x, target, weight):
        logits = constrain(output_layer(x), "batch", "activation_vocab")
        picked = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        return jnp.sum(weight * (jax.nn.logsumexp(logits, axis=-1) - picked))

    zero = jnp.zeros((), wide(hidden))

    @jax.checkpoint
    def add(total, inputs):
        scored = jnp.any(inputs[-1] != 0)
        return total + jax.lax.cond(scored, block_loss, lambda *_: zero, *inputs), None

    return jax.lax.scan(add, zero, (blocks(hidden), blocks(targets), blocks(loss_weights)))[0]


def balance_loss(
    choices: Float[Array, "per_token experts"], probabilities: Float[Array, " experts"], tokens: Float[Array, ""]
) -> Float[Array, ""]:
    """Experts * sum_{k,e} f[k,e] * P[e]: smallest when tokens are spread evenly (Fedus et al., arXiv 2101.03961).

    f[k,e] is the share of tokens whose k-th choice is expert e and P[e] the mean probability, from the sums of
    `RouterStats`.
    """
    tokens = jnp.maximum(tokens, 1.0)
    return choices.shape[1] * jnp.sum((choices / tokens) @ (probabilities / tokens))
