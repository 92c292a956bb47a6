"""The error of summing the gradients of many devices in bfloat16 instead of float32.

    python benchmarks/gradient_sums.py

Prints one JSON object: for each number of devices the relative error of their summed gradient, whose parts every device
rounds to bfloat16 once. `bfloat16` rounds again after every device, as a ring does; `float32` does not.
"""

import argparse
import functools
import json

import jax
import ml_dtypes
import numpy as np

from grit_jax.config import Config, DataConfig, ModelConfig, TransformerConfig
from grit_jax.doctor.batches import generative_batch, random_texts
from grit_jax.model.transformer import abstract_model, init_params
from grit_jax.parallel.execution import PLAIN
from grit_jax.train.objectives import trained_objectives
from grit_jax.train.step import JointObjective

ROWS, LENGTH = 4, 64
ARCHITECTURE = TransformerConfig(embed_dim=64, mlp_dim=192, num_layers=2).resolve(64)


def gradients(num_devices: int) -> np.ndarray:
    """The gradient of the layers' weights by the texts of each device, float32 [devices, weights]."""
    config = Config(model=ModelConfig(architecture=ARCHITECTURE), data=DataConfig(train="unused"))
    objective = JointObjective(abstract_model(ARCHITECTURE), trained_objectives(config), PLAIN)
    params = init_params(ARCHITECTURE, jax.random.key(0))
    gradient = jax.jit(jax.grad(lambda params, batch: objective(params, {"generative": batch})[0]))

    def of_device(seed):
        texts = random_texts(np.random.default_rng(seed), 4 * ROWS)
        batch = generative_batch(texts, [range(row, len(texts), ROWS) for row in range(ROWS)], LENGTH)
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradient(params, batch)["layers"])])

    return np.stack([of_device(seed) for seed in range(num_devices)])


def errors(parts: np.ndarray) -> dict[str, float]:
    """The relative error of each way to sum the parts."""
    exact = parts.sum(axis=0, dtype=np.float64)
    rounded = parts.astype(ml_dtypes.bfloat16)
    sums = {
        # An addition of two numbers in bfloat16 rounds its exact sum.
        "bfloat16": functools.reduce(np.add, rounded),
        "float32": rounded.astype(np.float32).sum(axis=0),
    }
    return {
        name: float(np.linalg.norm(total.astype(np.float64) - exact) / np.linalg.norm(exact))
        for name, total in sums.items()
    }


def main() -> None:
    """Prints the errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[64, 256], help="(%(default)s)")
    args = parser.parse_args()
    parts = gradients(max(args.devices))
    print(json.dumps({str(count): errors(parts[:count]) for count in args.devices}))


if __name__ == "__main__":
    main()
