"""Float32 matrix products of the benchmark's model here and in PyTorch, on which the other ratios rest.

    python benchmarks/matmul.py
    python benchmarks/matmul.py --tokens 8   # as when 8 completions are written together

For each projection of the model: GFLOP/s of the product, and of its gradients by the input and by the weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import common
import jax
import numpy as np

_SIZES = {
    "query, out": (common.ARCHITECTURE.embed_dim, common.ARCHITECTURE.embed_dim),
    "gate, up": (common.ARCHITECTURE.embed_dim, common.ARCHITECTURE.mlp_dim),
    "down": (common.ARCHITECTURE.mlp_dim, common.ARCHITECTURE.embed_dim),
}
_PRODUCTS = {
    "forward": lambda x, weights, _: x @ weights,
    "input gradient": lambda _, weights, gradient: gradient @ weights.T,
    "weight gradient": lambda x, _, gradient: x.T @ gradient,
}


def _computed(function: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    return function(*arrays).block_until_ready()


def main() -> None:
    """Runs the benchmark."""
    parser = common.parser(__doc__)
    parser.add_argument("--tokens", type=int, default=3072, help="tokens of a product (%(default)s, a packed step's)")
    args = parser.parse_args()
    rng, report = np.random.default_rng(0), {}
    for size, (fan_in, fan_out) in _SIZES.items():
        shapes = (args.tokens, fan_in), (fan_in, fan_out), (args.tokens, fan_out)
        arrays = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
        for product, function in _PRODUCTS.items():
            placed = map(jax.numpy.asarray, arrays)
            sides = {"ours": functools.partial(_computed, jax.jit(function), *placed)}
            if not args.no_torch and common.has_torch():
                import torch

                sides["torch"] = functools.partial(function, *map(torch.from_numpy, arrays))
            seconds, _ = common.alternate(sides, 3 * args.repeats)
            flops = 2 * args.tokens * fan_in * fan_out
            report[f"{size}: {product}"] = {side: round(flops / each.clock / 1e9) for side, each in seconds.items()}
    common.report(report)


if __name__ == "__main__":
    main()
