import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grit_jax.losses import contrastive_loss, next_token_loss
from tests.packing import relative_error


def reference_contrastive(query, passage, temperature, weights, ids):
    group, total = len(passage) // len(query), 0.0
    for i, vector in enumerate(query):
        positive = i * group
        kept = [j for j in range(len(passage)) if j == positive or (ids[j] not in (-1, ids[positive]))]
        scores = passage[kept] @ vector / temperature
        total += weights[i] * (
            np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[kept.index(positive)]
        )
    return total


def random_pairs(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(4, 8)), rng.normal(size=(12, 8))


@pytest.mark.parametrize(
    "ids", [np.arange(12), np.array([0, 1, 2, 0, 3, 4, 5, -1, 0, 6, -1, 7])], ids=["distinct", "duplicates and fillers"]
)
def test_contrastive_loss_is_the_cross_entropy_over_all_passages_that_may_be_negatives(ids):
    query, passage = random_pairs()
    weights = np.array([0.25, 0.5, 0.125, 0.0])
    loss = contrastive_loss(
        jnp.asarray(query, jnp.float32),
        jnp.asarray(passage, jnp.float32),
        temperature=0.5,
        query_weights=jnp.asarray(weights, jnp.float32),
        passage_ids=jnp.asarray(ids, jnp.int32),
    )
    assert relative_error(loss, reference_contrastive(query, passage, 0.5, weights, ids)) < 1e-6


def test_filler_queries_leave_finite_gradients():
    query, passage = (jnp.asarray(side, jnp.float32) for side in random_pairs())

    def loss(query, passage):
        ids = jnp.array([0, 1, 2, 3, -1, -1, -1, -1, -1, -1, -1, -1])
        return contrastive_loss(
            query, passage, temperature=0.02, query_weights=jnp.array([1.0, 1.0, 0.0, 0.0]), passage_ids=ids
        )

    for gradient in jax.grad(loss, argnums=(0, 1))(query, passage):
        assert np.all(np.isfinite(gradient))
    assert np.all(jax.grad(loss)(query, passage)[2:] == 0)


def test_blocked_next_token_loss_equals_full_logits_with_gradients():
    rng = np.random.default_rng(0)
    hidden, table = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in [(2, 12, 8), (30, 8)])
    targets = jnp.asarray(rng.integers(0, 30, (2, 12)), jnp.int32)
    weights = jnp.asarray(rng.random((2, 12)) * (rng.random((2, 12)) > 0.3), jnp.float32)

    def full(hidden, table):
        log_probs = jax.nn.log_softmax(hidden @ table.T)
        return -jnp.sum(weights * jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0])

    def blocked(hidden, table):
        return next_token_loss(hidden, lambda x: x @ table.T, targets=targets, loss_weights=weights, block=5)

    expected, actual = (jax.value_and_grad(loss, argnums=(0, 1))(hidden, table) for loss in (full, blocked))
    assert max(jax.tree.leaves(jax.tree.map(relative_error, actual, expected))) < 1e-5


def test_tokens_without_weight_get_no_logits_beyond_the_last_block_with_weight():
    scored = np.random.default_rng(0).permutation(24).reshape(2, 12) < 10
    # Logits of such a hidden state would make the loss NaN.
    hidden = jnp.where(scored[..., None], jnp.ones((2, 12, 8)), jnp.nan)
    options = {"targets": jnp.zeros((2, 12), jnp.int32), "loss_weights": jnp.asarray(scored, jnp.float32)}
    assert jnp.isfinite(next_token_loss(hidden, lambda x: x @ jnp.ones((8, 30)), **options, block=2))
    assert jnp.isnan(next_token_loss(hidden, lambda x: x @ jnp.ones((8, 30)), **options, block=4))


def test_no_array_of_all_logits_exists_in_the_compiled_loss():
    hidden, table = jnp.zeros((4, 512, 8)), jnp.zeros((1000, 8))
    targets, weights = jnp.zeros((4, 512), jnp.int32), jnp.zeros((4, 512))

    def loss(hidden, table):
        return next_token_loss(hidden, lambda x: x @ table.T, targets=targets, loss_weights=weights, block=64)

    memory = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, table).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 512 * 1000 * 4
