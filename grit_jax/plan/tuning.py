"""Tuning: finds the fastest settings that fit by compiling each program that it judges.

A step is faster the less it recomputes, and the more rows go through a layer at once; both take memory. So the search
takes the modes of rematerialisation from the least recomputation to the most, and bisects for the most rows with which
each fits. The compiler says what fits, and the estimator which of the programs that fit is the fastest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from grit_jax.config import Config, Remat
from grit_jax.errors import InputError
from grit_jax.parallel import sharding
from grit_jax.parallel.chips import GIB
from grit_jax.plan.program import Plan, make_plan, planned_mesh
from grit_jax.plan.topology import Topology
from grit_jax.plan.work import Lengths, planned_work
from grit_jax.train.memory import rows_at_once
from grit_jax.train.objectives import trained_objectives
from grit_jax.train.setup import set_up

# The share of a device's memory that a recommended step takes at most. The compiler sees one program: evaluation, other
# row buckets and the gaps between arrays that outlive a step need the rest.
TARGET = 0.9

_REMATS: tuple[Remat, ...] = ("dots", "full", "offload")  # by what is computed, or fetched, again


class Tuned(NamedTuple):
    """Settings, as a config and as command-line arguments, and their plan."""

    plan: Plan
    config: Config
    overrides: list[str]

    @property
    def fits(self) -> bool:
        """Whether a device's memory holds the step and leaves the share that `TARGET` keeps free."""
        return self.plan.fits and self.plan.peak_bytes <= TARGET * self.plan.topology.chip.hbm_bytes


class Layout(NamedTuple):
    """Settings that are tried only where nothing fits without them, and the values of `model.layer_rows` that differ.

    Attributes:
      config: The config with these settings.
      overrides: The settings as command-line arguments.
      limits: Values of `model.layer_rows` that make different programs, ascending; the last is None, for all rows.
    """

    config: Config
    overrides: list[str]
    limits: list[int | None]


class _EndError(Exception):
    """Why no other program is compiled."""


def tune(config: Config, topology: Topology, lengths: Lengths, *, most: int, say: Callable[[str], None]) -> Tuned:
    """Recommends the fastest of the compiled programs that fit; the one with the least memory if none does.

    Args:
      config: Config with its architecture resolved.
      topology: The devices to compile for.
      lengths: Lengths of the texts of a step.
      most: Most programs to compile.
      say: Receives a line for each of them.

    Raises:
      InputError: No mesh divides the model and the batch.
    """
    compiled: dict[tuple[str, ...], Tuned] = {}

    def judged(layout: Layout, remat: Remat, layer_rows: int | None) -> Tuned:
        limit = "null" if layer_rows is None else layer_rows
        overrides = [*layout.overrides, f"--model.remat={remat}", f"--model.layer_rows={limit}"]
        key = tuple(overrides)
        if key not in compiled:
            if len(compiled) == most:
                raise _EndError(f"{most} programs are compiled; --compile allows more")
            model = dataclasses.replace(layout.config.model, remat=remat, layer_rows=layer_rows)
            changed = dataclasses.replace(layout.config, model=model)
            compiled[key] = Tuned(make_plan(changed, topology, lengths), changed, overrides)
            say(_described(compiled[key]))
            if compiled[key].plan.state_bytes > TARGET * topology.chip.hbm_bytes:  # every layout splits it alike
                raise _EndError("state and gradients alone are too much for these chips")
        return compiled[key]

    try:
        for layout in layouts(config, topology, lengths):
            if _fitting(layout, judged):
                break
    except _EndError as end:
        say(str(end))
    return min(compiled.values(), key=_rank)


def _fitting(layout: Layout, judged: Callable[[Layout, Remat, int | None], Tuned]) -> bool:
    """Whether a program of a layout fits; judges the fastest that do.

    A mode that recomputes more than another is worth having only with more rows at once.
    """
    fitting, limits = 0, layout.limits  # how many of the limits fit in some mode: the first ones
    for remat in _REMATS:
        fitting = bisected(fitting, len(limits), lambda i, remat=remat: judged(layout, remat, limits[i]).fits)
        if fitting == len(limits):
            break
    return fitting > 0


