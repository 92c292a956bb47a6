"""Random small architectures of every family, exported and opened by transformers."""

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from grit_jax.config import EmbeddingConfig, RopeScaling, TransformerConfig
from grit_jax.families import FAMILIES
from grit_jax.hf.config_json import read_config, write_config
from grit_jax.hf.model_folder import open_folder, save_folder
from grit_jax.model.pretrained import Pretrained
from grit_jax.model.transformer import init_params
from grit_jax.text.tokenizer import Tokenizer
from tests.hf import families
from tests.hf.test_families import TOKENS, TOLERANCE, forward
from tests.hf.test_model_folder import same, whole

transformers = pytest.importorskip("transformers")

_GEMMA = {"activation": "gelu_tanh", "norm_offset": 1.0, "post_norms": True, "scale_embedding": True}


@st.composite
def architectures(draw, family):
    """Anything that a family can express, at a size that takes a second."""
    num_kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    num_layers = draw(st.integers(1, 3))
    window = draw(st.none() | st.integers(2, 12))
    fields = {
        "family": family,
        # transformers wants multiples of the heads and, where there are experts, of 16 bytes
        "embed_dim": num_kv_heads * group * draw(st.sampled_from([4, 8, 12])),
        "mlp_dim": 4 * draw(st.integers(2, 10)),
        "num_layers": num_layers,
        "num_heads": num_kv_heads * group,
        "num_kv_heads": num_kv_heads,
        "head_dim": draw(st.sampled_from([4, 6, 8])),
        "max_length": draw(st.integers(24, 500)),
        "rope_theta": draw(st.sampled_from([1e3, 1e4, 5e5])),
        "norm_epsilon": draw(st.sampled_from([1e-6, 1e-5])),
        "tie_embeddings": draw(st.booleans()),
    }
    if family == "llama":
        llama3 = st.builds(
            RopeScaling, st.just("llama3"), st.floats(1, 32), st.just(1.0), st.just(4.0), st.integers(16, 64)
        )
        fields["rope_scaling"] = draw(st.none() | st.builds(RopeScaling, st.just("linear"), st.floats(1, 8)) | llama3)
    if family in ("mistral", "mixtral"):
        fields["sliding_window"] = window
    if family == "mixtral":
        experts = draw(st.integers(2, 5))
        fields |= {"num_experts": experts, "experts_per_token": draw(st.integers(1, experts))}
    if family == "qwen2":
        fields["qkv_bias"] = True
    if family in ("qwen3", "gemma3_text"):
        fields["qk_norm"] = True
    if family in ("qwen2", "qwen3", "gemma2", "gemma3_text"):
        fields["window_bidirectional"] = True
        layers = draw(st.tuples(*[st.booleans()] * num_layers))
        if window and any(layers):
            fields |= {"sliding_window": window, "windowed_layers": () if all(layers) else layers}
    if family in ("gemma2", "gemma3_text"):
        fields |= _GEMMA | {"attention_scale_dim": draw(st.none() | st.sampled_from([16, 10]))}
        fields |= {"attention_soft_cap": draw(st.sampled_from([None, 2.0])) if family == "gemma2" else None}
        fields |= {"logit_soft_cap": draw(st.sampled_from([None, 3.0]))}
    if family == "gemma3_text":
        fields["local_rope_theta"] = draw(st.sampled_from([1e3, 1e4]))
    return TransformerConfig(**fields).resolve(258)


each_family = pytest.mark.parametrize("family", FAMILIES)


def options(max_examples):
    return settings(
        max_examples=max_examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate],  # every example compiles: shrinking one would take minutes
    )


@each_family
def test_a_config_says_everything_about_an_architecture(family):
    @options(50)
    @given(architectures(family))
    def check(architecture):
        written = write_config(architecture, dtype="float32", bos_id=256, eos_id=257)
        assert read_config(written, source="config.json") == architecture

    check()


def agrees_with_transformers(architecture, folder):
    params = init_params(architecture, jax.random.key(1))
    params = jax.tree.map(lambda x: x + 0.2 * np.random.default_rng(0).normal(size=x.shape).astype(np.float32), params)
    pretrained = Pretrained(architecture, EmbeddingConfig(), Tokenizer.load("bytes"), lambda *_: params)
    save_folder(folder, pretrained, params)
    again = open_folder(folder)
    assert again.architecture == architecture
    assert same(again.load(whole(architecture)), params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    expected, _ = families.run(theirs, TOKENS, is_causal=True)
    actual, _ = forward(architecture, params, TOKENS, causal=True)
    assert np.max(np.abs(actual - expected)) < TOLERANCE * max(1, np.max(np.abs(expected)))
    if architecture.window_bidirectional or architecture.sliding_window is None:
        _, expected = families.run(theirs, TOKENS, is_causal=False)
        _, actual = forward(architecture, params, TOKENS, causal=False)
        assert np.max(np.abs(actual - expected)) < TOLERANCE * max(1, np.max(np.abs(expected)))


def check_examples(family, folder, max_examples):
    @options(max_examples)
    @given(architectures(family))
    def check(architecture):
        agrees_with_transformers(architecture, folder)

    check()


@each_family
def test_random_architectures_agree_with_transformers(family, tmp_path):
    check_examples(family, tmp_path / "hf", 1)


@pytest.mark.long
@each_family
def test_many_random_architectures_agree_with_transformers(family, tmp_path):
    check_examples(family, tmp_path / "hf", 15)
