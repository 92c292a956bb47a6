"""Whether embeddings use their space, measured on the vectors of a training batch.

The step computes small float32 arrays; the host derives the figures from them when they are needed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from grit_jax.losses.contrastive import exact_einsum
from grit_jax.parallel.execution import wide
from grit_jax.parallel.sharding import constrain

SAMPLE = 256

# Names of the arrays among a step's metrics.
ALIGNMENT, GRAM = "embedding/alignment", "embedding/gram"


def health_parts(query: Float[Array, "queries embed"], passage: Float[Array, "passages embed"]) -> dict[str, jax.Array]:
    """A step's arrays for `health_figures`.

    Args:
      query: Vectors of the queries.
      passage: Vectors of the passages, each query's positive first in its group.

    Returns:
      The alignment over all queries, and the cosines among the positives of the first queries, at most `SAMPLE`.
    """
    query, passage = (_unit(jax.lax.stop_gradient(x).astype(wide(x))) for x in (query, passage))
    positive = passage[:: len(passage) // len(query)]
    sample = constrain(positive[:SAMPLE], "whole", "activation_embed")
    return {
        ALIGNMENT: jnp.mean(jnp.sum(jnp.square(query - positive), axis=1)),
        GRAM: constrain(exact_einsum("id,jd->ij", sample, sample), "whole", "whole"),
    }


def health_figures(gram: np.ndarray) -> dict[str, float]:
    """Figures of n unit vectors from the cosines among them, [n, n].

    - `embedding/uniformity`: log of the mean of exp(-2 |x - y|^2) over pairs (Wang and Isola, arXiv 2005.10242).
    - `embedding/mean_cosine`: over pairs.
    - `embedding/effective_rank`: exp of the entropy of the covariance's eigenvalues as shares of their sum (Roy and
      Vetterli, 2007), at most n - 1. The covariance has the eigenvalues of the centred matrix of products.

    Empty for fewer than two vectors.
    """
    number = len(gram)
    if number < 2:
        return {}
    gram = gram.astype(np.float64)
    pairs = gram[~np.eye(number, dtype=bool)]
    means = gram.mean(axis=0)
    centred = gram - means - means[:, None] + gram.mean()
    values = np.clip(np.linalg.eigvalsh(centred), 0.0, None) if np.all(np.isfinite(gram)) else np.zeros(number)
    shares = values / max(values.sum(), 1e-30)
    shares = shares[shares > 1e-12]
    return {
        "embedding/uniformity": float(np.log(np.mean(np.exp(4.0 * pairs - 4.0)))),
        "embedding/mean_cosine": float(np.mean(pairs)),
        "embedding/effective_rank": float(np.exp(-np.sum(shares * np.log(shares)))),
    }


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12)
