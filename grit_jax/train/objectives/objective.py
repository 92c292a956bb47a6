"""The device's side of a stream, from the hidden states of its rows to its losses."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from grit_jax.data.streams.stream import Stream
from grit_jax.model.transformer import Transformer

Metrics = dict[str, jax.Array]


class Inputs(NamedTuple):
    """The part of a batch that goes through the model, chunk by chunk.

    Attributes:
      tokens: int32 [rows, length].
      segment_ids: int32 [rows, length]; 0 is padding.
      positions: int32 [rows, length].
      extras: Other arrays [rows, ...] for `Objective.kept`.
    """

    tokens: jax.Array
    segment_ids: jax.Array
    positions: jax.Array
    extras: Any = ()


class Parts(NamedTuple):
    """What each device computes from its rows.

    Attributes:
      split: Tree of arrays that stay split over the devices.
      sums: Tree of arrays [1, ...] that are summed over the devices.
    """

    split: Any
    sums: Any


@dataclasses.dataclass(frozen=True)
class Losses:
    """The losses of a batch.

    Attributes:
      loss: Scalar.
      of_tokens: float32 [2, rows, length], weighted losses and weights of all tokens; None if tokens have none.
      metrics: Further measurements.
    """

    loss: jax.Array
    of_tokens: jax.Array | None = None
    metrics: Metrics = dataclasses.field(default_factory=dict)


class Objective(abc.ABC):
    """A loss of one stream. The step runs the layers between `inputs` and `kept`.

    Attributes:
      stream: The host's side.
      weight: Weight of the loss in the minimised sum.
      router_weight: Weight of the experts' balance loss of its forward pass.
      router_metric: Name of that balance loss among the metrics.
      causal: Whether a token sees only those before it.
      uses_head: Whether its tokens go through the output head.
      split_axes: Tree of the logical axes of `Parts.split`.
    """

    weight: float
    router_weight: float = 0.0
    causal: bool = True
    uses_head: bool = True
    split_axes: ClassVar[Any] = ()

    def __init__(self, stream: Stream):
        self.stream = stream

    @property
    def name(self) -> str:
        """The stream's name."""
        return self.stream.name

    @property
    def router_metric(self) -> str:
        """Name of the balance loss of its forward pass."""
        return f"loss/router_{self.name}"

    def inputs(self, batch: Any) -> Inputs:
        """The part of the batch that goes through the model."""
        return Inputs(batch.tokens, batch.segment_ids, batch.positions)

    def kept(self, model: Transformer, hidden: jax.Array, segment_ids: jax.Array, extras: Any) -> jax.Array:
        """What remains of the hidden states of a chunk's rows: [rows, ...]."""
        return hidden

    @abc.abstractmethod
    def parts(self, model: Transformer, kept: jax.Array, batch: Any, dtype: jnp.dtype) -> Parts:
        """What a device computes from its rows.

        Args:
          model: The model.
          kept: [rows, ...]; of this device's rows.
          batch: Its rows, and the whole of the batch's fields that are not per row.
          dtype: Type of the activations.
        """

    @abc.abstractmethod
    def losses(self, split: Any, sums: Any, batch: Any) -> Losses:
        """The losses of the whole batch from the parts of all devices."""

    @abc.abstractmethod
    def total_weight(self, batch: Any) -> jax.Array:
        """Scalar sum of the weights in the loss."""

    def problem(self, mesh_shape: dict[str, int]) -> str | None:
        """Why a mesh cannot hold its batches, given the sizes of the axes that split them; None if it can."""
        return None

    def negatives(self, num_shards: int, embed_dim: int) -> str | None:
        """The form in which it computes negatives on a mesh with `num_shards` batch shards; None where it has none."""
        return None
