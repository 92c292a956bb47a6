"""The data pipeline at scale: speeds per core, how full batches are, late starts, and memory with millions of rows.

    python benchmarks/data_at_scale.py
    python benchmarks/data_at_scale.py --rows 100000 1000000 10000000 --steps 8
    python benchmarks/data_at_scale.py --real-rows 10000000

- `index`: records and tokens tokenized per second and core, from files to mapped arrays on the disk, in this process,
  and the bytes that a token takes there: its own, and with lengths, spans and everything else;
- `lines`: how fast it finds the lines of a JSONL file;
- `fill`: batches from the files of --data, of 32 x (256 + 2 x 512) + 8 x 512 tokens (the limits of data_pipeline.py)
  and of the paper's 2048 x (256 + 2 x 2048) + 256 x 2048, on one device and dealt to 64: the share of their tokens that
  is not padding, with rows rounded up to the buckets, and records and tokens per second and core;
- `first_batch`: seconds from the token index to the first batch, for a run that starts at step 0 or 1,000,000;
- `scheduled`: with --rows synthetic records in the index (4 in 5 with one negative, the rest without), the anonymous
  memory that the schedule takes and that stays after batches, the seconds to open index and schedule and to the first
  batch, and processor milliseconds per step, only planned and also filled, at steps 0 and 1,000,000 of 2048 queries.
  Mapped pages do not count: the system may drop them. Texts have 20 to 399 tokens: 10,000,000 rows take 13 GB in
  --folder;
- `tokenized`, with --real-rows: as many records, each a numbered query of --data with one positive, from one JSONL file
  to an index and a first batch: time and memory of the processes, and the size of the index.

Speeds per core are by processor time, so they hold on a shared machine.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core, for figures per core

import common
import numpy as np

from grit_jax import files
from grit_jax.config import Config, DataConfig, TrainConfig
from grit_jax.data import sources
from grit_jax.data.batch import ONE_HOST, HostShare
from grit_jax.data.index_builder import build_indexes
from grit_jax.data.pipeline import Pipeline, planned_rows
from grit_jax.data.schedule import Schedule
from grit_jax.data.streams import all_streams, trained_streams
from grit_jax.data.token_index import CHECKED_BYTES, IndexedFile, checksums, open_index, write_meta
from grit_jax.text.tokenizer import Tokenizer

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
    """Records and tokens per second of one core, with the first `most` records of each file, and bytes per token."""
    seconds = 0.0
    indexes = []
    with tempfile.TemporaryDirectory() as folder:
        for path in sources.find_files([str(data / "embedding"), str(data / "generative")]):
            source = sources.open_source(path)
            part = Path(folder, f"{path.name.partition('.')[0]}.jsonl")
            part.write_bytes(b"\n".join(source.lines(0, min(len(source), most))))
            started = time.process_time()
            indexes += [file.index for file in build_indexes([part], tokenizer, all_streams(Config()))]
            seconds += time.process_time() - started
        tokens = sum(int(index.lengths.sum()) for index in indexes)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.npy"))
        own = sum(path.stat().st_size for path in Path(folder).rglob("tokens.npy"))
    return {
        "records_per_second": round(sum(index.num_records for index in indexes) / seconds),
        "tokens_per_second": round(tokens / seconds),
        "bytes_a_token": round(own / tokens, 2),
        "bytes_a_token_with_all_else": round(size / tokens, 2),
    }


def line_speed(megabytes: int) -> dict[str, float]:
    """Gigabytes whose lines are found per second of one core."""
    line = b'{"text": "' + b"x" * 500 + b'"}\n'
    content = line * (megabytes * 1_000_000 // len(line))
    started = time.process_time()
    places = sources._line_offsets(content)
    seconds = time.process_time() - started
    return {"lines": places.shape[1], "gigabytes_per_second": round(len(content) / seconds / 1e9, 2)}


def fill(data: Path, tokenizer: Tokenizer, devices: int, config: DataConfig, steps: int) -> dict[str, Any]:
    """Share that is not padding, and speeds per core."""
    train = [str(data / "embedding"), str(data / "generative")]
    run = Config(data=dataclasses.replace(config, train=train), train=TrainConfig(steps=2 * LATE))
    every_shard = HostShare(tuple(range(devices)), devices)
    pipeline = Pipeline(run, tokenizer, trained_streams(run), host_share=every_shard)
    filled: dict[str, list[tuple[int, int]]] = {"embedding": [], "generative": []}
    started = time.process_time()
    for k in range(steps):
        batch = pipeline.batch(k)
        for stream, sizes in filled.items():
            segments = batch[stream].segment_ids
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
    """Seconds to the first batch, with tokens already counted."""
    train = [str(data / "embedding"), str(data / "generative")]
    _, limits = LIMITS["benchmark"]
    run = Config(data=dataclasses.replace(limits, train=train), train=TrainConfig(steps=2 * LATE))
    started = time.perf_counter()
    pipeline = Pipeline(run, tokenizer, trained_streams(run), host_share=ONE_HOST)
    pipeline.batch(start)
    return round(time.perf_counter() - started, 2)


def write_index(folder: Path, rows: int) -> None:
    """Writes an index of that many records of one positive."""
    rng = np.random.default_rng(0)
    texts_of = np.full(rows, 3, np.int64)
    texts_of[::5] = 2
    starts = np.concatenate([[0], np.cumsum(texts_of)])
    texts = int(starts[-1])
    lengths = rng.integers(20, 400, texts, np.int32)
    token_starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    folder.mkdir()
    tokens = np.lib.format.open_memmap(folder / "tokens.npy", "w+", np.dtype(np.uint16), (int(token_starts[-1]),))
    block = np.frombuffer(rng.bytes(1 << 25), np.uint16)
    for start in range(0, len(tokens), len(block)):
        part = tokens[start : start + len(block)]
        part[:] = block[: len(part)]
    tokens.flush()
    arrays = {
        "text_starts": starts, "num_positives": np.ones(rows, np.int32), "lengths": lengths,
        "hashes": np.arange(texts), "span_starts": np.arange(texts + 1),
        "spans": np.stack([np.full(texts, 8, np.int32), lengths], 1), "token_starts": token_starts,
        "endings": np.zeros(texts, np.uint8),
        "checksums": checksums(tokens, np.arange(-(-tokens.nbytes // CHECKED_BYTES))),
    }  # fmt: skip
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    names = ["tokens.npy", *(f"{name}.npy" for name in arrays)]
    digests = {name: files.sha256(folder / name) for name in names[1:]}
    about = {"kind": "embedding", "bad": [], "fingerprint": ["synthetic"] * 3, "arrays": names, "sha256": digests}
    write_meta(folder, about)


def anonymous_mebibytes() -> float:
    """Memory of this process other than mapped files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    return float("nan")


