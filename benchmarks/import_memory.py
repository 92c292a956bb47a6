"""Peak host memory and time of `grit-jax import-hf`, beyond the arrays that it fills.

    python benchmarks/import_memory.py --gigabytes 4

Writes a Llama folder of random bfloat16 weights in 1 GB shards, imports it in a process of its own and prints one JSON
object: the memory for reading it onto the devices beyond the destination arrays, which are float32 and on CPU in host
memory too, and for writing the checkpoint, which copies one parameter (all its layers) at a time. Exit code 1 if
reading takes more than 1 GiB plus the largest tensor.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from grit_jax.config import EmbeddingConfig, TransformerConfig
from grit_jax.hf.config_json import write_config
from grit_jax.hf.tensors import get, model_tensors, write_tensors
from grit_jax.model.transformer import abstract_model, abstract_params
from grit_jax.text.tokenizer import Tokenizer

GIB = 1 << 30
BASE = TransformerConfig(
    embed_dim=2048, mlp_dim=5632, num_layers=1, num_heads=16, num_kv_heads=4, head_dim=128, tie_embeddings=False
)


def make_folder(folder: Path, gigabytes: float) -> tuple[int, int]:
    """Writes the folder; returns the number of parameters and the largest tensor's stored bytes."""
    rng = np.random.default_rng(0)
    tokenizer = Tokenizer.load("bytes")

    def counted(num_layers):
        architecture = TransformerConfig(**{**vars(BASE), "num_layers": num_layers}).resolve(32000)
        shapes = abstract_params(abstract_model(architecture))
        tensors = {}
        for row in model_tensors(architecture, EmbeddingConfig()):
            shape = get(shapes, row.path).shape
            tensors |= {name: row.stored_shape(shape) for name, _ in row.stored(shape)}
        return architecture, tensors, sum(map(math.prod, tensors.values()))

    one, two = counted(1)[2], counted(2)[2]
    num_layers = max(1, round((gigabytes * 1e9 / 2 - one) / (two - one)) + 1)
    architecture, tensors, count = counted(num_layers)

    def values():
        for name, shape in tensors.items():
            yield name, (rng.standard_normal(shape, np.float32) * 0.02).astype(ml_dtypes.bfloat16)

    folder.mkdir()
    write_tensors(folder, "model", values(), max_shard_bytes=10**9)
    config = write_config(architecture, dtype="bfloat16", bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)
    (folder / "config.json").write_text(json.dumps(config))
    for name, text in tokenizer.files().items():
        (folder / name).write_text(text)
    return count, 2 * max(map(math.prod, tensors.values()))


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def child(source: str, out: str) -> None:
    """Imports like `import-hf`, and prints the peak resident memory before, after reading and after writing."""
    import jax

    from grit_jax.checkpoints.checkpoint import CheckpointMetadata, save_params
    from grit_jax.checkpoints.opening import load_for_conversion

    jax.block_until_ready(jax.jit(lambda: jax.numpy.zeros(8))())
    before, started = peak_memory(), time.monotonic()
    pretrained, params = load_for_conversion(source)
    jax.block_until_ready(params)
    read, read_seconds = peak_memory(), time.monotonic() - started
    metadata = CheckpointMetadata(pretrained.architecture, pretrained.embedding, pretrained.tokenizer.files())
    save_params(out, params, metadata)
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    report = {"before": before, "read": read, "written": peak_memory(), "largest_parameter": largest}
    print(json.dumps(report | {"read_seconds": read_seconds, "seconds": time.monotonic() - started}))


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4, help="size of the stored weights (%(default)s)")
    parser.add_argument("--child", nargs=2, metavar=("SOURCE", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*args.child)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        count, largest = make_folder(Path(folder) / "hf", args.gigabytes)
        command = [sys.executable, __file__, "--child", f"{folder}/hf", f"{folder}/out"]
        measured = json.loads(
            subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
        )
    beyond = {part: measured[part] - measured["before"] - 4 * count for part in ("read", "written")}
    report = {
        "stored_gb": 2 * count / 1e9,
        "arrays_gib": 4 * count / GIB,
        "largest_tensor_gib": largest / GIB,
        "read_beyond_arrays_gib": beyond["read"] / GIB,
        "limit_gib": 1 + largest / GIB,
        "read_seconds": measured["read_seconds"],
        "largest_parameter_gib": measured["largest_parameter"] / GIB,
        "written_beyond_arrays_gib": beyond["written"] / GIB,
        "seconds": measured["seconds"],
    }
    print(json.dumps(report, indent=2))
    return int(beyond["read"] > GIB + largest)


if __name__ == "__main__":
    sys.exit(main())
