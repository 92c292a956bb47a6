"""The contrastive loss of the global batch, its scores computed all at once or in tiles over the mesh.

Every form has the same value and gradient:

- `dense`, the reference, holds the scores of a device's queries with all passages.
- `gathered` gathers and scores one slice of every device's passages after another.
- `ring` sends each device's passages round the devices while scoring the previous ones.

In `gathered` and `ring`, the tiled forms, a device holds the scores of its own queries with one tile of passages. The
backward pass computes scores again, and a passage's gradient goes to the device that owns it: as a sum over the
devices, or round the ring with the passage.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grit_jax.config import Negatives
from grit_jax.parallel.execution import wide
from grit_jax.parallel.sharding import axis_size, constrain, mesh_axes, on_devices, split_axes

TILE = 1024
DENSE_BYTES = 256 << 20

# (state, passages, their ids) -> (state, the passages' gradient, or None in the forward pass).
Update = Callable[[Any, jax.Array, jax.Array], tuple[Any, jax.Array | None]]

# By default a TPU multiplies float32 in one bfloat16 pass, which moves a logit by 0.2 at temperature 0.02.
exact_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def contrastive_loss(
    query: Float[Array, "queries embed"],
    passage: Float[Array, "passages embed"],
    *,
    temperature: float,
    query_weights: Float[Array, " queries"],
    passage_ids: Int[Array, " passages"],
    negatives: Negatives = "auto",
    tile: int = TILE,
) -> Float[Array, ""]:
    """InfoNCE over the global batch: sum_i weight_i * -log softmax_j(query_i . passage_j / temperature)[positive_i].

    The positive of query i is passage i * (passages / queries). Passages with the positive's id, and fillers (id -1),
    are not negatives. At least float32 throughout.

    Args:
      query: Vectors of the queries.
      passage: Vectors of the passages, each query's positive first in its group.
      temperature: Divisor of scores.
      query_weights: Weight of each query's loss.
      passage_ids: Equal for passages that are never each other's negatives.
      negatives: Form of the loss; see `resolve_negatives`. The devices that split the batch must divide the queries.
      tile: Most passages that `gathered` and `ring` score at a time.
    """
    query, passage = (x.astype(wide(x)) for x in (query, passage))
    query = constrain(query / temperature, "batch", "activation_embed")
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else axis_size(mesh, "batch")
    form = resolve_negatives(negatives, len(query), *passage.shape, shards)
    if form == "dense":
        nll = _dense_nll(query, passage, passage_ids)
    else:
        visit = functools.partial({"gathered": _gathered, "ring": _ring}[form], tile=tile)
        texts = ("batch", "activation_embed")
        split = on_devices(
            functools.partial(_tiled_nll, visit),
            in_axes=(texts, texts, ("batch",)),
            out_axes=("batch",),
            over=mesh_axes("batch"),
        )
        nll = split(query, passage, passage_ids)
    return jnp.sum(query_weights * nll)


def resolve_negatives(
    negatives: Negatives, num_queries: int, num_passages: int, embed_dim: int, shards: int
) -> Literal["dense", "gathered", "ring"]:
    """The form that `loss.negatives` means when the batch is split over `shards` devices.

    `auto` is `dense` while all passages and a device's scores take at most `DENSE_BYTES` in float32, then `ring` if
    every device owns at least a tile of passages, else `gathered`. A single device has no ring.
    """
    if negatives == "auto":
        if 4 * num_passages * (num_queries // shards + embed_dim) <= DENSE_BYTES:
            return "dense"
        negatives = "ring" if num_passages // shards >= TILE else "gathered"
    return "gathered" if shards == 1 and negatives == "ring" else negatives


def _dense_nll(query: jax.Array, passage: jax.Array, passage_ids: jax.Array) -> jax.Array:
    """-log softmax of each query's positive, [queries]; queries are divided by the temperature."""
    passage = constrain(passage, "passages", "activation_embed")
    positive = jnp.arange(len(query)) * (len(passage) // len(query))
    scores = constrain(exact_einsum("id,jd->ij", query, passage), "batch", "passages")
    not_negative = (passage_ids == passage_ids[positive][:, None]) | (passage_ids == -1)
    scores = jnp.where(not_negative & (jnp.arange(len(passage)) != positive[:, None]), -jnp.inf, scores)
    target = jnp.take_along_axis(scores, positive[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(scores, axis=1) - target


def _tiled_nll(visit: Callable, query: jax.Array, passage: jax.Array, passage_ids: jax.Array) -> jax.Array:
    """`_dense_nll` of the queries of one device, which owns their groups of passages."""
    group = len(passage) // len(query)
    target = jnp.sum(query * passage[::group], axis=1)
    return _nll(visit, query, target, passage_ids[::group], passage, passage_ids)


def _excess(
    query: jax.Array, target: jax.Array, positive_ids: jax.Array, passage: jax.Array, passage_ids: jax.Array
) -> jax.Array:
    """Each passage's score less the positive's, [queries, passages]; -inf unless it is a negative."""
    not_negative = (passage_ids == positive_ids[:, None]) | (passage_ids == -1)
    return jnp.where(not_negative, -jnp.inf, exact_einsum("id,jd->ij", query, passage) - target[:, None])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _nll(visit, query, target, positive_ids, passage, passage_ids):
    """log(1 + sum over negatives of exp(score - target)); the 1 is the positive."""

    def update(nll, passage, passage_ids):
        excess = _excess(query, target, positive_ids, passage, passage_ids)
        return jnp.logaddexp(nll, jax.nn.logsumexp(excess, axis=1)), None

    return visit(update, jnp.zeros_like(target), passage, passage_ids)[0]


def _nll_forward(visit, *inputs):
    nll = _nll(visit, *inputs)
    return nll, (inputs, nll)


def _nll_backward(visit, residuals, cotangent):
    (query, target, positive_ids, passage, passage_ids), nll = residuals

    def update(query_gradient, passage, passage_ids):
        excess = _excess(query, target, positive_ids, passage, passage_ids)
        change = cotangent[:, None] * jnp.exp(excess - nll[:, None])
        return query_gradient + exact_einsum("ij,jd->id", change, passage), exact_einsum("ij,id->jd", change, query)

    query_gradient, passage_gradient = visit(update, jnp.zeros_like(query), passage, passage_ids)
    # The probabilities of the negatives sum to 1 - exp(-nll).
    return query_gradient, cotangent * jnp.expm1(-nll), None, passage_gradient, None


_nll.defvjp(_nll_forward, _nll_backward)


def _tiles(update: Update, state: Any, passage: jax.Array, passage_ids: jax.Array, *, tile: int) -> tuple[Any, Any]:
    """Updates the state tile by tile; returns it and the passages' gradient."""
    num_tiles = -(-len(passage) // tile)
    size = -(-len(passage) // num_tiles)

    def split(x, filler):
        padding = [(0, num_tiles * size - len(x))] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, padding, constant_values=filler).reshape(num_tiles, size, *x.shape[1:])

    tiles = (split(passage, 0), split(passage_ids, -1))
    state, gradient = jax.lax.scan(lambda state, tile: update(state, *tile), state, tiles)
    return state, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[: len(passage)], gradient)


def _gathered(update, state, *block, tile):
    """Visits a slice of every device's passages at a time, and sums the slices' gradients on their own devices."""
    axes = split_axes("batch")
    gather = functools.partial(jax.lax.all_gather, axis_name=axes, tiled=True)
    scatter = functools.partial(jax.lax.psum_scatter, axis_name=axes, tiled=True)

    def update_gathered(state, *slices):
        state, gradient = update(state, *map(gather, slices))
        return state, jax.tree.map(scatter, gradient)

    return _tiles(update_gathered, state, *block, tile=max(1, tile // jax.lax.axis_size(axes)))


def _ring(update, state, *block, tile):
    """Visits the devices' passages, device by device; their gradient travels with them."""
    axes = split_axes("batch")
    shards = jax.lax.axis_size(axes)
    neighbours = [(i, (i + 1) % shards) for i in range(shards)]

    def send(tree):
        return jax.tree.map(lambda x: jax.lax.ppermute(x, axes, neighbours), tree)

    def step(carry, _):
        # Sending does not wait for this block's scores; computing them hides the transfer.
        state, block, gradient = carry
        following, received = send((block, gradient))
        state, contribution = _tiles(update, state, *block, tile=tile)
        return (state, following, jax.tree.map(jnp.add, received, contribution)), None

    following = send(block)
    state, gradient = _tiles(update, state, *block, tile=tile)
    (state, _, gradient), _ = jax.lax.scan(step, (state, following, gradient), length=shards - 1)
    return state, send(gradient)
