"""Small real data and runs for tests of whole commands."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Small programs take longer to compile than to run: these flags halve the time of XLA's CPU compiler.
QUICK_COMPILER = [
    "--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1",
]  # fmt: skip

# One layer and short rows: a step takes milliseconds, compiling it a few seconds.
TINY = [
    "--model.architecture.embed_dim=32", "--model.architecture.mlp_dim=48", "--model.architecture.num_layers=1",
    "--model.architecture.num_heads=2", "--model.architecture.num_kv_heads=2", "--data.query_max_length=64",
    "--data.passage_max_length=64", "--data.generative_max_length=64", "--data.embedding_batch=8",
    "--data.generative_batch=4", "--data.row_buckets=1", "--checkpoint.every=2",
]  # fmt: skip


def write_data(folder):
    """Twelve embedding and twelve generative records."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["red", "green", "blue", "one", "two", "three", "four", "dog", "cat", "bird", "fish", "tree"]
    embedding = [
        {"query": ["find", f"what is {word}"], "pos": [["", f"{word} is a word"]], "neg": [["", f"not {word[::-1]}"]]}
        for word in words
    ]
    generative = [{"text": [f"say {word}", f"{word}!"]} for word in words]
    for name, rows in (("embedding", embedding), ("generative", generative)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def environment(devices=1, *, optimized=False, device_order=None):
    """Variables of a process that runs JAX on virtual devices of the CPU.

    `optimized` is for those that run for minutes. `device_order`, of the devices in a mesh, is explained in
    `tests/device_order/sitecustomize.py`; without it they come process by process, as they do on no pod.
    """
    flags = [f"--xla_force_host_platform_device_count={devices}", *([] if optimized else QUICK_COMPILER)]
    order = {} if device_order is None else {"DEVICE_ORDER": str(device_order)}
    paths = [ROOT / "tests/device_order", ROOT] if order else [ROOT]
    return (
        os.environ
        | order
        | {
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",  # an installed libtpu otherwise looks for a TPU host's metadata
            "XLA_FLAGS": " ".join(flags),
            # Each program is compiled once for all processes. There is no limit on the folder's size: to keep one, JAX
            # looks at every file of the folder whenever it writes one.
            "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache/d/programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
    )


def command(*arguments):
    return [
        sys.executable,
        "-c",
        "import sys; from grit_jax.cli.main import main; sys.exit(main())",
        *map(str, arguments),
    ]


def grit_jax(*arguments, devices=1, optimized=False, timeout=300):
    """Runs a command of the command line in a process of its own."""
    variables = environment(devices, optimized=optimized)
    return subprocess.run(command(*arguments), capture_output=True, text=True, env=variables, timeout=timeout)


def start(*arguments, devices=1):
    """Starts a command and leaves it running; its output can be read line by line."""
    return subprocess.Popen(
        command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(devices)
    )


def train_arguments(data, output, *more):
    return [
        "train", ROOT / "configs/tiny.yaml", *TINY, f"--data.train={data}", f"--train.output={output}", *more
    ]  # fmt: skip


def losses(output):
    """(step, loss, embedding, generative, gradient norm) of every line of metrics.jsonl, at full precision."""
    lines = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]
    return [
        tuple(line[key] for key in ("step", "loss", "loss/embedding", "loss/generative", "grad_norm")) for line in lines
    ]
