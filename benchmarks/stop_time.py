"""Predicted seconds from a notice of preemption to a complete checkpoint, for every config of a pod.

    python benchmarks/stop_time.py [--gigabytes-per-second 1]

A stop waits for the step in flight, at most a whole one, and for the save. The first lines of each config give the
seconds of a step, predicted by `grit-jax plan` with every text at its limit. Those of a save are computed: the bytes of
the state, spread over the hosts of one copy, at an assumed write rate. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import jax

from grit_jax.config import load_config
from grit_jax.model.transformer import abstract_model, abstract_params
from grit_jax.plan.program import planned_config
from grit_jax.plan.topology import parse_topology

NOTICE_SECONDS = 30  # before a spot machine ends, on Google Cloud
HEARD_SECONDS = 1  # until every process knows
STATE_BYTES = 12  # per parameter: itself and AdamW's two moments, in float32
CHIPS_PER_HOST = 4  # in slices of several hosts


def row(path: Path, rate: float) -> str:
    """A config's line of the table; `rate` in GB/s of a host."""
    header = " ".join(line.lstrip("# ").rstrip() for line in path.read_text().splitlines() if line.startswith("#"))
    found = re.search(r"--topology (\S+)(?: --slices (\d+))?.* takes a predicted ([\d.]+) s", header)
    assert found, f"{path}: no topology and predicted seconds in its first lines"
    topology, step = parse_topology(found[1], slices=int(found[2] or 1)), float(found[3])
    config = planned_config(load_config(path))
    params = abstract_params(abstract_model(config.model.architecture, config.model.embedding.projection_dim))
    gigabytes = STATE_BYTES * sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e9
    hosts = topology.chips_per_slice // CHIPS_PER_HOST
    save = gigabytes / hosts / rate
    in_time = min(1.0, max(0.0, (NOTICE_SECONDS - HEARD_SECONDS - save) / step))
    longest = HEARD_SECONDS + step + save
    state = f"{gigabytes:.0f} GB, {hosts} hosts"
    return f"| `{path.stem}` | {step:.1f} | {state} | {save:.1f} | {longest:.1f} | {in_time:.0%} |"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--gigabytes-per-second", type=float, default=1.0, metavar="R", help="that a host writes, assumed (%(default)s)"
    )
    args = parser.parse_args()
    print("| config | step, s | state | save, s | longest stop, s | notices in time |\n|---|---|---|---|---|---|")
    for path in sorted((Path(__file__).parents[1] / "configs").glob("gritlm_*.yaml")):
        print(row(path, args.gigabytes_per_second))


if __name__ == "__main__":
    main()
