"""The contrastive loss and its gradient: time and memory of each form, next to PyTorch's.

    python benchmarks/loss_at_scale.py                       # on this machine's CPU, 1 and 8 virtual devices
    python benchmarks/loss_at_scale.py --topology v5p:4x4x4  # memory of a pod's batch on 64 chips (v5p-128), compiled

Prints one JSON object. On CPU all forms take turns with PyTorch's dense InfoNCE (if torch is installed), and times are
medians; `temp_mib` is what the compiler allocates on a device beyond inputs and outputs. Virtual devices share the same
cores: 8 of them show what a form costs, not what it gains.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import time

TEMPERATURE = 0.02
MIB = 1 << 20


def compile_loss(devices, negatives, num_queries, num_passages, embed):
    """Compiles loss and gradient for a mesh that splits the batch over `devices`; also gives its inputs' shardings."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding

    from grit_jax.config import MeshConfig
    from grit_jax.losses.contrastive import contrastive_loss
    from grit_jax.parallel.sharding import make_mesh, partition_spec, replicated

    def loss(query, passage, weights, ids):
        return contrastive_loss(
            query, passage, temperature=TEMPERATURE, query_weights=weights, passage_ids=ids, negatives=negatives
        )

    mesh = make_mesh(MeshConfig(), devices)
    split, whole = NamedSharding(mesh, partition_spec(("batch", "activation_embed"))), replicated(mesh)
    shardings = (split, split, whole, whole)
    shapes = ((num_queries, embed), (num_passages, embed), (num_queries,), (num_passages,))
    dtypes = (jnp.float32, jnp.float32, jnp.float32, jnp.int32)
    inputs = map(lambda *one: jax.ShapeDtypeStruct(one[0], one[1], sharding=one[2]), shapes, dtypes, shardings)
    with jax.set_mesh(mesh):
        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), out_shardings=(whole, (split, split)))
        return step.lower(*inputs).compile(), shardings


def on_cpu(num_queries: int, num_passages: int, embed: int, repeats: int) -> dict:
    """Times every form on 1 and 8 devices, and PyTorch, one after the other in every round."""
    import jax
    import numpy as np

    rng = np.random.default_rng(0)
    query, passage = (rng.standard_normal((count, embed), np.float32) for count in (num_queries, num_passages))
    query, passage = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (query, passage))
    weights, ids = np.full(num_queries, 1 / num_queries, np.float32), np.arange(num_passages, dtype=np.int32)
    runs, rows = {}, {}
    for count in (1, 8):
        for negatives in ("dense", "gathered", "ring")[: 2 if count == 1 else 3]:
            name = f"{negatives}, {count} device{'' if count == 1 else 's'}"
            compiled, shardings = compile_loss(jax.devices()[:count], negatives, num_queries, num_passages, embed)
            inputs = jax.device_put((query, passage, weights, ids), shardings)
            runs[name] = lambda compiled=compiled, inputs=inputs: jax.block_until_ready(compiled(*inputs))
            rows[name] = {"temp_mib": compiled.memory_analysis().temp_size_in_bytes / MIB}
    if importlib.util.find_spec("torch"):
        import torch

        sides = [torch.from_numpy(x).requires_grad_() for x in (query, passage)]
        positive = torch.arange(num_queries) * (num_passages // num_queries)

        def torch_run():
            loss = torch.nn.functional.cross_entropy(sides[0] @ sides[1].T / TEMPERATURE, positive)
            return loss, torch.autograd.grad(loss, sides)

        runs["torch dense"], rows["torch dense"] = torch_run, {}
    seconds = {name: [] for name in runs}
    for repeat in range(repeats + 1):  # the first round warms up
        for name, run in runs.items():
            started = time.perf_counter()
            result = run()
            if repeat:
                seconds[name].append(time.perf_counter() - started)
            rows[name]["loss"] = result[0].item()
    for name, row in rows.items():
        row["seconds"] = statistics.median(seconds[name])
    return rows


def on_topology(topology: str, num_queries: int, num_passages: int, embed: int) -> dict:
    """Memory of the tiled forms on each chip, from ahead-of-time compiles."""
    from jax.experimental import topologies

    chips = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    rows = {}
    for negatives in ("gathered", "ring"):
        started = time.perf_counter()
        memory = compile_loss(chips, negatives, num_queries, num_passages, embed)[0].memory_analysis()
        rows[negatives] = {
            "arguments_mib": memory.argument_size_in_bytes / MIB,
            "temp_mib": memory.temp_size_in_bytes / MIB,
            "peak_mib": memory.peak_memory_in_bytes / MIB,
            "compile_seconds": time.perf_counter() - started,
        }
    return rows


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", help="TPU topology to compile for, such as v5p:4x4x4 (needs libtpu)")
    parser.add_argument("--queries", type=int, help="2048, or 65536 with --topology")
    parser.add_argument("--passages", type=int, help="twice the queries")
    parser.add_argument("--embed", type=int, help="256, or 4096 with --topology")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds (%(default)s)")
    args = parser.parse_args()
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    num_queries = args.queries or (65_536 if args.topology else 2048)
    sizes = (num_queries, args.passages or 2 * num_queries, args.embed or (4096 if args.topology else 256))
    report = dict(zip(("queries", "passages", "embed"), sizes, strict=True))
    if args.topology:
        report |= {"topology": args.topology, "forms": on_topology(args.topology, *sizes)}
    else:
        report |= {"forms": on_cpu(*sizes, args.repeats)}
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
