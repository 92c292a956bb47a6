"""Our generative-only 7B step next to a peer's pretraining step: the same TPUs, compiler and judge.

    python benchmarks/peer_step.py --judge ../shared/tpu/hlocost.py
    python benchmarks/peer_step.py --judge ../shared/tpu/hlocost.py --rows v5e-64:4:offload

A row is a topology, the number of 2048-token texts on each chip, and what a layer recomputes. The peer's figures are in
../shared/tpu/README.md. A row takes some minutes. `peak_gib` is the compiler's; with arrays in the host's memory it is
arguments and temporaries, as the compiler's own peak counts the host's too.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

from grit_jax.config import load_config
from grit_jax.data.streams import trained_streams
from grit_jax.plan.program import lower, planned_config, planned_mesh
from grit_jax.plan.topology import parse_topology
from grit_jax.plan.work import lengths_at_limits
from grit_jax.train.setup import set_up

_CONFIG = Path(__file__).parents[1] / "configs/gritlm_7b_v5p_128_generative.yaml"
_ROWS = ("v5e-64:4:offload", "v5p-16:8:full", "v5p-32:4:dots", "v6e-64:8:full", "v6e-64:4:dots")
_GIB = 2**30


def measure(row: str, judge: Any) -> dict[str, Any]:
    """Memory by the compiler, seconds by the judge."""
    name, rows, remat = row.split(":")
    topology = parse_topology(name)
    settings = [f"--data.generative_batch={int(rows) * topology.num_chips}", f"--model.remat={remat}"]
    config = planned_config(load_config(_CONFIG, settings))
    mesh = planned_mesh(config, topology)
    _, lowered = lower(set_up(config, mesh), mesh, lengths_at_limits(trained_streams(config)))
    begun = time.monotonic()
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    live = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    in_host = memory.host_temp_size_in_bytes
    return {
        "row": row,
        "seconds": judge.analyze(compiled.as_text(), topology.chip.name)["total_s"],
        "peak_gib": (live if in_host else memory.peak_memory_in_bytes) / _GIB,
        "arguments_gib": memory.argument_size_in_bytes / _GIB,
        "temporaries_gib": memory.temp_size_in_bytes / _GIB,
        "host_gib": in_host / _GIB,
        "compile_seconds": time.monotonic() - begun,
    }


def main() -> None:
    """Prints one JSON object per row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judge", type=Path, required=True, help="hlocost.py")
    parser.add_argument("--rows", nargs="+", default=_ROWS, metavar="TOPOLOGY:TEXTS:REMAT", help="(%(default)s)")
    args = parser.parse_args()
    spec = importlib.util.spec_from_file_location("judge", args.judge)
    assert spec and spec.loader
    judge = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(judge)
    for row in args.rows:
        print(json.dumps({name: round(x, 3) if isinstance(x, float) else x for name, x in measure(row, judge).items()}),
              flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
