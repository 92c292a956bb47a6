"""The precision lost by each dtype of a store, and the time of exact search.

    python benchmarks/store.py

Vectors are random directions of unit length; each query is one of them with as much noise, so its best score is about
0.7. `score_error` is the difference of scores to those of float32 vectors, `kept` the share of float32's ten best that
stay among the ten best.
"""

from __future__ import annotations

import argparse
import time

import common
import numpy as np

from grit_jax.retrieval.exact_search import Searchable
from grit_jax.retrieval.quantization import DTYPES, pack

QUERIES, BEST = 64, 10


def unit(values: np.ndarray) -> np.ndarray:
    """Rows of unit length."""
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=50_000, help="how many are searched (%(default)s)")
    parser.add_argument("--dim", type=int, default=1024, help="numbers of a vector (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed searches (%(default)s)")
    args = parser.parse_args()
    generator = np.random.default_rng(0)
    vectors = unit(generator.standard_normal((args.vectors, args.dim), np.float32))
    noise = unit(generator.standard_normal((QUERIES, args.dim), np.float32))
    queries = unit(vectors[generator.choice(args.vectors, QUERIES, replace=False)] + noise)
    values, exact = {}, Searchable(vectors)
    scores, (_, best) = exact.scores(queries), exact.top_k(queries, BEST)
    for dtype in DTYPES:
        packed = pack(vectors, dtype)
        searchable = Searchable(**packed)
        error = np.abs(searchable.scores(queries) - scores)
        _, found = searchable.top_k(queries, BEST)
        seconds = []
        for _ in range(args.repeats):
            started = time.perf_counter()
            searchable.top_k(queries, BEST)
            seconds.append(time.perf_counter() - started)
        values[dtype] = {
            "bytes": sum(value.nbytes for value in packed.values()),
            "score_error_max": float(error.max()),
            "score_error_mean": float(error.mean()),
            "kept": float(np.mean([len(set(a) & set(b)) / BEST for a, b in zip(found, best)])),
            "seconds": round(float(np.median(seconds)), 3),
        }
    common.report({"vectors": args.vectors, "dim": args.dim, "queries": QUERIES, **values})


if __name__ == "__main__":
    main()
