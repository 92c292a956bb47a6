"""The loss that spreads tokens evenly over experts."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def balance_loss(
    choices: Float[Array, "per_token experts"], probabilities: Float[Array, " experts"], tokens: Float[Array, ""]
) -> Float[Array, ""]:
    """Experts * sum_{k,e} f[k,e] * P[e]: smallest when tokens are spread evenly (Fedus et al., arXiv 2101.03961).

    f[k,e] is the share of tokens whose k-th choice is expert e and P[e] the mean probability, from the sums of
    `RouterStats`.
    """
    tokens = jnp.maximum(tokens, 1.0)
    return choices.shape[1] * jnp.sum((choices / tokens) @ (probabilities / tokens))
