"""The metrics of a step as numbers, including its speed; and model FLOPs for MFU."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from grit_jax.config import TransformerConfig
from grit_jax.parallel.chips import peak_flops
from grit_jax.train.step import Metrics


def model_flops(
    architecture: TransformerConfig, *, tokens: float, tokens_through_head: float, attention_pairs: float
) -> float:
    """FLOPs of one step's matrix products, forward and backward, without recomputation or padding.

    Args:
      architecture: Resolved architecture.
      tokens: Tokens of all streams.
      tokens_through_head: Tokens that pass through the output head.
      attention_pairs: Visible (query, key) pairs.
    """
    heads = architecture.num_heads * architecture.head_dim
    kv_heads = architecture.num_kv_heads * architecture.head_dim
    # With experts: the router, and the MLPs that a token is sent to.
    mlps = architecture.experts_per_token if architecture.num_experts else 1
    widths = 2 * heads + 2 * kv_heads + 3 * mlps * architecture.mlp_dim + architecture.num_experts
    projections = architecture.embed_dim * widths
    layers = architecture.num_layers * (projections * tokens + 2 * heads * attention_pairs)
    return 6 * (layers + architecture.vocab_size * architecture.embed_dim * tokens_through_head)


@dataclasses.dataclass
class _Unread:
    """A started step whose metrics have not been read; `seconds` is set once it has ended."""

    step: int
    metrics: Metrics
    waited: float
    seconds: float | None = None


class Meter:
    """Reads the metrics of steps one step late, so that devices never wait, and times the steps.

    A step lasts from the end of the one before to its own, on the devices, without the time from `wait` to `restart`.

    Args:
      architecture: Resolved architecture of the model.
      mesh: The devices.

    Attributes:
      unread: The step of the last `take`; None once it is read.
      waited: Seconds of waiting for the newest batch.
      step_began: When the step in flight began, by `time.monotonic`.
      step_seconds: Seconds of the last step that ended; None before the first.
    """

    def __init__(self, architecture: TransformerConfig, mesh: jax.sharding.Mesh):
        peak = peak_flops(mesh.devices.flat[0].device_kind)
        self._architecture, self._peak = architecture, peak and peak * mesh.size
        self.unread: _Unread | None = None
        self.waited = 0.0
        self.step_began = time.monotonic()
        self.step_seconds: float | None = None

    @property
    def running(self) -> Any:
        """An array of the step in flight; None without one."""
        return self.unread and self.unread.metrics["loss"]

    @property
    def idle(self) -> bool:
        """Whether the devices have nothing to do."""
        return self.running is None or self.running.is_ready()

    @property
    def ends(self) -> float:
        """When the step in flight is expected to end, by `time.monotonic`."""
        return self.step_began + (self.step_seconds or 0)

    @contextmanager
    def waiting(self) -> Generator[None]:
        """Around the wait for a batch."""
        began = time.monotonic()
        yield
        self.waited = time.monotonic() - began

    def take(self, step: int, metrics: Metrics) -> None:
        """Takes the scalar metrics of a step in flight."""
        scalars = {name: value for name, value in metrics.items() if not value.ndim}
        self.unread = _Unread(step, scalars, self.waited)

    def wait(self) -> None:
        """Waits for the end of the step in flight, and times it."""
        if self.unread and self.unread.seconds is None:
            jax.block_until_ready(self.unread.metrics)
            ended = time.monotonic()
            self.step_seconds = self.unread.seconds = ended - self.step_began
            self.step_began = ended

    def restart(self) -> None:
        """Marks the beginning of the next step."""
        self.step_began = time.monotonic()

    def read(self) -> tuple[int, dict[str, float]]:
        """The number of the unread step, and its metrics with its speed, once it has ended."""
        self.wait()
        assert self.unread and self.unread.seconds is not None
        unread, seconds, self.unread = self.unread, self.unread.seconds, None
        found: dict[str, np.ndarray] = jax.device_get(unread.metrics)
        values = {name: value.item() for name, value in found.items()}
        pairs, through_head = values.pop("attention_pairs"), values.pop("tokens_through_head")
        values |= {
            "tokens_per_second": values["tokens"] / seconds,
            "step_seconds": seconds,
            "data_wait_seconds": unread.waited,
        }
        if self._peak:
            flops = model_flops(
                self._architecture, tokens=values["tokens"], tokens_through_head=through_head, attention_pairs=pairs
            )
            values["mfu"] = flops / seconds / self._peak
        return unread.step, values