def scheduled(rows: int, parent: Path | None) -> dict[str, float]:
    """Memory and times of schedule and batches over many records, in a process with nothing else."""
    folder = Path(tempfile.mkdtemp(dir=parent))
    try:
        write = multiprocessing.get_context("spawn").Process(target=write_index, args=(folder / "index", rows))
        write.start()
        write.join()
        before, started = anonymous_mebibytes(), time.perf_counter()
        index = open_index(folder / "synthetic.jsonl", folder / "index")
        opened = time.perf_counter() - started
        data = DataConfig(query_max_length=256, passage_max_length=512, embedding_batch=2048)
        train = TrainConfig(mode="embedding")
        (stream,) = trained_streams(Config(data=data, train=train))
        schedule = Schedule([IndexedFile(0, index, stream)], [stream], data=data, train=train, num_shards=64)
        made = time.perf_counter() - started
        memory = anonymous_mebibytes() - before

        def fill(k: int) -> int:
            plan = schedule.stream_plan(k, stream.name)
            rows = planned_rows(plan.rows, {0: index}, ONE_HOST, stream.row_length)
            return int((stream.fill(plan, rows).segment_ids > 0).sum())

        values = {}
        for first in (0, LATE):
            started = time.perf_counter()
            values["tokens_a_step"] = fill(first)
            values[f"first_batch_seconds_at_{first}"] = round(made + time.perf_counter() - started, 2)
            for name, make in (("planned", schedule.step), ("filled", fill)):
                started = time.process_time()
                for k in range(first + 1, first + 9):
                    make(k)
                seconds = (time.process_time() - started) / 8
                values[f"milliseconds_a_step_at_{first}_{name}"] = round(seconds * 1e3, 1)
        return {
            "rows": rows,
            "index_mebibytes_on_disk": round(sum(p.stat().st_size for p in folder.rglob("*.npy")) / 2**20),
            "schedule_mebibytes": round(memory, 1),
            "mebibytes_after_batches": round(anonymous_mebibytes() - before, 1),
            "seconds_to_open_the_index": round(opened, 2),
            "seconds": round(made, 2),
            **values,
        }
    finally:
        shutil.rmtree(folder)


