import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grit_jax.model.attention import AttentionMask, attention
from grit_jax.model.layers import rotate, rotation
from tests.packing import relative_error

SEGMENTS = jnp.array([[1, 1, 1, 2, 2, 0]])
POSITIONS = jnp.array([[0, 1, 2, 0, 1, 0]])


def drawn(**options):
    mask = AttentionMask.of_rows(SEGMENTS, POSITIONS, **options).materialize()[0]
    return ["".join("x" if seen else "." for seen in row) for row in np.asarray(mask)]


def test_masks_are_those_of_the_docstring():
    assert drawn(causal=True, window=None) == ["x.....", "xx....", "xxx...", "...x..", "...xx.", ".....x"]
    assert drawn(causal=False, window=None) == ["xxx...", "xxx...", "xxx...", "...xx.", "...xx.", ".....x"]


def test_a_window_limits_attention_on_the_sides_that_are_seen():
    assert drawn(causal=True, window=2) == ["x.....", "xx....", ".xx...", "...x..", "...xx.", ".....x"]
    assert drawn(causal=False, window=1) == ["xx....", "xxx...", ".xx...", "...xx.", "...xx.", ".....x"]


@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 2), (False, None), (False, 1)])
def test_grouped_attention_equals_a_loop_over_heads(causal, window):
    keys = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(keys[0], (1, 6, 4, 8))
    key, value = (jax.random.normal(k, (1, 6, 2, 8)) for k in keys[1:])
    mask = AttentionMask.of_rows(SEGMENTS, POSITIONS, causal=causal, window=window)
    visible = np.asarray(mask.materialize()[0])
    expected = np.zeros((6, 4, 8))
    for head in range(4):
        scores = np.asarray(query[0, :, head] @ key[0, :, head // 2].T, np.float64) / np.sqrt(8)
        weights = np.where(visible, np.exp(scores), 0)
        expected[:, head] = weights / weights.sum(1, keepdims=True) @ np.asarray(value[0, :, head // 2])
    assert relative_error(attention(query, key, value, mask, scale=8**-0.5, soft_cap=None)[0], expected) < 1e-6


def test_rotation_makes_scores_depend_on_distance_alone():
    query, key = jax.random.normal(jax.random.key(1), (2, 1, 1, 1, 8))

    def score(query_position, key_position):
        by = [
            rotation(jnp.array([[position]]), head_dim=8, theta=100.0, scaling=None)
            for position in (query_position, key_position)
        ]
        return float(jnp.sum(rotate(query, by[0]) * rotate(key, by[1])))

    assert np.isclose(score(7, 3), score(104, 100), rtol=1e-4)
    assert not np.isclose(score(7, 3), score(8, 3), rtol=1e-3)
