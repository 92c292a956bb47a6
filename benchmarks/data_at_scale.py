"""The data pipeline at scale: speeds per core, how full batches are, late starts, and memory with millions of rows.

    python benchmarks/data_at_scale.py
    python benchmarks/data_at_scale.py --rows 100000 1000000 10000000 --steps 8

- `index`: records and tokens counted per second and core, from files to mapped arrays, in this process;
- `lines`: how fast the lines of a JSONL file are found;
- `fill`: batches from the files of --data, of 32 x (256 + 2 x 512) + 8 x 512 tokens (the limits of data_pipeline.py)
  and of the paper's 2048 x (256 + 2 x 2048) + 256 x 2048, on one device and dealt to 64: the share of their tokens that
  is no padding, with rows rounded up to the buckets, and records and tokens per second and core;
- `first_batch`: seconds from nothing but the index to the first batch, of a run that starts at step 0 or 1,000,000;
- `scheduled`: with so many synthetic rows in the index (4 records in 5 with one negative, the rest without), the
  anonymous memory that the schedule takes, the seconds to make it, and milliseconds a step at steps 0 and 1,000,000 of
  2048 queries. Mapped pages are not counted: the system may drop them.

Speeds per core are by processor time, so they hold on a machine that others use.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core, for figures per core

import common
import numpy as np

from grit_jax.batch import ONE_HOST
from grit_jax.config import Config, DataConfig, LossConfig, TrainConfig
from grit_jax.data import counting, sources
from grit_jax.data.index import FileIndex
from grit_jax.data.pipeline import Pipeline
from grit_jax.data.schedule import Schedule
from grit_jax.tokenizer import Tokenizer

LATE = 1_000_000
LIMITS = {
    "benchmark": (
        1,
        DataConfig(
            query_max_length=256, passage_max_length=512, generative_max_length=512, embedding_batch=32,
            generative_batch=8,
        ),
    ),
    "paper": (1, DataConfig(embedding_batch=2048, generative_batch=256)),
    "paper_on_64_devices": (64, DataConfig(embedding_batch=2048, generative_batch=256)),
}  # fmt: skip


def index_speed(data: Path, tokenizer: Tokenizer, most: int) -> dict[str, float]:
    """Records and tokens counted per second of one core."""
    records = tokens = 0
    started = time.process_time()
    for path in sources.find_files([str(data / "embedding"), str(data / "generative")]):
        source = sources.open_source(path)
        counts = counting.count_records(source, 0, min(len(source), most), tokenizer)
        records, tokens = records + len(counts.numbers), tokens + int(counts.lengths.sum())
    seconds = time.process_time() - started
    return {"records_per_second": round(records / seconds), "tokens_per_second": round(tokens / seconds)}


def line_speed(megabytes: int) -> dict[str, float]:
    """Gigabytes whose lines are found per second of one core."""
    line = b'{"text": "' + b"x" * 500 + b'"}\n'
    content = line * (megabytes * 1_000_000 // len(line))
    started = time.process_time()
    places = sources._line_places(content)
    seconds = time.process_time() - started
    return {"lines": places.shape[1], "gigabytes_per_second": round(len(content) / seconds / 1e9, 2)}


def fill(data: Path, tokenizer: Tokenizer, devices: int, config: DataConfig, steps: int) -> dict[str, Any]:
    """Share that is no padding, and speeds per core."""
    train = [str(data / "embedding"), str(data / "generative")]
    run = Config(data=dataclasses.replace(config, train=train), train=TrainConfig(steps=2 * LATE))
    pipeline = Pipeline(run, tokenizer, row_multiples=(devices, devices), host_share=ONE_HOST)
    filler = pipeline._filler(*pipeline._training)
    filled: dict[str, list[tuple[int, int]]] = {"embedding": [], "generative": []}
    started = time.process_time()
    for k in range(steps):
        batch = filler.fill(pipeline._schedule.step(k))
        for stream, sizes in filled.items():
            segments = getattr(batch, stream).segment_ids
            sizes.append((int((segments > 0).sum()), segments.size))
    seconds = time.process_time() - started
    tokens = sum(used for sizes in filled.values() for used, _ in sizes)
    shares = {
        stream: round(sum(used for used, _ in sizes) / sum(size for _, size in sizes), 3)
        for stream, sizes in filled.items()
    }
    size = sum(size for sizes in filled.values() for _, size in sizes)
    return {
        "fill": shares | {"both": round(tokens / size, 3)},
        "records_per_second": round(steps * (config.embedding_batch + config.generative_batch) / seconds),
        "tokens_per_second": round(tokens / seconds),
    }


def first_batch(data: Path, tokenizer: Tokenizer, start: int) -> float:
    """Seconds to the first batch, with the tokens counted before."""
    train = [str(data / "embedding"), str(data / "generative")]
    _, limits = LIMITS["benchmark"]
    run = Config(data=dataclasses.replace(limits, train=train), train=TrainConfig(steps=2 * LATE))
    started = time.perf_counter()
    pipeline = Pipeline(run, tokenizer, row_multiples=(1, 1), host_share=ONE_HOST)
    next(pipeline.batches(start))
    return round(time.perf_counter() - started, 2)


def synthetic_index(folder: Path, rows: int) -> FileIndex:
    """An index of that many records of one positive, mapped from files."""
    rng = np.random.default_rng(0)
    texts_of = np.full(rows, 3, np.int64)
    texts_of[::5] = 2
    starts = np.concatenate([[0], np.cumsum(texts_of)])
    texts = int(starts[-1])
    lengths = rng.integers(20, 400, texts, np.int32)
    arrays = {
        "text_starts": starts, "num_positives": np.ones(rows, np.int32), "lengths": lengths,
        "hashes": np.arange(texts), "span_starts": np.arange(texts + 1),
        "spans": np.stack([np.full(texts, 8, np.int32), lengths], 1),
    }  # fmt: skip
    folder.mkdir()
    (folder / "meta.json").write_text('{"stream": "embedding", "bad": [], "fingerprint": "synthetic"}')
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    del arrays, starts, texts_of, lengths
    mapped: dict[str, Any] = {path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.npy")}
    return FileIndex(folder / "synthetic.jsonl", "embedding", **mapped, folder=folder)


def anonymous_mebibytes() -> float:
    """Memory of this process that is no mapped file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    return float("nan")


