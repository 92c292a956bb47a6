"""The next-token loss. The batch brings the weights; nothing is averaged here."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grit_jax.parallel.execution import map_chunks, num_chunks, wide
from grit_jax.parallel.sharding import constrain

# (hidden [tokens, embed], output weights) -> float32 logits [tokens, vocab].
Logits = Callable[[jax.Array, jax.Array], jax.Array]


def next_token_loss(
    hidden: Float[Array, "batch length embed"],
    output_weights: Float[Array, "vocab embed"],
    logits: Logits,
    *,
    targets: Int[Array, "batch length"],
    loss_weights: Float[Array, "batch length"],
    block: int | None = None,
) -> tuple[Float[Array, ""], Float[Array, "batch length"]]:
    """sum(loss_weights * -log p(target)), computing logits of up to `block` tokens at a time.

    Also returns -log p(target) of every token, 0 where the weight is 0; no gradient flows through it.

    Value and gradient are computed together, block by block, so that logits are computed once and only one block of
    them exists. Tokens with a weight come first, and blocks without any are skipped: prompts and padding cost no
    logits. By default a block has 1024 tokens, or an eighth of all tokens if that is less.
    """
    order = jnp.argsort(loss_weights.reshape(-1) == 0, stable=True)
    number = num_chunks(len(order), block or min(1024, -(-len(order) // 8)))

    def blocks(x):
        ordered = x.reshape(len(order), -1).at[order].get(unique_indices=True)
        return ordered.reshape(number, -1, *x.shape[2:])

    loss, nll = _weighted_nll(logits, output_weights, blocks(hidden), blocks(targets), blocks(loss_weights))
    nll = jnp.zeros(len(order), nll.dtype).at[order].set(jax.lax.stop_gradient(nll).reshape(-1), unique_indices=True)
    return loss, jnp.where(loss_weights == 0, 0, nll.reshape(loss_weights.shape))


def _block_nll(logits: Logits, output_weights, hidden, targets, loss_weights):
    """The weighted sum of a block's losses, and the losses without weights."""
    scores = constrain(logits(hidden, output_weights), "tokens", "activation_vocab")
    nll = _nll(scores, targets)
    return jnp.sum(loss_weights * nll), nll


def _nll(scores, targets):
    picked = jnp.take_along_axis(scores, targets[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(scores, axis=-1) - picked


def _sum_over_blocks(function, zero, blocks):
    """Sums the first result of `function` over blocks and stacks the second; skips blocks without weights."""

    def add(total, *block):
        value, extra = function(*block)
        return jax.tree.map(jnp.add, total, value), extra

    def skip(total, *_):
        return total, zero[1]

    # The branches take the total, so that they add to it in place.
    return jax.lax.scan(
        lambda total, block: jax.lax.cond(jnp.any(block[-1] != 0), add, skip, total, *block), zero[0], blocks
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_nll(logits, output_weights, *blocks):
    zero = jnp.zeros((), wide(blocks[0])), jnp.zeros_like(blocks[-1][0])

    def value(*block):
        loss, nll = _block_nll(logits, output_weights, *block)
        return loss, nll.astype(block[-1].dtype)

    return _sum_over_blocks(value, zero, blocks)


def _weighted_nll_forward(logits, output_weights, *blocks):
    differentiate = jax.value_and_grad(functools.partial(_block_nll, logits), argnums=(0, 1), has_aux=True)

    def value_and_gradient(*block):
        (value, nll), (weights, hidden) = differentiate(output_weights, *block)
        # In float32, as many blocks add up.
        return (value, weights.astype(wide(weights))), (hidden, nll.astype(block[-1].dtype))

    zero = (jnp.zeros((), wide(blocks[0])), jnp.zeros(output_weights.shape, wide(output_weights)))
    no_block = (jnp.zeros_like(blocks[0][0]), jnp.zeros_like(blocks[-1][0]))
    (value, weights), (hidden, nll) = _sum_over_blocks(value_and_gradient, (zero, no_block), blocks)
    return (value, nll), (weights.astype(output_weights.dtype), hidden, nll)


def _weighted_nll_backward(logits, gradients, cotangents):
    cotangent, _ = cotangents
    # Rounded only after the product: bfloat16 would change a loss weight.
    weights, hidden, nll = ((cotangent * gradient).astype(gradient.dtype) for gradient in gradients)
    return weights, hidden, None, nll


_weighted_nll.defvjp(_weighted_nll_forward, _weighted_nll_backward)


def target_log_likelihoods(
    hidden: Float[Array, "targets embed"],
    logits: Callable[[jax.Array], jax.Array],
    targets: Int[Array, " targets"],
    *,
    block: int = 1024,
) -> tuple[Float[Array, " targets"], Bool[Array, " targets"]]:
    """Log p(target) given the hidden state before it, and whether the target is the likeliest token.

    `logits` maps hidden states to logits, up to `block` targets at a time.
    """

    def score(pair):
        scores = constrain(logits(pair[0]), "tokens", "activation_vocab")
        return -_nll(scores, pair[1]), jnp.argmax(scores, axis=-1) == pair[1]

    scored = map_chunks(score, (hidden, targets), num_chunks(len(targets), block))
    return jax.tree.map(lambda x: x.reshape(len(targets)), scored)
