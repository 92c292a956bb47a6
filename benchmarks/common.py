"""Shared parts of the benchmarks: the model, the texts, the PyTorch side's weights, timing and output."""

from __future__ import annotations

import argparse
import contextlib
import gzip
import importlib.util
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

# PyTorch's column is measured on the same CPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

from grit_jax.config import EmbeddingConfig, TransformerConfig
from grit_jax.hf.model_folder import save_folder
from grit_jax.model.pretrained import Pretrained
from grit_jax.model.transformer import init_params
from grit_jax.text.tokenizer import Tokenizer

SHARED = Path(__file__).parents[2] / "shared" / "data"
# 58 million parameters with a vocabulary of 32,000.
ARCHITECTURE = TransformerConfig(
    family="llama", embed_dim=512, mlp_dim=1536, num_layers=8, num_heads=8, num_kv_heads=4, tie_embeddings=False
)


def parser(description: str | None) -> argparse.ArgumentParser:
    """Arguments of every benchmark, below its module's docstring."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument(
        "--data",
        type=Path,
        default=SHARED / "train",
        help="folder with GRIT JSONL files (.jsonl or .jsonl.gz) in embedding/ and generative/ (%(default)s)",
    )
    result.add_argument(
        "--tokenizer",
        default=str(SHARED / "tokenizers" / "mistral-v1.tokenizer.model"),
        help="tokenizer.model, tokenizer.json or a folder with one (%(default)s)",
    )
    result.add_argument("--repeats", type=int, default=7, help="timed runs of each side (%(default)s)")
    result.add_argument("--no-torch", action="store_true", help="leave PyTorch's column out")
    return result


def read_lines(folder: Path, stream: str) -> dict[str, list[str]]:
    """The lines of a stream's files by file name, longest file first."""
    files = {}
    for path in sorted((folder / stream).glob("*.jsonl*")):
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            files[path.name.removesuffix(".gz")] = file.readlines()
    if not files:
        raise SystemExit(f"{folder / stream}: no .jsonl file; name a folder of GRIT data with --data")
    return dict(sorted(files.items(), key=lambda item: -len(item[1])))


def draw(lines: list[str], count: int) -> list[dict[str, Any]]:
    """Records of `count` lines, always the same ones."""
    return [json.loads(line) for line in random.Random(0).sample(lines, count)]


def sample_records(folder: Path, stream: str, count: int) -> list[dict[str, Any]]:
    """Records of a stream drawn from all its files together, always the same ones."""
    return draw([line for lines in read_lines(folder, stream).values() for line in lines], count)


@contextlib.contextmanager
def model_folder(tokenizer: str) -> Generator[Path]:
    """A Hugging Face folder with new weights, which both sides read; gone at the end."""
    loaded = Tokenizer.load(tokenizer)
    pretrained = Pretrained(ARCHITECTURE.resolve(loaded.vocab_size), EmbeddingConfig(), loaded, load=dict)
    params = jax.jit(init_params, static_argnums=0)(pretrained.architecture, jax.random.key(0))
    with tempfile.TemporaryDirectory() as folder:
        save_folder(Path(folder) / "model", pretrained, params)
        yield Path(folder) / "model"


def has_torch() -> bool:
    """Whether PyTorch's column can be measured."""
    return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def load_torch(folder: Path) -> Any:
    """The same model as a `LlamaForCausalLM` with sdpa on all cores."""
    import torch
    import transformers

    torch.set_num_threads(os.cpu_count() or 1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers.LlamaForCausalLM.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32)


class Seconds(NamedTuple):
    """Median time of a side: wall time, and processor time, which says more on a shared machine."""

    clock: float
    processor: float


def alternate(sides: Mapping[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, Seconds], dict[str, Any]]:
    """Times the sides, run in turn after one uncounted run, and returns the results of their first runs."""
    results = {name: side() for name, side in sides.items()}
    times: dict[str, list[Seconds]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            started = time.perf_counter(), time.process_time()
            side()
            times[name].append(Seconds(time.perf_counter() - started[0], time.process_time() - started[1]))
    return {name: Seconds(*map(statistics.median, zip(*runs))) for name, runs in times.items()}, results


def speeds(seconds: Mapping[str, Seconds], tokens: int) -> dict[str, float]:
    """Tokens per second, and the ratio of ours to PyTorch's if both were measured, in processor time too."""
    result = {f"{name}_tokens_per_second": round(tokens / value.clock, 1) for name, value in seconds.items()}
    if "torch" in seconds:
        for part in Seconds._fields:
            result[f"ratio_{part}"] = round(getattr(seconds["torch"], part) / getattr(seconds["ours"], part), 2)
    return result


def report(values: Mapping[str, Any]) -> None:
    """Prints the one JSON object of a benchmark."""
    print(json.dumps({"cores": os.cpu_count(), "load_average": os.getloadavg()[0], **values}, indent=2))
