import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grit_jax.config import MeshConfig
from grit_jax.errors import InputError
from grit_jax.model import blockwise
from grit_jax.model.attention import AttentionMask, attention
from grit_jax.model.layers import rotate, rotation
from grit_jax.parallel import sharding
from grit_jax.parallel.execution import PLAIN, Execution
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


def packed_rows(length=256, heads=4, kv_heads=2, head_dim=128):
    """Random queries, keys and values of two rows: three texts and padding, and one text."""
    keys = jax.random.split(jax.random.key(0), 4)
    query, key, value, cotangent = (
        jax.random.normal(k, (2, length, count, head_dim))
        for k, count in zip(keys, (heads, kv_heads, kv_heads, heads), strict=True)
    )
    lengths = [[2 * length // 5, length // 8, length // 3], [length]]
    segments, positions = np.zeros((2, 2, length), np.int32)
    for row, texts in enumerate(lengths):
        start = 0
        for number, size in enumerate(texts, start=1):
            segments[row, start : start + size] = number
            positions[row, start : start + size] = np.arange(size)
            start += size
    return query, key, value, cotangent, jnp.asarray(segments), jnp.asarray(positions)


def value_and_gradients(execution, *, causal, window, soft_cap=None, mesh=None, length=256):
    query, key, value, cotangent, segments, positions = packed_rows(length)
    mask = AttentionMask.of_rows(segments, positions, causal=causal, window=window)

    def attend(query, key, value):
        out = attention(query, key, value, mask, scale=0.1, soft_cap=soft_cap, execution=execution)
        return jnp.where((segments > 0)[..., None, None], out, 0)  # what padding gets is nobody's business

    def run(query, key, value, cotangent):
        out, pull = jax.vjp(attend, query, key, value)
        return out, *pull(cotangent)

    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        return jax.jit(run)(query, key, value, cotangent)


SPLASH = Execution(jnp.dtype("float32"), attention="splash", interpret=True)
BLOCKWISE = Execution(jnp.dtype("float32"), attention="blockwise")


@pytest.mark.parametrize("kernel", [SPLASH, BLOCKWISE], ids=lambda kernel: kernel.attention)
@pytest.mark.parametrize(
    ("causal", "window", "soft_cap"), [(True, None, None), (True, 40, None), (False, None, 20.0), (False, 40, None)]
)
def test_kernels_equal_the_dense_attention_with_gradients(kernel, causal, window, soft_cap):
    options = {"causal": causal, "window": window, "soft_cap": soft_cap}
    actual, expected = (value_and_gradients(execution, **options) for execution in (kernel, PLAIN))
    assert max(map(relative_error, actual, expected)) < 1e-5


@pytest.mark.parametrize("kernel", [SPLASH, BLOCKWISE], ids=lambda kernel: kernel.attention)
def test_kernels_split_over_rows_and_heads_equal_the_whole(kernel):
    mesh = sharding.make_mesh(MeshConfig(2, 1, 2), jax.devices()[:4])
    actual = value_and_gradients(kernel, causal=True, window=None, mesh=mesh)
    expected = value_and_gradients(PLAIN, causal=True, window=None)
    assert max(map(relative_error, actual, expected)) < 1e-5


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [6, 100, 200])
def test_blockwise_attention_takes_rows_of_any_length(length, causal):
    options = {"causal": causal, "window": None, "length": length}
    actual, expected = (value_and_gradients(execution, **options) for execution in (BLOCKWISE, PLAIN))
    assert max(map(relative_error, actual, expected)) < 1e-5


def test_blockwise_attention_skips_tiles_that_nobody_sees():
    """The products of a row cost what its texts ask for: a loop over the tiles in sight, counted here."""
    rows, length = 2, 512
    short = jnp.repeat(jnp.arange(1, length // 64 + 1), 64)[None].repeat(rows, 0)
    counts = {}
    for name, segments, causal in [
        ("short", short, False),
        ("one", short * 0 + 1, False),
        ("half", short * 0 + 1, True),
    ]:
        tiles = blockwise._Tiles(causal, None, None, 8)
        counts[name] = int(tiles.in_sight(segments.reshape(rows, 8, 64).swapaxes(0, 1))[2])
    assert counts == {"short": 8, "one": 64, "half": 36}


def test_rows_that_splash_attention_does_not_take_are_refused():
    rows = jnp.ones((1, 100), jnp.int32)
    mask = AttentionMask.of_rows(rows, rows, causal=True, window=None)
    x = jnp.ones((1, 100, 2, 128))
    with pytest.raises(InputError, match="rows of 100 tokens: splash attention needs a multiple of 128"):
        attention(x, x, x, mask, scale=1.0, soft_cap=None, execution=Execution(x.dtype, attention="splash"))


@pytest.mark.parametrize("causal", [True, False])
def test_what_cudnn_is_asked_for_equals_the_dense_attention(monkeypatch, causal):
    """JAX's front door takes the same arguments for cuDNN, which needs a GPU, and for XLA, which does not."""
    asked = []
    front_door = jax.nn.dot_product_attention

    def on_xla(*arguments, implementation, **options):
        asked.append(implementation)
        return front_door(*arguments, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", on_xla)
    cudnn = Execution(jnp.dtype("float32"), attention="cudnn")
    actual, expected = (value_and_gradients(execution, causal=causal, window=40) for execution in (cudnn, PLAIN))
    assert asked == ["cudnn"]
    assert max(map(relative_error, actual, expected)) < 1e-5


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
