import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grit_jax.config import OptimizerConfig
from grit_jax.train.optimizer import learning_rate, make_optimizer


def rates(steps, **changes):
    schedule = learning_rate(OptimizerConfig(learning_rate=1.0, **changes), steps)
    return np.array([schedule(jnp.int32(step)) for step in range(steps + 1)])


def test_linear_rates_equal_those_of_transformers():
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    steps, warmup = 40, 4
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = transformers.get_linear_schedule_with_warmup(optimizer, warmup, steps)
    expected = []
    for _ in range(steps):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    assert np.allclose(rates(steps, warmup_ratio=0.1)[:steps], expected, atol=1e-7)


def test_the_first_update_has_rate_zero_and_warmup_is_rounded_up():
    warm = rates(1253)
    assert warm[0] == 0
    assert np.argmax(warm) == 38  # 3 % of the paper's 1253 steps
    assert warm[38] == 1


def test_cosine_and_constant_schedules():
    cosine = rates(10, schedule="cosine", warmup_steps=0)
    assert np.allclose(cosine, 0.5 * (1 + np.cos(np.pi * np.arange(11) / 10)), atol=1e-6)
    assert np.all(rates(10, schedule="constant", warmup_steps=0) == 1)


def updated(config, params, gradient, axes):
    optimizer = make_optimizer(config, 10, axes)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    return jax.tree.map(jnp.add, params, updates)


def test_only_matrices_decay_however_they_are_stacked():
    axes = {"kernel": ("layers", "embed", "mlp"), "scale": ("layers", "embed"), "table": ("vocab", "embed")}
    params = {name: jnp.ones((2,) * len(names)) for name, names in axes.items()}
    config = OptimizerConfig(learning_rate=0.1, schedule="constant", warmup_steps=0, weight_decay=0.5)
    after = updated(config, params, jax.tree.map(jnp.zeros_like, params), axes)
    assert np.allclose(after["kernel"], 0.95)
    assert np.allclose(after["table"], 0.95)
    assert np.all(after["scale"] == 1)


def test_gradients_are_clipped_to_the_global_norm():
    axes, params = {"a": ("embed",), "b": ("embed",)}, {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    config = OptimizerConfig(name="sgd", learning_rate=1.0, schedule="constant", warmup_steps=0, clip_norm=1.0)
    after = updated(config, params, {"a": jnp.full(1, 3.0), "b": jnp.full(1, 4.0)}, axes)
    assert np.allclose([after["a"][0], after["b"][0]], [-0.6, -0.8])
    small = updated(config, params, {"a": jnp.full(1, 0.3), "b": jnp.full(1, 0.4)}, axes)
    assert np.allclose([small["a"][0], small["b"][0]], [-0.3, -0.4])
