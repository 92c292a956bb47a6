"""Every family against transformers: import, both attentions, generation, training, export."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from grit_jax.config import Config, LossConfig, ModelConfig
from grit_jax.doctor.batches import embedding_batch, generative_batch, random_texts
from grit_jax.hf.model_folder import open_folder, save_folder
from grit_jax.inference.model import GritModel
from grit_jax.model.transformer import abstract_model, bind
from grit_jax.parallel.execution import PLAIN
from grit_jax.train.objectives import trained_objectives
from grit_jax.train.step import JointObjective
from tests.hf import families
from tests.hf.test_model_folder import whole

pytest.importorskip("torch")
pytest.importorskip("transformers")

TOKENS = np.random.default_rng(0).integers(0, 256, (2, 24)).astype(np.int32)
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=families.CASES)
def imported(request, tmp_path_factory):
    """transformers' model, its folder, and ours read from there."""
    folder = tmp_path_factory.mktemp("family")
    family, settings = families.CASES[request.param]
    theirs = families.make(family, settings)
    families.save(theirs, folder)
    pretrained = open_folder(folder)
    return theirs, folder, pretrained, pretrained.load(whole(pretrained.architecture))


def forward(architecture, params, tokens, *, causal):
    model = bind(abstract_model(architecture), params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    mask = model.mask(jnp.ones_like(tokens), positions, causal=causal)
    hidden, _ = model(jnp.asarray(tokens), mask)
    return model.output_layer(jnp.dtype("float32"))(hidden), hidden


def test_causal_logits_equal_transformers(imported):
    theirs, _, pretrained, params = imported
    expected, _ = families.run(theirs, TOKENS, is_causal=True)
    actual, _ = forward(pretrained.architecture, params, TOKENS, causal=True)
    assert np.max(np.abs(actual - expected)) < TOLERANCE


def test_bidirectional_hidden_states_equal_transformers(imported):
    theirs, _, pretrained, params = imported
    if not pretrained.architecture.window_bidirectional and pretrained.architecture.sliding_window:
        theirs.config.sliding_window = None  # our embedding pass sees the whole text, theirs keeps its window
    try:
        _, expected = families.run(theirs, TOKENS, is_causal=False)
    finally:
        theirs.config.sliding_window = pretrained.architecture.sliding_window
    _, actual = forward(pretrained.architecture, params, TOKENS, causal=False)
    assert np.max(np.abs(actual - expected)) < TOLERANCE


def test_greedy_generation_equals_transformers(imported):
    import torch

    theirs, folder, _, _ = imported
    text = "A heron waits"
    ids = torch.tensor([GritModel.load(folder).tokenizer.encode("<s>" + text).ids.tolist()])
    expected = theirs.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=257, eos_token_id=257)
    model = GritModel.load(folder)
    answer = model.generate(text, raw=True, max_new_tokens=12)
    assert answer == model.tokenizer.decode(expected[0, ids.shape[1] :].tolist())


def test_export_of_an_import_is_bit_identical(imported, tmp_path):
    _, folder, pretrained, params = imported
    save_folder(tmp_path / "hf", pretrained, params)
    stored, again = (safetensors.numpy.load_file(place / "model.safetensors") for place in (folder, tmp_path / "hf"))
    assert stored.keys() == again.keys()
    assert all(np.array_equal(stored[name], again[name]) for name in stored)
    assert open_folder(tmp_path / "hf").architecture == pretrained.architecture


def test_transformers_opens_an_export_and_gives_the_same_logits(imported, tmp_path):
    import transformers

    theirs, _, pretrained, params = imported
    save_folder(tmp_path / "hf", pretrained, params)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    for is_causal in (True, False):
        expected = families.run(theirs, TOKENS, is_causal=is_causal)
        for actual, wanted in zip(families.run(again, TOKENS, is_causal=is_causal), expected, strict=True):
            assert np.array_equal(actual, wanted)


def test_the_joint_loss_trains_every_parameter(imported):
    """Both losses at once: a finite gradient, and one that is not zero, for every parameter of the family."""
    _, _, pretrained, params = imported
    architecture = pretrained.architecture
    config = Config(model=ModelConfig(architecture=architecture), loss=LossConfig(temperature=1.0))
    objective = JointObjective(abstract_model(architecture), trained_objectives(config), PLAIN)
    rng = np.random.default_rng(0)
    texts = random_texts(rng, 6), random_texts(rng, 4)
    batch = {
        "embedding": embedding_batch(texts[0], [[0, 1], [2, 3], [4, 5]], 32, num_queries=2),
        "generative": generative_batch(texts[1], [[0, 1], [2, 3]], 32),
    }
    gradient = jax.jit(jax.grad(lambda params, batch: objective(params, batch)[0]))(params, batch)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.all(np.isfinite(leaf)), path
        assert np.any(leaf != 0), path
