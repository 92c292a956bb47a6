"""A plan as text and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from grit_jax.config import Config
from grit_jax.parallel.chips import GIB
from grit_jax.plan.collectives import TransferTotal
from grit_jax.plan.cost import HBM_EFFICIENCY, Cost, Kind
from grit_jax.plan.program import Plan
from grit_jax.plan.work import described_rows, rows_by_stream

_KIND_NAMES: dict[Kind, str] = {
    "products": "matrix products",
    "attention": "attention",
    "experts": "experts",
    "kernels": "other kernels",
    "vector": "vector work",
    "copies": "copies",
    "exposed": "exposed transfers",
}
# Least share of the step for which `--top` names a transfer.
_TOP_SHARE = 0.005


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as one object; bytes are those of one device, times are seconds."""
    cost, chip = plan.cost, plan.topology.chip
    values = {
        "fits": plan.fits,
        "topology": plan.topology.libtpu_name,
        "slices": plan.topology.num_slices,
        "chips": plan.topology.num_chips,
        "parameters": plan.parameters,
        "hbm_bytes": chip.hbm_bytes,
        "peak_bytes_per_device": plan.peak_bytes,
        "argument_bytes_per_device": plan.argument_bytes,
        "temporary_bytes_per_device": plan.temporary_bytes,
        "host_bytes_per_device": plan.host_bytes,
        "state_bytes_per_device": plan.state_bytes,
        "largest_buffers": list(plan.largest),
        **{f"{name}_rows": rows for name, rows in rows_by_stream(plan.work).items()},
        "tokens": plan.work.tokens,
        "model_flops_per_step": plan.work.flops,
        "negatives": plan.negatives,
        "recompute_factor": plan.recompute_factor,
        "predicted_step_seconds": cost and cost.total_seconds,
        "predicted_mfu": plan.mfu,
        "predicted_tokens_per_second": cost and plan.work.tokens / cost.total_seconds,
        "steps": plan.steps,
        "predicted_run_hours": plan.run_hours,
        "predicted_chip_hours": plan.chip_hours,
        "compile_seconds": plan.compile_seconds,
    }
    if cost is None:
        return values
    return values | {
        "seconds": dict(cost.seconds),
        "meanwhile_seconds": {part: getattr(cost, f"{part}_seconds") for part in ("hbm", "ici", "dcn", "host")},
        "collectives": [
            {
                "kind": total.opcode, "network": total.network, "overlapped": total.overlapped, "source": total.source,
                "count": total.count, "bytes": total.num_bytes, "seconds": total.seconds,
                "exposed_seconds": total.exposed_seconds,
            }
            for total in cost.transfers
        ],
        "unknown_loops": cost.unknown_loops,
        "unknown_kernels": list(cost.unknown_kernels),
    }  # fmt: skip


def as_lines(plan: Plan, config: Config, *, top: bool = False) -> Iterator[str]:
    """The plan as lines of text; with `top`, also the time of each kind of work and of each long exposed transfer."""
    chip, cost = plan.topology.chip, plan.cost
    slices = f"{plan.topology.num_slices} slices of " if plan.topology.num_slices > 1 else ""
    yield f"{plan.parameters:,} parameters on {slices}{plan.topology.libtpu_name}: {plan.topology.num_chips} chips"
    yield (
        f"a step: {plan.work.tokens:,} tokens in {described_rows(plan.work)}, {plan.work.flops:.3g} model FLOPs"
        + (f", negatives {plan.negatives}" if plan.negatives else "")
    )
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    yield f"memory of a device: peak {_gib(plan.peak_bytes)} of {_gib(chip.hbm_bytes)} GiB: {verdict}"
    if plan.argument_bytes is not None:
        host = f", {_gib(plan.host_bytes)} in the host's memory" if plan.host_bytes else ""
        yield f"  arguments {_gib(plan.argument_bytes)}, temporaries {_gib(plan.temporary_bytes or 0)}{host}"
    for buffer in plan.largest:
        yield f"  {buffer}"
    if not plan.fits:
        yield f"  {plan.advice(config.model)}"
    if cost is not None:
        yield (
            f"predicted: {cost.total_seconds:.2f} s a step, {plan.work.tokens / cost.total_seconds:,.0f} tokens/s, "
            f"MFU {plan.mfu:.1%}, recompute factor {plan.recompute_factor:.2f}"
        )
        yield (
            f"the whole run: {plan.steps:,} steps, {_amount(plan.run_hours)} hours, "
            f"{_amount(plan.chip_hours)} chip-hours, without compiling, evaluating and saving"
        )
        spent = [f"{name} {cost.seconds[kind]:.2f} s" for kind, name in _KIND_NAMES.items() if cost.seconds[kind]]
        yield f"  {', '.join(spent)}"
        yield (
            f"  meanwhile: HBM {cost.hbm_seconds:.2f} s, ICI {cost.ici_seconds:.2f}, DCN {cost.dcn_seconds:.2f}, "
            f"host {cost.host_seconds:.2f}"
        )
        for total in _by_opcode(cost.transfers):
            yield f"  {_described(total)}"
        yield (
            f"  assumed: the compiler's cycles for matrix products; HBM at {HBM_EFFICIENCY:.0%} of its bandwidth; "
            "experts with equally many tokens; networks at their full bandwidth"
        )
        if top:
            yield from _top(cost)
    yield f"compiled in {plan.compile_seconds:.0f} s"


def _top(cost: Cost) -> Iterator[str]:
    """The seconds of each kind of work, which add up to the total, and the longest exposed transfers."""
    for kind, seconds in sorted(cost.seconds.items(), key=lambda item: -item[1]):
        yield f"{seconds:10.3f} s {seconds / cost.total_seconds:6.1%}  {_KIND_NAMES[kind]}"
    yield f"{cost.total_seconds:10.3f} s 100.0%  in all"
    for total in sorted(cost.transfers, key=lambda total: -total.exposed_seconds):
        if total.exposed_seconds >= _TOP_SHARE * cost.total_seconds:
            yield f"{total.exposed_seconds:10.3f} s exposed at {total.source or 'no source line'}: {_described(total)}"


def _by_opcode(transfers: tuple[TransferTotal, ...]) -> list[TransferTotal]:
    """The transfers of all source lines together."""
    merged: dict[TransferTotal, TransferTotal] = {}
    for total in transfers:
        key = TransferTotal(total.opcode, total.network, total.overlapped)
        merged[key] = merged.get(key, key).plus(total)
    return sorted(merged.values(), key=lambda total: -total.seconds)


def _described(total: TransferTotal) -> str:
    how = "overlapped" if total.overlapped else "synchronous"
    return (
        f"{total.opcode} ({total.network}, {how}): {total.count:,} x, {total.num_bytes / 1e9:.2f} GB, "
        f"{total.seconds:.3f} s, exposed {total.exposed_seconds:.3f}"
    )


def _amount(number: float | None) -> str:
    assert number is not None
    return f"{number:,.1f}" if number >= 1 else f"{number:.2g}"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f}"
