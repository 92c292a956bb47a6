"""The laws of adapters in the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from grit_jax.config import LoRAConfig
from grit_jax.errors import InputError
from grit_jax.families import FAMILIES
from grit_jax.inference.decode import _advance
from grit_jax.model.lora import dropped, merged, token_noise
from grit_jax.model.transformer import KVCache, abstract_model, bind, init_params
from tests.models import shape, weights
from tests.packing import relative_error

LORA = LoRAConfig(r=4, alpha=6.0)
GEMMA = {"family": "gemma3_text", "qk_norm": True, "post_norms": True, "sliding_window": 4, "num_layers": 3}
GEMMA |= {"windowed_layers": (True, False, True), "local_rope_theta": 100.0}


def adapted(config, lora=LORA, *, zero=False):
    """Parameters whose adapters matter, unless B is as new."""
    params = flatten_dict(init_params(config, jax.random.key(0), None, lora))
    base = flatten_dict(weights(config))
    for number, path in enumerate(params):
        if path in base:
            params[path] = base[path]
        elif path[-1] == "b" and not zero:
            params[path] = 0.3 * jax.random.normal(jax.random.key(number), params[path].shape)
    return unflatten_dict(params)


def hidden(config, params, lora=LORA, *, causal):
    model = bind(abstract_model(config, None, lora), params)
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, config.vocab_size)
    positions = jnp.broadcast_to(jnp.arange(9), tokens.shape)
    return model(tokens, model.mask(jnp.ones_like(tokens), positions, causal=causal))[0]


def cached(config, params, lora=LORA):
    """Hidden states of tokens read through a KV cache."""
    model = bind(abstract_model(config, None, lora), params)
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, config.vocab_size)
    shapes = (config.num_layers, 2, 9, config.num_kv_heads, config.head_dim)
    cache = KVCache(jnp.zeros(shapes), jnp.zeros(shapes))
    return _advance(model, tokens, jnp.broadcast_to(jnp.arange(9), tokens.shape), cache)[0]


@pytest.mark.parametrize("changes", [{}, GEMMA], ids=["llama", "gemma3"])
def test_new_adapters_change_no_bit_and_others_are_merged_into_the_same_model(changes):
    config = shape(**changes)
    base, none = weights(config), LoRAConfig()
    new, used = adapted(config, zero=True), adapted(config)
    with jax.default_matmul_precision("highest"):
        for run in (lambda *given: hidden(*given, causal=False), lambda *given: hidden(*given, causal=True), cached):
            expected = run(config, base, none)
            assert np.array_equal(run(config, new, LORA), expected)
            assert relative_error(run(config, used, LORA), expected) > 0.01
            assert relative_error(run(config, merged(used, config, LORA), none), run(config, used, LORA)) < 1e-5


def test_a_is_uniform_as_peft_makes_it_and_b_is_zero():
    config = shape(embed_dim=64, mlp_dim=512)
    params = flatten_dict(init_params(config, jax.random.key(0), None, LoRAConfig(r=16)), sep=".")
    for path, fan_in in (("layers.attention.query", 64), ("layers.mlp.down", 512)):
        # torch's kaiming_uniform_(a=sqrt(5)) has the bound sqrt(6 / ((1 + 5) * fan_in)).
        values, bound = np.asarray(params[f"{path}.lora.a"]), fan_in**-0.5
        assert 0.98 * bound < np.abs(values).max() <= bound
        assert abs(values.std() / (bound / 3**0.5) - 1) < 0.05
        assert not np.any(params[f"{path}.lora.b"])
    assert not np.array_equal(params["layers.mlp.gate.lora.a"], params["layers.mlp.up.lora.a"])


def test_the_scale_is_that_of_peft():
    assert LoRAConfig(r=16, alpha=32).scale == 2
    assert LoRAConfig(r=16, alpha=32, use_rslora=True).scale == 8


def test_modules_have_pefts_names_in_every_family():
    dense = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert {name: list(family.modules) for name, family in FAMILIES.items()} == {
        name: dense[:4] if name == "mixtral" else dense for name in FAMILIES
    }
    params = init_params(shape(), jax.random.key(0), None, LoRAConfig(r=2, target_modules=["v_proj", "q_proj"]))
    found = {path[:3] for path in flatten_dict(params) if "lora" in path}
    assert found == {("layers", "attention", "query"), ("layers", "attention", "value")}


@pytest.mark.parametrize(
    ("lora", "changes", "message"),
    [
        (
            {"target_modules": ["q_prj"]}, {},
            r"lora.target_modules: llama has no module 'q_prj'; did you mean 'q_proj'\? There are q_proj, k_proj",
        ),
        (
            {"target_modules": ["q_proj", "w1"]}, {"family": "mixtral", "num_experts": 4},
            "lora.target_modules: w1 of mixtral belongs to its experts, which get no adapters; there are q_proj, ",
        ),
        (
            {"r": 17}, {},
            "lora.r=17 is above the rank of k_proj, a matrix of 32 x 16; lower it to 16, or leave k_proj out of",
        ),
    ],
)  # fmt: skip
def test_adapters_that_a_model_cannot_have_are_refused(lora, changes, message):
    with pytest.raises(InputError, match=message):
        abstract_model(shape(**changes), None, LoRAConfig(**{"r": 2} | lora))


def test_a_tokens_noise_depends_on_seed_step_text_and_position_alone():
    def noise(rows, seed=0, step=3):
        tokens, segments = np.zeros((len(rows), 12), int), np.zeros((len(rows), 12), int)
        positions = np.zeros((len(rows), 12), int)
        for row, texts in enumerate(rows):
            end = 0
            for segment, text in enumerate(texts, start=1):
                part = slice(end, end := end + len(text))
                tokens[row, part], segments[row, part], positions[row, part] = text, segment, range(len(text))
        arrays = map(jnp.asarray, (tokens, segments, positions))
        return np.asarray(token_noise(*arrays, seed=seed, step=jnp.int32(step)))

    one, other, third = [5, 6, 5, 5], [5, 5, 6], [7, 7]
    alone = noise([[one], [other], [third]])
    packed = noise([[third, one, other]])
    assert np.array_equal(packed[0, :9], np.concatenate([alone[2, :2], alone[0, :4], alone[1, :3]]))
    assert len(set(packed[0, :9].tolist())) == 9, "equal tokens of other texts and positions have other noise"
    for changed in (noise([[one]], seed=1), noise([[one]], step=4), noise([[one[::-1]]])):
        assert not set(changed[0, :4].tolist()) & set(alone[0, :4].tolist())


def test_dropout_keeps_its_share_and_the_mean():
    positions = jnp.arange(2000)[None]
    noise = token_noise(positions, jnp.ones_like(positions), positions, seed=0, step=jnp.int32(0))[0]
    out = np.asarray(dropped(jnp.ones((2000, 64)), noise, 0.25))
    assert set(np.unique(out).tolist()) == {0.0, float(np.float32(1 / 0.75))}
    assert abs((out > 0).mean() - 0.75) < 0.005
    assert np.abs((out > 0).mean(axis=0) - 0.75).max() < 0.06
    assert np.abs(np.corrcoef((out > 0).T) - np.eye(64)).max() < 0.15


def test_dropout_is_of_training_alone():
    config = shape()
    params = adapted(config)
    assert np.array_equal(
        hidden(config, params, LoRAConfig(r=4, alpha=6.0, dropout=0.9), causal=True),
        hidden(config, params, causal=True),
    )
