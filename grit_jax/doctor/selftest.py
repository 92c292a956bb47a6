"""Compares the numbers of this machine's kernels and shardings with those of the plain computation.

Each check is small, and runs on the devices found. In a job of several processes all run all checks, and a check's
difference is the largest of theirs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from os import PathLike
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from grit_jax.checkpoints.checkpoint import CheckpointMetadata, Checkpoints
from grit_jax.config import (
    Config,
    DataConfig,
    EmbeddingConfig,
    MeshConfig,
    ModelConfig,
    Negatives,
    OptimizerConfig,
    TrainConfig,
    TransformerConfig,
)
from grit_jax.data.batch import Batch
from grit_jax.doctor.batches import embedding_batch, generative_batch, lay_out, random_texts
from grit_jax.losses import contrastive
from grit_jax.model.attention import AttentionMask, attention
from grit_jax.model.moe import ExpertMLP
from grit_jax.model.transformer import abstract_model, abstract_params, param_axes
from grit_jax.parallel import sharding
from grit_jax.parallel.distributed import gathered, in_first_process, wait_for_all
from grit_jax.parallel.execution import PLAIN, Execution, execution
from grit_jax.runs.checks import Check
from grit_jax.train.setup import set_up
from grit_jax.train.state import new_state

# Largest difference between two orders of the same sums, as a share of the largest value.
_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
_SPLIT_TOLERANCE = 1e-4
_LOGIT_TOLERANCE = 1e-3
_TEMPERATURE = 0.02

_LENGTH, _VOCAB = 64, 64
_FOLDER = "grit-jax-selftest"


@dataclasses.dataclass(frozen=True)
class _Measurement:
    """A check to run: its target, the largest difference that passes, and how to measure it."""

    target: str
    tolerance: float
    measure: Callable[[], float]


def selftest(folder: str | PathLike[str]) -> Iterator[Check]:
    """Runs the checks one after another.

    Args:
      folder: Where to write a checkpoint, in a temporary subfolder. All processes must see it.

    Yields:
      The checks; one that cannot be computed has an infinite difference.
    """
    for item in (*_attention(), *_experts(), *_step(), *_contrastive(), *_similarity(), *_checkpoint(folder)):
        yield _run(item)


def _run(item: _Measurement) -> Check:
    try:
        difference, reason = item.measure(), ""
    except Exception as error:  # compilers and file systems raise many types
        difference, reason = np.inf, f", {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    difference = float(np.max(gathered(np.asarray(difference, np.float32))))
    return Check(
        item.target, difference, f"largest difference {difference:.1e} (limit {item.tolerance:.0e}){reason}",
        item.tolerance,
    )  # fmt: skip


def _difference(actual: Any, expected: Any) -> float:
    """Largest difference of two trees of arrays, relative to each array's largest expected value."""

    def one(actual, expected):
        actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
        return np.max(np.abs(actual - expected)) / np.max(np.abs(expected))

    return float(np.max(jax.tree.leaves(jax.tree.map(one, actual, expected))))


def _own_execution() -> Execution:
    """The execution settings of a run on these devices."""
    return execution(ModelConfig(), jax.devices()[0].platform)


