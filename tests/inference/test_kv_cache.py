"""Keys and values of the embedding pass, and what comes after them."""

import numpy as np
import pytest

from grit_jax.config import EmbeddingConfig, RopeScaling
from grit_jax.errors import InputError
from grit_jax.inference.kv_cache import concatenate
from grit_jax.model.transformer import KVCache, stack_layers
from grit_jax.text import prompts
from tests.models import make

TEXTS = ["one", "a second text " * 9, "three", "x"]
KINDS = {
    "llama": {},
    "causal window": {"family": "mistral", "sliding_window": 8},
    "two-sided window": {"sliding_window": 8, "windowed_layers": (True, False), "window_bidirectional": True},
    "experts": {"family": "mixtral", "num_experts": 4},
}
ROTATIONS = {
    "plain": {},
    "linear": {"rope_scaling": RopeScaling("linear", 4.0)},
    "llama3": {"rope_scaling": RopeScaling("llama3", 8.0, original_length=64)},
    "two bases": {"sliding_window": 64, "windowed_layers": (True, False), "local_rope_theta": 100.0},
}


def close(ours, theirs, tolerance=1e-4):
    """Equal up to the rounding of a batch of another shape, which two layers of large weights enlarge."""
    return np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


def alike(ours, theirs):
    return all(close(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("kind", "stacked"), [*((kind, False) for kind in KINDS), ("two-sided window", True)])
def test_vectors_are_those_of_encode_and_batch_mates_do_not_change_keys(kind, stacked):
    model = make(embedding=EmbeddingConfig(pooling="weighted_mean", projection_dim=8), **KINDS[kind])
    if stacked:
        model.runner.params = stack_layers(model.params)
    found = model.encode_with_caches(TEXTS, instruction="find", max_length=60)
    vectors = model.encode(TEXTS, instruction="find", max_length=60)
    assert np.abs(np.stack([cached.vector for cached in found]) - vectors).max() < 2e-5
    for text, cached in zip(TEXTS, found, strict=True):
        (alone,) = model.encode_with_caches([text], instruction="find", max_length=60)
        assert alike(cached.cache, alone.cache)
    assert found[1].cache.keys.shape == (2, 60, 2, 8)


def test_rows_are_spread_over_devices():
    texts = TEXTS * 2
    for one, two in zip(make().encode_with_caches(texts), make(devices=2).encode_with_caches(texts), strict=True):
        assert alike(two.cache, one.cache)


def test_a_bidirectional_pass_sees_later_tokens_and_a_causal_one_does_not():
    model = make(family="mistral", sliding_window=8)
    for attention, sees in ((None, True), ("causal", False)):
        texts = ["the same start", "the same start and more"]
        short, long = (cached.cache for cached in model.encode_with_caches(texts, attention=attention))
        length = short.keys.shape[1]
        begins = KVCache(long.keys[:, :length], long.values[:, :length])
        assert alike(short, begins) != sees
        assert close(short.values[0], begins.values[0])  # the first layer has seen nothing else


def test_a_second_text_begins_without_bos():
    model = make()
    (first,), (second,) = (model.embedding_prompts(["x"], instruction="i", form=form) for form in prompts.CACHE_FORMS)
    assert model.tokenizer.decode(first.tokens, skip_special_tokens=False) == "<s><|user|>\ni\n<|embed|>\nx"
    assert model.tokenizer.decode(second.tokens, skip_special_tokens=False) == "\n<|user|>\ni\n<|embed|>\nx"


@pytest.mark.parametrize("kind", ROTATIONS)
def test_corrected_keys_are_those_of_the_positions_behind_the_first_text(kind):
    model = make(embedding=EmbeddingConfig(attention="causal"), **ROTATIONS[kind])
    first, second = model.encode_with_caches(["the first text", "the second"])
    num_first = first.cache.keys.shape[1]
    whole = prompts.TokenizedPrompt(
        np.concatenate([model.embedding_prompts([text])[0].tokens for text in ("the first text", "the second")]),
        model.embedding_prompts(["the first text"])[0].spans,
    )
    ((_, read_together),) = model.embed_with_caches([whole])
    own, corrected = (
        concatenate([first.cache, second.cache], model.architecture, corrected=corrected) for corrected in (False, True)
    )
    # In the first layer keys depend on a token and its position alone.
    assert close(corrected.keys[0], read_together.cache.keys[0])
    assert not close(own.keys[0], read_together.cache.keys[0], 0.01)
    assert np.array_equal(own.keys[:, num_first:], second.cache.keys)
    # In the second layer they have seen the first text, or not; rotating them back shows that nothing else differs.
    for layer in range(2):
        norms = (np.linalg.norm(x.reshape(*x.shape[:-1], 2, -1), axis=-2) for x in (own.keys, corrected.keys))
        assert close(*(x[layer] for x in norms))
    assert np.array_equal(own.values, corrected.values)


def test_the_window_has_its_own_base_when_keys_are_moved_on():
    model = make(**ROTATIONS["two bases"])
    (cached,) = model.encode_with_caches(["some text"])
    moved = concatenate([cached.cache, cached.cache], model.architecture, corrected=True)
    plain = concatenate([cached.cache, cached.cache], make().architecture, corrected=True)
    assert not close(moved.keys[0], plain.keys[0], 1e-3)
    assert close(moved.keys[1], plain.keys[1])


def test_an_empty_text_is_refused():
    with pytest.raises(InputError, match="text 1 is empty; leave it out"):
        make().encode_with_caches(["a", ""])


def test_no_texts_have_no_keys_and_values():
    assert concatenate([], make().architecture, corrected=True) is None