def bisected(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """How many of the first numbers fit, given that each number fits if a larger one does.

    Asks for the least number first, as often none fits, then for the greatest, as often all do.

    Args:
      low: Where to begin: the result if this number does not fit.
      high: Where to end: the result if all numbers below fit.
      fits: Whether a number fits.
    """
    if low == high or not fits(low):
        return low
    if fits(high - 1):
        return high
    low, high = low + 1, high - 1
    while low < high:
        middle = (low + high) // 2
        if fits(middle):
            low = middle + 1
        else:
            high = middle
    return low


def _rank(tuned: Tuned) -> tuple[bool, float]:
    cost = tuned.plan.cost
    return (False, cost.total_seconds) if tuned.fits and cost else (True, tuned.plan.peak_bytes)


def _described(tuned: Tuned) -> str:
    plan = tuned.plan
    limit = plan.topology.chip.hbm_bytes
    verdict = "fits" if tuned.fits else f"over {TARGET:.0%}" if plan.fits else "does not fit"
    seconds = f"{plan.cost.total_seconds:.2f} s" if plan.cost else "not compiled to the end"
    return f"{' '.join(tuned.overrides)}: {verdict}, {plan.peak_bytes / GIB:.2f} of {limit / GIB:.2f} GiB, {seconds}"


def layouts(config: Config, topology: Topology, lengths: Lengths) -> Iterator[Layout]:
    """Meshes and chunks, from those that cost nothing to those that cost the most time.

    The weights are sharded over all chips of a slice, and copied to every slice. Where a mesh has too little memory for
    any program, the rows pass through the whole model in two, four and more chunks; only after the last of these come
    meshes with twice as much tensor parallelism.

    Raises:
      InputError: No mesh divides the model and the batch.
    """
    problem, found, tensor = None, False, 1
    while tensor <= topology.chips_per_slice:
        mesh = dataclasses.replace(config.mesh, data=topology.num_slices, fsdp=-1, tensor=tensor)
        on_mesh = dataclasses.replace(config, mesh=mesh)
        try:
            abstract_mesh = planned_mesh(on_mesh, topology)
            set_up(on_mesh, abstract_mesh)
        except InputError as error:
            problem = problem or error
        else:
            found = True
            shards = sharding.axis_size(abstract_mesh, "batch")
            settings = [f"--mesh.data={mesh.data}", "--mesh.fsdp=-1", f"--mesh.tensor={tensor}"]
            yield from _chunked(on_mesh, settings, shards, lengths)
        tensor *= 2
    if problem and not found:
        raise problem


def _chunked(config: Config, settings: Sequence[str], shards: int, lengths: Lengths) -> Iterator[Layout]:
    """A mesh with one chunk, two, four and so on of the stream with the most rows, and as few of the others."""
    whole = _rows(_with_chunks(config, dict.fromkeys(config.train.streams, 1)), shards, lengths)
    limit = max(whole.values())
    while limit:
        chunks = {name: -(-rows // limit) for name, rows in whole.items()}
        changed = _with_chunks(config, chunks)
        overrides = [*settings, *(f"--train.{name}_chunks={number}" for name, number in chunks.items())]
        yield Layout(changed, overrides, _limits(_rows(changed, shards, lengths).values()))
        limit //= 2


def _with_chunks(config: Config, chunks: Mapping[str, int]) -> Config:
    changed = {f"{name}_chunks": number for name, number in chunks.items()}
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changed))


def _rows(config: Config, shards: int, lengths: Lengths) -> dict[str, int]:
    """Rows of a device that pass through the model at once, by stream."""
    objectives = trained_objectives(config)
    work = planned_work(config.model.architecture, objectives, shards, lengths)
    return {each.name: rows_at_once(each.stream, work.rows[each.name], shards) for each in objectives}


def _limits(rows: Collection[int]) -> list[int | None]:
    """Values of `model.layer_rows` that differ: as the pieces of a stream's rows are equal, they divide them."""
    divisors = sorted({size for number in rows for size in range(1, number + 1) if number % size == 0})
    return [*divisors[:-1], None]