def _attention() -> Iterator[_Measurement]:
    """The device's kernel against the dense one in float32; on a CPU also the TPU's kernel, interpreted."""
    own = _own_execution()
    # A compiled kernel should see many blocks; interpreting is slow, and so is the dense kernel on a CPU.
    kernels = [(own, 4096)]
    if own.attention == "blockwise":
        kernels = [(own, 512), (dataclasses.replace(own, attention="splash", interpret=True), 128)]
    for kernel, length in kernels:
        how = f"{kernel.attention}{', interpreted' if kernel.interpret else ''}, {kernel.dtype}"
        for direction in ("causal", "bidirectional"):
            for window in (None, length // 4):
                yield _Measurement(
                    f"attention, {direction}{f', window {window}' if window else ''} ({how})",
                    _TOLERANCE[kernel.dtype.name],
                    functools.partial(_compare_attention, kernel, length, causal=direction == "causal", window=window),
                )


def _compare_attention(own: Execution, length: int, *, causal: bool, window: int | None) -> float:
    """Output and gradients of grouped heads over a row of three texts and padding."""
    rng = np.random.default_rng(0)
    query, key, value, cotangent = (
        jnp.asarray(rng.normal(size=(1, length, heads, 128)), own.dtype) for heads in (4, 2, 2, 4)
    )
    sizes = (length // 2, length // 4, length // 8)
    rows = lay_out([np.ones(size, np.int32) for size in sizes], [[0, 1, 2]], length).rows
    segments, positions = jnp.asarray(rows.segment_ids), jnp.asarray(rows.positions)
    mask = AttentionMask.of_rows(segments, positions, causal=causal, window=window)
    real = segments[:, :, None, None] > 0  # kernels mask by distance in the row, which is meaningless for padding
    cotangent *= real

    @functools.partial(jax.jit, static_argnums=0)
    def compute(execution, *inputs):
        out, backward = jax.vjp(
            lambda *inputs: attention(*inputs, mask, scale=128**-0.5, soft_cap=None, execution=execution), *inputs[:3]
        )
        return out * real, *backward(inputs[3])

    inputs = (query, key, value, cotangent)
    actual = compute(own, *inputs)
    with jax.default_matmul_precision("highest"):
        return _difference(actual, compute(PLAIN, *(x.astype(PLAIN.dtype) for x in inputs)))


def _experts() -> Iterator[_Measurement]:
    """The grouped products of the experts against a loop over them."""
    dtype = _own_execution().dtype
    yield _Measurement(f"experts ({dtype})", _TOLERANCE[dtype.name], functools.partial(_compare_experts, dtype))


def _compare_experts(dtype: jnp.dtype) -> float:
    mlp = ExpertMLP(_architecture(), key=jax.random.key(0), out_scale=1.0)
    x = jax.random.normal(jax.random.key(1), (2, 64, mlp.router.kernel.shape[0]), jnp.float32).astype(dtype)
    real = np.arange(64) < np.array([[64], [50]])
    out, _ = jax.jit(mlp)(x, jnp.asarray(real))

    tokens = np.asarray(x, np.float32)
    router, gate, up, down = (np.asarray(w[...]) for w in (mlp.router.kernel, mlp.gate, mlp.up, mlp.down))
    probabilities = np.asarray(jax.nn.softmax(tokens @ router))
    least = np.sort(probabilities, axis=-1)[..., -mlp.experts_per_token, None]
    weights = np.where(probabilities >= least, probabilities, 0) * real[..., None]
    weights /= np.maximum(np.sum(weights, axis=-1, keepdims=True), 1e-30)
    expected = np.zeros_like(tokens)
    for expert in range(len(gate)):
        hidden = np.asarray(mlp.activation(tokens @ gate[expert])) * (tokens @ up[expert])
        expected += weights[..., expert, None] * (hidden @ down[expert])
    return _difference(out, expected)


def _meshes() -> Iterator[MeshConfig]:
    """Meshes of all devices: sharded weights, and sharded heads or experts too."""
    data = len({getattr(device, "slice_index", 0) for device in jax.devices()})
    yield MeshConfig(data)
    devices = jax.device_count() // data
    if devices % 4 == 0:
        yield MeshConfig(data, tensor=2, expert=2)
    elif devices % 2 == 0:
        yield MeshConfig(data, tensor=2)
        yield MeshConfig(data, expert=2)


def _architecture() -> TransformerConfig:
    """A tiny mixture of experts whose widths all devices divide."""
    width = _multiple(64)
    return TransformerConfig(
        family="mixtral", embed_dim=width, mlp_dim=96, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
        num_experts=4,
    ).resolve(_VOCAB)  # fmt: skip


def _multiple(least: int) -> int:
    """The smallest multiple of the number of devices that is at least `least`."""
    return -(-least // jax.device_count()) * jax.device_count()


def _step() -> Iterator[_Measurement]:
    """Loss and gradient norm of a step sharded over all devices against those of one device."""
    # Every process computes its own reference.
    alone = functools.cache(lambda: _update(sharding.make_mesh(MeshConfig(), jax.local_devices()[:1])))

    def measure(mesh: Mesh) -> float:
        return _difference(_update(mesh), alone())

    for mesh in map(sharding.make_mesh, _meshes()):
        sizes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
        yield _Measurement(f"train step, {sizes}", _SPLIT_TOLERANCE, functools.partial(measure, mesh))


def _update(mesh: Mesh) -> dict[str, float]:
    """The loss, its parts and the gradient norm of one update, in float32."""
    num_rows = _multiple(8)
    config = Config(
        model=ModelConfig(
            architecture=_architecture(), compute_dtype="float32", attention_kernel="dense", remat="none"
        ),
        data=DataConfig(
            train="none", query_max_length=_LENGTH, passage_max_length=_LENGTH, generative_max_length=_LENGTH,
            embedding_batch=num_rows, generative_batch=2 * num_rows,
        ),
        optimizer=OptimizerConfig(name="sgd", learning_rate=0.1),
        train=TrainConfig(embedding_chunks=1, generative_chunks=1),
    )  # fmt: skip
    params = _random_params(config.model.architecture)
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        setup = set_up(config, mesh)
        state = _shard(new_state(params, setup.optimizer), jax.tree.map(lambda x: x.sharding, setup.abstract))
        batch = sharding.place_batch(mesh, sharding.host_rows(mesh, _batch(num_rows)))
        _, metrics = setup.train_step(state, batch)
        names = ("loss", "loss/embedding", "loss/generative", "loss/router", "grad_norm")
        return {name: float(metrics[name]) for name in names}


@functools.cache
def _random_params(architecture: TransformerConfig) -> Any:
    """Random weights, made on the host, as the model's own initialisation takes ten seconds to compile."""
    rng = np.random.default_rng(0)

    def draw(like):
        return (rng.normal(size=like.shape) * like.shape[-1] ** -0.5).astype(like.dtype)

    return jax.tree.map(draw, abstract_params(abstract_model(architecture)))


def _batch(num_rows: int) -> Batch:
    """Random texts of both streams; a query and its two passages are in different rows."""
    rng = np.random.default_rng(0)
    embedding, generative = (random_texts(rng, count * num_rows, vocab=_VOCAB) for count in (3, 2))

    def dealt(count):
        return np.arange(count).reshape(-1, num_rows).T.tolist()

    return {
        "embedding": embedding_batch(embedding, dealt(len(embedding)), _LENGTH, num_queries=num_rows),
        "generative": generative_batch(generative, dealt(len(generative)), _LENGTH),
    }


def _shard(tree: Any, shardings: Any) -> Any:
    """Shards arrays that every process has whole."""

    def one(x, sharding):
        return jax.make_array_from_callback(x.shape, sharding, lambda index: np.asarray(x)[index])

    return jax.tree.map(one, tree, shardings)


def _contrastive() -> Iterator[_Measurement]:
    """The tiled losses on all devices against the dense one on one device."""
    expected = functools.cache(lambda: _loss_and_gradient("dense", None))
    mesh = sharding.make_mesh(next(_meshes()))

    def measure(form: Negatives) -> float:
        return _difference(_loss_and_gradient(form, mesh), expected())

    yield _Measurement("contrastive loss, gathered", _SPLIT_TOLERANCE, functools.partial(measure, "gathered"))
    yield _Measurement("contrastive loss, ring", _SPLIT_TOLERANCE, functools.partial(measure, "ring"))


def _loss_and_gradient(form: Negatives, mesh: Mesh | None) -> Any:
    num_queries = _multiple(16)
    query, passage = _unit_vectors(num_queries, 32)
    weights, ids = np.full(num_queries, 1 / num_queries, np.float32), np.arange(len(passage), dtype=np.int32)

    def loss(query, passage, weights, ids):
        return contrastive.contrastive_loss(
            query, passage, temperature=_TEMPERATURE, query_weights=weights, passage_ids=ids, negatives=form, tile=8
        )

    inputs = (query, passage, weights, ids)
    function = jax.value_and_grad(loss, argnums=(0, 1))
    if mesh is None:
        return jax.device_get(jax.jit(function)(*inputs))
    whole = sharding.replicated(mesh)
    with jax.set_mesh(mesh):
        return jax.device_get(
            jax.jit(function, out_shardings=whole)(*_shard(inputs, jax.tree.map(lambda _: whole, inputs)))
        )


def _unit_vectors(num_queries: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 queries, and two passages of each, of which the first is nearest to it."""
    rng = np.random.default_rng(0)
    query, passage = (rng.normal(size=(count, dim)) for count in (num_queries, 2 * num_queries))
    passage[::2] += query / 2
    query, passage = ((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for x in (query, passage))
    return query, passage


def _similarity() -> Iterator[_Measurement]:
    """Logits of the contrastive loss against float64."""

    def measure() -> float:
        query, passage = _unit_vectors(128, 64)
        scores = jax.jit(functools.partial(contrastive.exact_einsum, "id,jd->ij"))(query / _TEMPERATURE, passage)
        expected = (query.astype(np.float64) @ passage.T.astype(np.float64)) / _TEMPERATURE
        return float(np.max(np.abs(np.asarray(scores, np.float64) - expected)))

    yield _Measurement(f"logits at temperature {_TEMPERATURE} (float32)", _LOGIT_TOLERANCE, measure)


def _checkpoint(folder: str | PathLike[str]) -> Iterator[_Measurement]:
    """Parameters saved and restored: the number of values whose bits differ."""
    yield _Measurement(f"checkpoint in {folder}", 0.0, functools.partial(_compare_checkpoint, epath.Path(folder)))


def _compare_checkpoint(folder: epath.Path) -> float:
    folder /= _FOLDER
    mesh = sharding.make_mesh(next(_meshes()))
    model = abstract_model(_architecture())
    split = sharding.shardings(mesh, abstract_params(model), param_axes(model))
    abstract = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), abstract_params(model), split
    )
    params = _shard(_random_params(_architecture()), split)

    def remove() -> None:
        if folder.exists():
            folder.rmtree()

    in_first_process(remove)  # left by a self-test that was killed
    try:
        with contextlib.closing(Checkpoints(folder)) as checkpoints:
            checkpoints.save(0, params, None, CheckpointMetadata(_architecture(), EmbeddingConfig(), {}))
            checkpoints.wait()
            restored, _ = checkpoints.restore(0, abstract, None)
    finally:
        wait_for_all()
        in_first_process(remove)
    return float(_num_different(params, restored))


@jax.jit
def _num_different(left: Any, right: Any) -> jax.Array:
    def one(left, right):
        bits = (jax.lax.bitcast_convert_type(x, jnp.uint32) for x in (left, right))
        return jnp.sum(jnp.not_equal(*bits))

    return sum(jax.tree.leaves(jax.tree.map(one, left, right)))
