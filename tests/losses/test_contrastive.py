"""The laws of the contrastive loss, on up to 8 virtual devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grit_jax.config import MeshConfig
from grit_jax.losses.contrastive import contrastive_loss, resolve_negatives
from grit_jax.parallel.sharding import make_mesh
from tests.packing import relative_error

TEMPERATURE = 0.02
FORMS = ["dense", "gathered", "ring"]
MESHES = [(1, 1, 1, 1), (2, 2, 1, 1), (1, 2, 2, 1), (8, 1, 1, 1), (1, 2, 2, 2), (1, 1, 8, 1)]


def reference(query, passage, temperature, weights, ids):
    group, total = len(passage) // len(query), 0.0
    for i, vector in enumerate(query):
        positive = i * group
        kept = [j for j in range(len(passage)) if j == positive or (ids[j] not in (-1, ids[positive]))]
        scores = passage[kept] @ vector / temperature
        total += weights[i] * (
            np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[kept.index(positive)]
        )
    return total


def problem(num_queries=16, group=3, embed=24, seed=0):
    """Unit vectors, weights and ids in float64: filler passages, a filler query, positives that others hold too."""
    rng = np.random.default_rng(seed)
    query = rng.normal(size=(num_queries, embed))
    passage = rng.normal(size=(num_queries * group, embed))
    passage[::group] += query / 2
    query, passage = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (query, passage))
    ids = np.arange(len(passage))
    ids[rng.random(len(ids)) < 0.1] = -1
    ids[: 2 * group : group] = 7
    ids[-1] = 7
    weights = rng.random(num_queries)
    ids[-group], weights[-1] = -1, 0
    return query, passage, weights, ids


def value_and_gradient(problem, *, dtype="float32", mesh=None, negatives="dense", tile=1024):
    """The loss and its gradient with respect to queries and passages, on a mesh or without one."""
    query, passage, weights = (jnp.asarray(x, dtype) for x in problem[:3])

    def loss(query, passage, weights, ids):
        return contrastive_loss(
            query, passage, temperature=TEMPERATURE, query_weights=weights, passage_ids=ids, negatives=negatives,
            tile=tile,
        )  # fmt: skip

    def compute():
        function = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        return jax.device_get(function(query, passage, weights, jnp.asarray(problem[3], jnp.int32)))

    if mesh is None:
        return compute()
    with jax.set_mesh(make_mesh(MeshConfig(*mesh), jax.devices()[: int(np.prod(mesh))])):
        return compute()


def worst(actual, expected):
    return max(jax.tree.leaves(jax.tree.map(relative_error, actual, expected)))


@pytest.mark.parametrize("negatives", FORMS)
@pytest.mark.parametrize("distinct", [True, False], ids=["distinct", "duplicates and fillers"])
def test_the_loss_is_the_cross_entropy_over_all_passages_that_may_be_negatives(negatives, distinct):
    query, passage, weights, ids = problem()
    ids = np.arange(len(ids)) if distinct else ids
    loss, _ = value_and_gradient((query, passage, weights, ids), negatives=negatives)
    assert relative_error(loss, reference(query, passage, TEMPERATURE, weights, ids)) < 1e-5


@pytest.mark.parametrize("negatives", FORMS)
def test_filler_queries_leave_finite_gradients_and_none_of_their_own(negatives):
    query, passage, weights, _ = problem(4, 3)
    weights[2:], ids = 0, np.where(np.arange(12) < 6, np.arange(12), -1)
    _, gradients = value_and_gradient((query, passage, weights, ids), negatives=negatives)
    for gradient, real in zip(gradients, (2, 6), strict=True):
        assert np.all(np.isfinite(gradient))
        assert np.all(gradient[real:] == 0) and np.all(np.any(gradient[:real], axis=1))


@pytest.fixture(scope="module")
def dense():
    with jax.enable_x64(True):
        return value_and_gradient(problem(), dtype="float64")


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("negatives", FORMS)
def test_every_form_on_every_mesh_has_the_dense_loss_and_gradient(dense, negatives, mesh):
    with jax.enable_x64(True):
        actual = value_and_gradient(problem(), dtype="float64", mesh=mesh, negatives=negatives)
    assert actual[1][0].dtype == np.float64
    assert worst(actual, dense) < 1e-10


@pytest.mark.parametrize("mesh", [None, (2, 2, 1, 2)], ids=str)
@pytest.mark.parametrize("negatives", FORMS)
def test_every_form_is_true_to_float32(dense, negatives, mesh):
    actual = value_and_gradient(problem(), mesh=mesh, negatives=negatives)
    assert actual[1][0].dtype == np.float32
    assert worst(actual, dense) < 1e-5


@pytest.mark.parametrize(("group", "tile"), [(1, 5), (2, 1), (4, 3), (4, 50)])
@pytest.mark.parametrize("negatives", ["gathered", "ring"])
def test_neither_tiles_nor_groups_change_the_dense_loss_and_gradient(negatives, group, tile):
    case = problem(group=group, seed=group)
    with jax.enable_x64(True):
        expected = value_and_gradient(case, dtype="float64")
        actual = value_and_gradient(case, dtype="float64", mesh=(1, 4, 1, 1), negatives=negatives, tile=tile)
    assert worst(actual, expected) < 1e-10


def test_tiles_need_no_mesh(dense):
    with jax.enable_x64(True):
        actual = value_and_gradient(problem(), dtype="float64", negatives="gathered", tile=7)
    assert worst(actual, dense) < 1e-10


@pytest.mark.parametrize("negatives", ["gathered", "ring"])
def test_a_device_holds_the_scores_of_one_tile_and_few_blocks_of_passages(negatives):
    mesh = make_mesh(MeshConfig(), jax.devices())
    num_queries, num_passages, embed = 2048, 16384, 8

    def loss(query, passage, weights, ids):
        return contrastive_loss(
            query, passage, temperature=TEMPERATURE, query_weights=weights, passage_ids=ids, negatives=negatives,
            tile=256,
        )  # fmt: skip

    with jax.set_mesh(mesh):
        split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
        shapes = [(num_queries, embed), (num_passages, embed), (num_queries,), (num_passages,)]
        inputs = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=split) for shape in shapes[:3]]
        inputs.append(jax.ShapeDtypeStruct(shapes[3], jnp.int32, sharding=split))
        memory = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*inputs).compile().memory_analysis()
    scores, block = 4 * num_queries // 8 * 256, 4 * num_passages // 8 * embed
    assert memory.temp_size_in_bytes < 4 * scores + 16 * block < 4 * num_queries // 8 * num_passages / 4


@pytest.mark.parametrize(
    ("expected", "sizes"),
    [
        ("dense", (32, 64, 256, 1)),
        ("dense", (2048, 4096, 4096, 64)),
        ("gathered", (65536, 65536, 64, 1)),
        ("gathered", (16384, 32768, 4096, 64)),
        ("ring", (65536, 131072, 4096, 64)),
    ],
)
def test_auto_is_dense_when_small_and_the_ring_when_every_device_owns_a_tile(expected, sizes):
    assert resolve_negatives("auto", *sizes) == expected
