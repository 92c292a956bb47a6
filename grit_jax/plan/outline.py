"""The outline of a step, traced in seconds instead of compiled: do all its parts fit together?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from grit_jax.config import Config
from grit_jax.parallel.chips import GIB
from grit_jax.plan.program import lower, planned_mesh
from grit_jax.plan.topology import Topology
from grit_jax.plan.work import Lengths, Work, described_rows, rows_by_stream
from grit_jax.train.memory import state_and_gradient_bytes
from grit_jax.train.objectives.objective import Objective
from grit_jax.train.setup import set_up


@dataclass(frozen=True)
class Outline:
    """A step that was traced but not compiled.

    Attributes:
      topology: The devices that it was traced for.
      mesh: Devices along each axis of the mesh.
      work: The content of the step.
      state_bytes: Parameters, optimizer state and one gradient on a device: the least that the step needs.
    """

    topology: Topology
    mesh: dict[str, int]
    work: Work
    state_bytes: int

    @property
    def may_fit(self) -> bool:
        """Whether state and gradients leave room on a device; only the compiler knows the rest."""
        return self.state_bytes < self.topology.chip.hbm_bytes


def make_outline(
    config: Config, topology: Topology, lengths: Lengths, *, streams: Sequence[Objective] | None = None
) -> Outline:
    """Traces the step for the topology.

    Args:
      config: Config with its architecture resolved (`planned_config`).
      topology: The devices to trace for.
      lengths: Lengths of the texts of a step.
      streams: As in `Trainer`.

    Raises:
      InputError: libtpu is missing, or mesh, batch, lengths and model do not fit together.
    """
    mesh = planned_mesh(config, topology)
    setup = set_up(config, mesh, streams)
    work, _ = lower(setup, mesh, lengths)
    return Outline(topology, dict(mesh.shape), work, state_and_gradient_bytes(setup.abstract))


def as_json(outline: Outline) -> dict[str, Any]:
    """The outline as one object; bytes are those of one device."""
    return {
        "may_fit": outline.may_fit,
        "topology": outline.topology.libtpu_name,
        "slices": outline.topology.num_slices,
        "chips": outline.topology.num_chips,
        "mesh": outline.mesh,
        "hbm_bytes": outline.topology.chip.hbm_bytes,
        "state_bytes_per_device": outline.state_bytes,
        **{f"{name}_rows": rows for name, rows in rows_by_stream(outline.work).items()},
        "tokens": outline.work.tokens,
    }


def as_lines(outline: Outline) -> Iterator[str]:
    """The outline as lines of text."""
    mesh = ", ".join(f"mesh.{axis}={size}" for axis, size in outline.mesh.items() if size > 1) or "one device"
    yield f"{outline.topology.num_chips} chips of {outline.topology.libtpu_name} as {mesh}"
    yield f"a step: {outline.work.tokens:,} tokens in {described_rows(outline.work)}"
    verdict = "leave out --no-compile to see the whole need" if outline.may_fit else "DOES NOT FIT"
    needed, limit = outline.state_bytes / GIB, outline.topology.chip.hbm_bytes / GIB
    yield f"memory of a device: {needed:.2f} of {limit:.2f} GiB for state and gradients alone: {verdict}"