def tokenized(rows: int, data: Path, tokenizer: Tokenizer, parent: Path | None) -> dict[str, float]:
    """A file of real texts from nothing to its first batch, in wall time and in the time of all processors."""
    paths = sources.find_files([str(data / "embedding")])
    every = [sources.open_source(path) for path in paths]
    records = [json.loads(line) for source in every for line in source.lines(0, len(source))]
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        path = Path(folder, "records.jsonl")
        with path.open("w") as file:
            for number, record in zip(range(rows), itertools.cycle(records), strict=False):
                instruction, text = record["query"]
                kept = {"query": [instruction, f"{number}: {text}"], "pos": record["pos"][:1], "neg": []}
                file.write(json.dumps(kept) + "\n")
        started, processed = time.perf_counter(), os.times()
        (file,) = build_indexes([path], tokenizer, trained_streams(Config(train=TrainConfig(mode="embedding"))))
        seconds = time.perf_counter() - started
        workers = os.times().children_user + os.times().children_system
        own = sum(os.times()[:2]) - sum(processed[:2])
        tokens = int(file.index.lengths.sum())
        values = {
            "records": file.index.num_records,
            "tokens": tokens,
            "gigabytes_of_text": round(path.stat().st_size / 1e9, 2),
            "bytes_a_token": round(sum(p.stat().st_size for p in Path(folder).rglob("*.npy")) / tokens, 2),
            "seconds": round(seconds),
            "processor_seconds": round(own + workers - processed.children_user - processed.children_system),
            "peak_mebibytes_of_a_worker": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024),
        }
        limits = dataclasses.replace(LIMITS["paper"][1], train=[str(path)])
        run = Config(data=limits, train=TrainConfig(mode="embedding", steps=2 * LATE))
        for start in (0, LATE):
            started, before = time.perf_counter(), anonymous_mebibytes()
            pipeline = Pipeline(run, tokenizer, trained_streams(run), host_share=ONE_HOST)
            pipeline.batch(start)
            values[f"first_batch_seconds_at_{start}"] = round(time.perf_counter() - started, 2)
            values[f"mebibytes_of_the_pipeline_at_{start}"] = round(anonymous_mebibytes() - before, 1)
        return values


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
    parser.add_argument("--real-rows", type=int, default=0, help="records of a file that is tokenized whole (none)")
    parser.add_argument("--steps", type=int, default=8, help="batches that are filled (%(default)s)")
    parser.add_argument(
        "--records", type=int, default=2000, help="most records of a file that are tokenized (%(default)s)"
    )
    parser.add_argument("--folder", type=Path, help="where synthetic indexes are written (that of temporary files)")
    args = parser.parse_args()
    tokenizer = Tokenizer.load(args.tokenizer)
    if args.real_rows:
        common.report({"tokenized": tokenized(args.real_rows, args.data, tokenizer, args.folder)})
        return
    # First, while the heap of the process has not grown yet.
    values: dict[str, Any] = {"scheduled": [scheduled(rows, args.folder) for rows in args.rows]}
    values |= {"lines": line_speed(256), "index": index_speed(args.data, tokenizer, args.records)}
    values["fill"] = {
        name: fill(args.data, tokenizer, devices, config, args.steps) for name, (devices, config) in LIMITS.items()
    }
    values["first_batch"] = {f"at_step_{start}": first_batch(args.data, tokenizer, start) for start in (0, LATE)}
    common.report(values)


if __name__ == "__main__":
    main()
