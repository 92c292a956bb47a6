"""Published training runs on TPUs next to the estimate of `grit-jax plan` for the same model, batch, lengths and chips.

    python benchmarks/published_runs.py
    python benchmarks/published_runs.py --only mistral-7b-v6e-8

Each run is planned as a generative-only step of grit_jax with the architecture, rows, row length, mesh and
rematerialisation of the published one, or the nearest; so the kernels and the program are this project's, not the
published run's. Some constants of the estimate were fixed with some of these runs (docs/planning.md). A run takes some
minutes, and 2 to 4 GiB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

from grit_jax.config import Config, load_config
from grit_jax.data.streams import trained_streams
from grit_jax.plan.program import make_plan, planned_config
from grit_jax.plan.topology import Topology, parse_topology
from grit_jax.plan.work import lengths_at_limits
from grit_jax.train.metrics import model_flops

_CONFIGS = Path(__file__).parents[1] / "configs"
_DENSE, _EXPERTS = "gritlm_7b_v5p_128_generative.yaml", "gritlm_8x7b_v5p_256.yaml"


@dataclass(frozen=True)
class Run:
    """A published run.

    Attributes:
      name: Short name.
      topology: Google Cloud's name of the chips.
      rows: Rows of each chip.
      length: Tokens of a row.
      remat: What a layer recomputes, by this project's name.
      source: Where it is published.
      tflops: Published model TFLOP/s of a chip, which count attention over all pairs of a row.
      seconds: Published seconds of a step, where `tflops` is 0.
      base: The config file that `settings` change.
      settings: Changes of the config.
    """

    name: str
    topology: str
    rows: int
    length: int
    remat: str
    source: str
    tflops: float = 0.0
    seconds: float = 0.0
    base: str = _DENSE
    settings: Sequence[str] = ()

    def config(self, topology: Topology) -> Config:
        """The config of the same step."""
        return planned_config(
            load_config(
                _CONFIGS / self.base,
                [
                    f"--data.generative_batch={self.rows * topology.num_chips}",
                    f"--data.generative_max_length={self.length}",
                    f"--model.remat={self.remat}",
                    "--model.architecture.sliding_window=null",
                    *self.settings,
                ],
            )
        )

    def published_seconds(self, config: Config) -> float:
        """Seconds of a step, from the published rate if no seconds are published."""
        tokens = self.rows * self.length
        flops = model_flops(
            config.model.architecture, tokens=tokens, tokens_through_head=tokens, attention_pairs=tokens * self.length
        )
        return flops / (1e12 * self.tflops) if self.tflops else self.seconds


def _architecture(**sizes: int | str) -> list[str]:
    return [f"--model.architecture.{key}={value}" for key, value in sizes.items()]


_MAXTEXT_V5E = "github.com/AI-Hypercomputer/maxtext: src/MaxText/configs/v5e/README.md and"
_RECIPES = "github.com/AI-Hypercomputer/tpu-recipes: training"
RUNS = (
    Run(
        "maxtext-16b-v5e-256", "v5e-256", 6, 2048, "full", f"{_MAXTEXT_V5E} 16b.sh", tflops=120,
        settings=_architecture(family="llama", embed_dim=4096, mlp_dim=28672, num_heads=64, num_kv_heads=64),
    ),
    Run(
        "maxtext-32b-v5e-256", "v5e-256", 4, 2048, "full", f"{_MAXTEXT_V5E} 32b.sh", tflops=132,
        settings=_architecture(family="llama", embed_dim=8192, mlp_dim=28672, num_heads=64, num_kv_heads=64),
    ),
    Run(
        # "512 Chips" there counts TensorCores: the script is for 4 million tokens on one v5p-512.
        "llama2-70b-v5p-512", "v5p-512", 4, 4096, "full",
        "MaxText's docs/reference/models/tiering.md and MaxText/configs/v5p/llama2_70b.sh", seconds=4 * 4096 / 692,
        settings=_architecture(family="llama", embed_dim=8192, mlp_dim=28672, num_layers=80, num_heads=64),
    ),
    Run(
        "mixtral-8x7b-v5p-128", "v5p-128", 36, 4096, "full",
        f"MaxText's end_to_end/tpu/mixtral/Run_Mixtral.md; {_RECIPES}/v5p/Mixtral-8X7B-Maxtext", tflops=251.94,
        base=_EXPERTS,
        settings=["--train.mode=generative", '--model.compiler_options={xla_tpu_scoped_vmem_limit_kib: "81920"}'],
    ),
    Run(
        "mistral-7b-v6e-8", "v6e-8", 6, 8192, "offload", f"{_RECIPES}/trillium/Mistral-7B-MaxText", seconds=6.320
    ),
    Run(
        "llama3.1-8b-v6e-8", "v6e-8", 3, 8192, "offload", f"{_RECIPES}/trillium/Llama3.1-8B-MaxText/v6e-8",
        seconds=3.443, settings=_architecture(family="llama", vocab_size=128256),
    ),
)  # fmt: skip


def measure(run: Run) -> dict[str, Any]:
    """The published and the estimated seconds of a step, and their ratio."""
    topology = parse_topology(run.topology)
    config = run.config(topology)
    cost = make_plan(config, topology, lengths_at_limits(trained_streams(config))).cost
    published = run.published_seconds(config)
    found = {"run": run.name, "source": run.source, "published_seconds": round(published, 3)}
    if cost is None:
        return found | {"estimated_seconds": None}
    return found | {
        "estimated_seconds": round(cost.total_seconds, 3),
        "ratio": round(cost.total_seconds / published, 3),
        **{kind: round(seconds, 3) for kind, seconds in cost.seconds.items() if seconds},
    }


def main() -> None:
    """Prints one JSON object per run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[run.name for run in RUNS], help="(all)")
    args = parser.parse_args()
    for run in RUNS:
        if not args.only or run.name in args.only:
            print(json.dumps(measure(run)), flush=True)


if __name__ == "__main__":
    main()
