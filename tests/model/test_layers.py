import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from grit_jax.model.layers import Linear
from tests.packing import relative_error


def test_the_gradient_of_a_bias_adds_up_in_float32():
    graph, params = nnx.split(Linear({"embed": 8}, {"heads": 4}, key=jax.random.key(0), bias=True))
    x = jnp.zeros((4, 4096, 8), jnp.bfloat16)
    change = jnp.asarray(np.random.default_rng(0).normal(0.5, 1.0, (4, 4096, 4)), jnp.bfloat16)
    gradient = jax.vjp(lambda params: nnx.merge(graph, params)(x), params)[1](change)[0]
    assert relative_error(gradient.bias[...], np.asarray(change, np.float64).sum(axis=(0, 1))) < 1e-5