def scheduled(rows: int) -> dict[str, float]:
    """Memory and times of a schedule over many rows, in a process that has nothing else."""
    folder = Path(tempfile.mkdtemp())
    try:
        index = synthetic_index(folder / "index", rows)
        before, started = anonymous_mebibytes(), time.perf_counter()
        data = DataConfig(query_max_length=256, passage_max_length=512, embedding_batch=2048)
        train = TrainConfig(mode="embedding")
        schedule = Schedule([index], data=data, loss=LossConfig(), train=train, row_multiples=(64, 64))
        made = time.perf_counter() - started
        milliseconds = {}
        for first in (0, LATE):
            started = time.process_time()
            for k in range(first, first + 8):
                schedule.step(k)
            milliseconds[f"milliseconds_a_step_at_{first}"] = round((time.process_time() - started) / 8 * 1e3, 1)
        return {
            "rows": rows,
            "index_mebibytes_on_disk": round(sum(p.stat().st_size for p in folder.rglob("*.npy")) / 2**20),
            "schedule_mebibytes": round(anonymous_mebibytes() - before, 1),
            "seconds": round(made, 2),
            **milliseconds,
        }
    finally:
        shutil.rmtree(folder)


def main() -> None:
    """Runs the benchmark."""
    parser = common.parser(__doc__)
    parser.add_argument(
        "--rows",
        type=int,
        nargs="*",
        default=[100_000, 1_000_000, 10_000_000],
        help="of synthetic indexes (%(default)s)",
    )
    parser.add_argument("--steps", type=int, default=8, help="batches that are filled (%(default)s)")
    parser.add_argument(
        "--records", type=int, default=2000, help="most records of a file that are counted (%(default)s)"
    )
    args = parser.parse_args()
    tokenizer = Tokenizer.load(args.tokenizer)
    # The first in a process whose heap has not grown yet.
    values: dict[str, Any] = {"scheduled": [scheduled(rows) for rows in args.rows]}
    values |= {"lines": line_speed(256), "index": index_speed(args.data, tokenizer, args.records)}
    values["fill"] = {
        name: fill(args.data, tokenizer, devices, config, args.steps) for name, (devices, config) in LIMITS.items()
    }
    values["first_batch"] = {f"at_step_{start}": first_batch(args.data, tokenizer, start) for start in (0, LATE)}
    common.report(values)


if __name__ == "__main__":
    main()
