import contextlib
import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as fused
from jax._src.cudnn.fused_attention_stablehlo import MaskType
from jax._src.interpreters import mlir

from grit_jax.config import MeshConfig
from grit_jax.errors import InputError
from grit_jax.model import blockwise
from grit_jax.model.attention import AttentionMask, attention
from grit_jax.model.cudnn_packed import cudnn_packed_attention, text_spans
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
    *arrays, segments, positions = packed_rows(length)
    query, key, value, cotangent = (x.astype(execution.dtype) for x in arrays)
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


def cudnn_by_offsets(query, key, value, _bias, q_lengths, kv_lengths, q_offsets, kv_offsets, *_, mask_type, scale):
    """What cuDNN computes from ragged offsets: text `i` begins at element `offsets[i]` and has `lengths[i]` tokens.

    What no text covers is not written; here it is NaN.
    """

    def places(x, lengths, offsets):  # [texts, tokens], counted from the beginning of each text
        tokens, width = x.shape[0] * x.shape[1], x.shape[2] * x.shape[3]
        texts = lengths.size
        at = jnp.arange(tokens) * width - offsets.reshape(-1)[:texts, None]
        return at // width, (at >= 0) & (at < lengths.reshape(-1)[:, None] * width)

    (q_at, q_in), (k_at, k_in) = places(query, q_lengths, q_offsets), places(key, kv_lengths, kv_offsets)
    seen = q_in[:, :, None] & k_in[:, None, :]
    if mask_type is MaskType.PADDING_CAUSAL:
        seen &= k_at[:, None, :] <= q_at[:, :, None]
    seen, group = seen.any(0), query.shape[2] // key.shape[2]

    def attend(query, key, value):
        flat = [x.reshape(-1, *x.shape[2:]).astype(jnp.float32) for x in (query, key, value)]
        key_heads, value_heads = (jnp.repeat(x, group, axis=1) for x in flat[1:])
        scores = scale * jnp.einsum("qnh,knh->nqk", flat[0], key_heads)
        weights = jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1)
        return jnp.einsum("nqk,knh->qnh", weights, value_heads).reshape(query.shape).astype(query.dtype)

    def written(x, inside):
        return jnp.where(inside.any(0).reshape(*x.shape[:2], 1, 1), x, jnp.nan)

    return attend, written, q_in, k_in


def cudnn_forward(*operands, is_training, mask_type, scale, **_):
    attend, written, inside, _ = cudnn_by_offsets(*operands, mask_type=mask_type, scale=scale)
    query, lengths = operands[0], operands[4]
    out = written(attend(*operands[:3]), inside)
    rows, length, heads, _ = query.shape
    return [out, jnp.zeros((rows * lengths.shape[1], heads, length), jnp.float32)][: 2 if is_training else 1]


def cudnn_backward(*operands, mask_type, scale, **_):
    attend, written, q_in, k_in = cudnn_by_offsets(*operands[:10], mask_type=mask_type, scale=scale)
    _, pull = jax.vjp(attend, *operands[:3])
    gradients = pull(jnp.where(q_in.any(0).reshape(*operands[0].shape[:2], 1, 1), operands[12], 0))
    return [written(x, inside) for x, inside in zip(gradients, (q_in, k_in, k_in), strict=True)]


@pytest.fixture
def hopper(monkeypatch):
    """A Hopper GPU and its cuDNN, as far as JAX looks at them."""
    monkeypatch.setattr(fused, "cuda_versions", SimpleNamespace(cudnn_get_version=lambda: 91300))
    monkeypatch.setattr(fused, "check_compute_capability", lambda capability: True)


@pytest.fixture
def emulated_cudnn(hopper):
    """What takes the place of cuDNN's custom calls gets the very operands that JAX makes for them."""
    for primitive, emulated in (
        (fused._dot_product_attention_fwd_p, cudnn_forward),
        (fused._dot_product_attention_bwd_p, cudnn_backward),
    ):
        mlir.register_lowering(primitive, mlir.lower_fun(emulated, multiple_results=True), platform="cpu")


CUDNN_PACKED = Execution(jnp.dtype("bfloat16"), attention="cudnn_packed")


@pytest.mark.parametrize("causal", [True, False])
def test_attention_by_offsets_equals_the_dense_attention_with_gradients(emulated_cudnn, causal):
    actual, expected = (
        value_and_gradients(execution, causal=causal, window=None) for execution in (CUDNN_PACKED, PLAIN)
    )
    assert max(map(relative_error, actual, expected)) < 2e-2


