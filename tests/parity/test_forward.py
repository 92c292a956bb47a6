"""Hidden states, logits, embeddings and the balance loss of the reference."""

import jax.numpy as jnp
import numpy as np
import pytest

from grit_jax.config import EmbeddingConfig
from grit_jax.data.batch import max_segments
from grit_jax.losses.balance import balance_loss
from grit_jax.losses.language import next_token_loss
from grit_jax.model.pooling import vectors_of
from grit_jax.model.transformer import abstract_model, bind
from tests.parity import golden

FLOAT32 = jnp.dtype("float32")


@pytest.fixture(scope="module", params=["mistral", "mixtral"])
def case(request, shared, tmp_path_factory):
    pretrained, params = golden.load(shared, request.param, tmp_path_factory.mktemp("golden") / "hf")
    model = bind(abstract_model(pretrained.architecture), params)
    return model, golden.tensors(shared, f"forward/{request.param}")


@pytest.mark.parametrize("causal", [True, False])
def test_hidden_states(case, causal):
    model, recorded = case
    batch = golden.embedding_batch([recorded], "mean")
    queries, length = recorded["query.input_ids"].shape
    rows = slice(queries)
    mask = model.mask(jnp.asarray(batch.segment_ids[rows]), jnp.asarray(batch.positions[rows]), causal=causal)
    hidden, _ = model(jnp.asarray(batch.tokens[rows]), mask)
    expected = recorded[f"query.hidden.{'causal' if causal else 'bidirectional'}"]
    real = recorded["query.attention_mask"] == 1
    assert golden.absolute(np.asarray(hidden[:, :length])[real], expected[real]) < golden.HIDDEN


@pytest.mark.parametrize("pooling", golden.POOLING)
@pytest.mark.parametrize("normalized", [True, False])
def test_embeddings(case, pooling, normalized):
    model, recorded = case
    settings = EmbeddingConfig(pooling=golden.POOLING[pooling], normalized=normalized)
    batch = golden.embedding_batch([recorded], settings.pooling)
    segment_ids, weights = jnp.asarray(batch.segment_ids), jnp.asarray(batch.pool_weights)
    hidden, _ = model(jnp.asarray(batch.tokens), model.mask(segment_ids, jnp.asarray(batch.positions), causal=False))
    num_segments = max_segments(hidden.shape[1])
    vectors = vectors_of(model, hidden, segment_ids, weights, num_segments=num_segments, settings=settings)
    ours = np.asarray(vectors).reshape(-1, vectors.shape[-1])[batch.query_slots]
    expected = recorded[f"reps.{pooling}.{'norm' if normalized else 'raw'}.query"]
    assert golden.absolute(ours, expected) < golden.HIDDEN


def test_logits_loss_and_balance(case):
    model, recorded = case
    batch = golden.generative_batch([recorded], "token")
    length = recorded["generative.input_ids"].shape[1]
    # The reference runs its model over padding too, and records the logits there.
    mask = model.mask(jnp.asarray(batch.segment_ids), jnp.asarray(batch.positions), causal=True)
    hidden, stats = model(jnp.asarray(batch.tokens), mask)
    output_layer = model.output_layer(FLOAT32)
    logits = np.asarray(output_layer(hidden))[:, :length]
    real = recorded["generative.attention_mask"] == 1
    ours = np.where(real[..., None], logits, np.nan).reshape(-1)[::7]
    seen = np.isfinite(ours)
    assert golden.absolute(ours[seen], recorded["generative.logits.stride7"][seen]) < golden.HIDDEN
    last = np.flatnonzero(real[0])[-1]
    assert golden.absolute(logits[0, last], recorded["generative.logits.row0_last"]) < golden.HIDDEN
    if stats is not None:
        balance = balance_loss(*stats)
        assert abs(balance - recorded["generative.aux_loss"][0]) < golden.LOSS
        weights, targets = jnp.asarray(batch.loss_weights), jnp.asarray(batch.targets)
        table = model.output_weights(FLOAT32)
        loss, _ = next_token_loss(hidden, table, model.logits, targets=targets, loss_weights=weights)
        loss += 0.02 * balance
        expected = recorded["generative.loss_token_plus_aux"][0]
        # The sum of 300 tokens' losses: float32 has no number between this and the next that is 3e-5 away.
        assert abs(loss - expected) <= max(golden.LOSS, np.spacing(expected))
