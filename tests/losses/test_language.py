import jax
import jax.numpy as jnp
import numpy as np

from grit_jax.losses.language import next_token_loss, target_log_likelihoods
from tests.packing import relative_error


def logits(hidden, weights):
    return hidden @ weights.T


def test_blocked_next_token_loss_equals_full_logits_with_gradients():
    rng = np.random.default_rng(0)
    hidden, table = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in [(2, 12, 8), (30, 8)])
    targets = jnp.asarray(rng.integers(0, 30, (2, 12)), jnp.int32)
    weights = jnp.asarray(rng.random((2, 12)) * (rng.random((2, 12)) > 0.3), jnp.float32)

    def full(hidden, table):
        log_probs = jax.nn.log_softmax(hidden @ table.T)
        return -jnp.sum(weights * jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0])

    def blocked(hidden, table):
        loss, _ = next_token_loss(
            hidden, table, lambda x, table: x @ table.T, targets=targets, loss_weights=weights, block=5
        )
        return loss

    expected, actual = (jax.value_and_grad(loss, argnums=(0, 1))(hidden, table) for loss in (full, blocked))
    assert max(jax.tree.leaves(jax.tree.map(relative_error, actual, expected))) < 1e-5


def test_beside_the_loss_is_that_of_each_scored_token_and_no_gradient_flows_through_it():
    rng = np.random.default_rng(0)
    hidden, table = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in [(2, 12, 8), (30, 8)])
    targets = jnp.asarray(rng.integers(0, 30, (2, 12)), jnp.int32)
    weights = jnp.asarray(np.arange(24).reshape(2, 12) % 3, jnp.float32)

    def nll(hidden):
        return next_token_loss(hidden, table, logits, targets=targets, loss_weights=weights, block=4)[1]

    log_probs = jax.nn.log_softmax(hidden @ table.T)
    expected = -jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
    assert relative_error(nll(hidden), jnp.where(weights != 0, expected, 0)) < 1e-5
    assert not jnp.any(jax.grad(lambda hidden: jnp.sum(nll(hidden)))(hidden))


def test_tokens_without_weight_get_no_logits_beyond_the_last_block_with_weight():
    scored = np.random.default_rng(0).permutation(24).reshape(2, 12) < 10
    # Logits of such a hidden state would make the loss NaN.
    hidden = jnp.where(scored[..., None], jnp.ones((2, 12, 8)), jnp.nan)
    options = {"targets": jnp.zeros((2, 12), jnp.int32), "loss_weights": jnp.asarray(scored, jnp.float32)}
    assert jnp.isfinite(next_token_loss(hidden, jnp.ones((30, 8)), logits, **options, block=2)[0])
    assert jnp.isnan(next_token_loss(hidden, jnp.ones((30, 8)), logits, **options, block=4)[0])


def test_no_array_of_all_logits_exists_in_the_compiled_loss():
    hidden, table = jnp.zeros((4, 512, 8)), jnp.zeros((1000, 8))
    targets, weights = jnp.zeros((4, 512), jnp.int32), jnp.zeros((4, 512))

    def loss(hidden, table):
        loss, _ = next_token_loss(
            hidden, table, lambda x, table: x @ table.T, targets=targets, loss_weights=weights, block=64
        )
        return loss

    memory = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, table).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 512 * 1000 * 4


def test_log_likelihoods_of_targets_do_not_depend_on_the_blocks():
    keys = jax.random.split(jax.random.key(3), 3)
    hidden, table = jax.random.normal(keys[0], (48, 8)), jax.random.normal(keys[1], (30, 8))
    targets = jax.random.randint(keys[2], 48, 0, 30)
    logits = hidden @ table.T
    expected = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=1)[:, 0]
    for block in (48, 16, 7):
        values, likeliest = target_log_likelihoods(hidden, lambda x: x @ table.T, targets, block=block)
        assert jnp.allclose(values, expected, atol=1e-5)
        assert jnp.array_equal(likeliest, logits.argmax(axis=1) == targets)
