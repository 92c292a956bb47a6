import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grit_jax import families
from grit_jax.config import OptimizerConfig, TransformerConfig
from grit_jax.model.transformer import abstract_model, param_axes
from grit_jax.train.optimizer import is_matrix, learning_rate, make_optimizer


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


KERNELS = {"attention.query.kernel", "attention.key.kernel", "attention.value.kernel", "attention.out.kernel"}
MLP = {"mlp.gate.kernel", "mlp.up.kernel", "mlp.down.kernel"}
EXPERTS = {"mlp.router.kernel", "mlp.gate", "mlp.up", "mlp.down"}
NORMS = {"attention_norm.scale", "mlp_norm.scale"}
QK_NORMS = {"attention.query_norm.scale", "attention.key_norm.scale"}
POST_NORMS = {"attention_post_norm.scale", "mlp_post_norm.scale"}
BIASES = {"attention.query.bias", "attention.key.bias", "attention.value.bias"}
FAMILIES = {  # settings, what decays in each layer, and what does not
    "llama": ({"tie_embeddings": False}, KERNELS | MLP, NORMS),
    "mistral": ({"tie_embeddings": False}, KERNELS | MLP, NORMS),
    "mixtral": ({"tie_embeddings": False, "num_experts": 4}, KERNELS | EXPERTS, NORMS),
    "qwen2": ({"qkv_bias": True}, KERNELS | MLP, NORMS | BIASES),
    "qwen3": ({"qk_norm": True}, KERNELS | MLP, NORMS | QK_NORMS),
    "gemma2": ({"post_norms": True}, KERNELS | MLP, NORMS | POST_NORMS),
    "gemma3_text": ({"post_norms": True, "qk_norm": True}, KERNELS | MLP, NORMS | POST_NORMS | QK_NORMS),
}  # fmt: skip


@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_matrices_of_every_family_decay_and_no_bias_or_norm(family):
    settings, matrices, others = FAMILIES[family]
    axes = param_axes(abstract_model(TransformerConfig(family=family, **settings).resolve(300), projection_dim=8))
    leaves = jax.tree_util.tree_leaves_with_path(axes, is_leaf=lambda names: isinstance(names, tuple))
    found = {True: set(), False: set()}
    for path, names in leaves:
        found[is_matrix(names)].add(jax.tree_util.keystr(path, simple=True, separator="."))
    head = set() if "tie_embeddings" not in settings else {"head"}
    assert found[True] == {f"layers.{name}" for name in matrices} | {"embedding", "projection.kernel"} | head
    assert found[False] == {f"layers.{name}" for name in others} | {"final_norm.scale", "projection.bias"}


def test_gradients_are_clipped_to_the_global_norm():
    axes, params = {"a": ("embed",), "b": ("embed",)}, {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    config = OptimizerConfig(name="sgd", learning_rate=1.0, schedule="constant", warmup_steps=0, clip_norm=1.0)
    after = updated(config, params, {"a": jnp.full(1, 3.0), "b": jnp.full(1, 4.0)}, axes)
    assert np.allclose([after["a"][0], after["b"][0]], [-0.6, -0.8])
    small = updated(config, params, {"a": jnp.full(1, 0.3), "b": jnp.full(1, 0.4)}, axes)
    assert np.allclose([small["a"][0], small["b"][0]], [-0.3, -0.4])