def test_attention_by_offsets_split_over_rows_and_heads_equals_the_whole(emulated_cudnn):
    mesh = sharding.make_mesh(MeshConfig(2, 1, 2), jax.devices()[:4])
    actual = value_and_gradients(CUDNN_PACKED, causal=True, window=None, mesh=mesh)
    expected = value_and_gradients(PLAIN, causal=True, window=None)
    assert max(map(relative_error, actual, expected)) < 2e-2


@pytest.mark.parametrize("causal", [True, False])
def test_a_window_that_covers_every_row_goes_through_attention_by_offsets(emulated_cudnn, causal):
    least = 256 if causal else 255
    actual = value_and_gradients(CUDNN_PACKED, causal=causal, window=least)
    assert max(map(relative_error, actual, value_and_gradients(PLAIN, causal=causal, window=None))) < 2e-2
    with pytest.raises(InputError, match=f"sliding_window={least - 1} is less than rows of 256 tokens; use cudnn"):
        value_and_gradients(CUDNN_PACKED, causal=causal, window=least - 1)


def test_spans_of_texts_are_their_offsets_and_lengths():
    segments = jnp.array([[1, 1, 1, 2, 2, 0], [0] * 6, [1] * 6, [1, 2, 3, 0, 0, 0]])
    offsets, lengths = text_spans(segments, 3)
    assert offsets.tolist() == [[0, 3, -1], [-1] * 3, [0, -1, -1], [0, 1, 2]]
    assert lengths.tolist() == [[3, 2, -1], [-1] * 3, [6, -1, -1], [1, 1, 1]]


def test_a_row_with_more_texts_than_its_bound_is_never_taken_for_attended(emulated_cudnn):
    segments = jnp.stack([jnp.ones(16, jnp.int32), jnp.repeat(jnp.arange(1, 5), 4)])  # two texts at most
    x = jnp.ones((2, 16, 1, 8), jnp.bfloat16)
    out = cudnn_packed_attention(x, x, x, segments, scale=1.0, causal=True)
    assert jnp.isfinite(out[0]).all()
    assert jnp.isnan(out[1]).all()


@pytest.mark.parametrize("causal", [True, False])
def test_programs_for_gpus_call_cudnn_with_offsets_and_without_a_mask(hopper, causal):
    rows, heads = jax.ShapeDtypeStruct((2, 64), jnp.int32), jax.ShapeDtypeStruct((2, 64, 4, 16), jnp.bfloat16)
    kv_heads = jax.ShapeDtypeStruct((2, 64, 2, 16), jnp.bfloat16)

    def run(query, key, value, segments):
        attend = functools.partial(cudnn_packed_attention, segment_ids=segments, scale=0.1, causal=causal)
        return jax.vjp(attend, query, key, value)[1](query)

    lowered = jax.jit(run).trace(heads, kv_heads, kv_heads, rows).lower(lowering_platforms=("cuda",)).as_text()
    calls = dict(re.findall(r"@__cudnn\$(\w+)\(.*?\) \{.*? : \((.*?)\) ->", lowered))
    per_head, lengths, offsets = "tensor<2x64x4x16xbf16>", "tensor<2x8xi32>", "tensor<2x9xi32>"
    spans = [lengths, lengths, offsets, offsets]
    stats, out = "tensor<16x4x64xf32>", per_head
    assert calls == {
        "fmhaSoftmax": ", ".join([per_head] * 3 + spans),
        "fmhaSoftmaxBackward": ", ".join([per_head] * 3 + [stats, out, out, *spans]),
    }
    assert lowered.count(f"\\22{'PADDING_CAUSAL' if causal else 'PADDING'}\\22") == 2


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 8, 1, 12), "bfloat16", "a multiple of 8 up to 256, not model.architecture.head_dim=12; set it to dense"),
        ((1, 8, 1, 8), "float32", "activations in bfloat16, not float32; set model.compute_dtype=bfloat16"),
        ((2**16, 512, 1, 64), "bfloat16", "65536 rows of 512 tokens .* are 2147483648; lower model.layer_rows"),
    ],
)
def test_what_attention_by_offsets_does_not_take_is_refused(shape, dtype, message):
    x, rows = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct(shape[:2], jnp.int32)
    with pytest.raises(InputError, match=message):
        jax.eval_shape(functools.partial(cudnn_packed_attention, scale=1.0, causal=True), x, x, x, rows)


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
