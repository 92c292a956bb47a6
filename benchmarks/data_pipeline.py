"""Filling training batches: useful tokens per second here and in PyTorch.

    python benchmarks/data_pipeline.py

Both sides have the same records: 32 queries, 64 passages and 8 conversations a step. Here they are tokenized once
(`index_seconds`) and then packed into rows with their weights; in PyTorch a DataLoader's collate function calls
transformers' tokenizer, which truncates and pads, in every epoch. Neither side uses workers.
"""

from __future__ import annotations

import itertools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common

from grit_jax.config import Config, DataConfig, TrainConfig
from grit_jax.data.batch import ONE_HOST
from grit_jax.data.pipeline import Pipeline
from grit_jax.data.streams import trained_streams
from grit_jax.text import prompts
from grit_jax.text.tokenizer import Tokenizer

QUERIES, CONVERSATIONS = 32, 8
QUERY_LIMIT, LIMIT = 256, 512


def in_torch(folder: Path, records: dict[str, list[dict[str, Any]]], tokenizer: Tokenizer) -> Callable[[], int]:
    """A function that makes every batch in PyTorch and counts its tokens."""
    import transformers
    from torch.utils.data import DataLoader

    tokenize: Any = transformers.AutoTokenizer.from_pretrained(folder)

    def padded(texts: list[prompts.Prompt], limit: int) -> Any:
        return tokenize(
            [text.text for text in texts],
            add_special_tokens=False, truncation=True, max_length=limit, padding=True, return_tensors="pt",
        )  # fmt: skip

    def embedding(parts: list[dict[str, Any]]) -> list[Any]:
        queries = [prompts.embedding(record["query"][1], record["query"][0], bos=tokenizer.bos) for record in parts]
        passages = [
            prompts.embedding(text, instruction, bos=tokenizer.bos)
            for record in parts
            for instruction, text in (record["pos"][0], record["neg"][0])
        ]
        return [padded(queries, QUERY_LIMIT), padded(passages, LIMIT)]

    def generative(parts: list[dict[str, Any]]) -> list[Any]:
        special = {"bos": tokenizer.bos, "eos": tokenizer.eos}
        return [padded([prompts.conversation(record["text"], **special) for record in parts], LIMIT)]

    def run() -> int:
        loaders = (
            DataLoader(records["embedding"], QUERIES, shuffle=True, collate_fn=embedding),  # ty: ignore
            DataLoader(records["generative"], CONVERSATIONS, shuffle=True, collate_fn=generative),  # ty: ignore
        )
        return sum(int(part["attention_mask"].sum()) for part in itertools.chain(*itertools.chain(*loaders)))

    return run


def main() -> None:
    """Runs the benchmark."""
    parser = common.parser(__doc__)
    parser.add_argument("--steps", type=int, default=32, help="batches (%(default)s)")
    args = parser.parse_args()
    counts = {"embedding": QUERIES * args.steps, "generative": CONVERSATIONS * args.steps}
    records = {stream: common.sample_records(args.data, stream, count) for stream, count in counts.items()}
    with common.model_folder(args.tokenizer) as folder, tempfile.TemporaryDirectory() as data:
        for stream, lines in records.items():
            Path(data, f"{stream}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        tokenizer = Tokenizer.load(folder)
        config = Config(
            data=DataConfig(
                train=data, query_max_length=QUERY_LIMIT, passage_max_length=LIMIT, generative_max_length=LIMIT,
                embedding_batch=QUERIES, generative_batch=CONVERSATIONS,
            ),
            train=TrainConfig(steps=args.steps),
        )  # fmt: skip
        started = time.perf_counter()
        pipeline = Pipeline(config, tokenizer, trained_streams(config), host_share=ONE_HOST)
        index_seconds = time.perf_counter() - started

        def ours() -> int:
            streams = itertools.chain.from_iterable(
                batch.values() for batch in map(pipeline.batch, range(config.train.steps))
            )
            return sum(int((stream.segment_ids > 0).sum()) for stream in streams)

        sides = {"ours": ours}
        if not args.no_torch and common.has_torch():
            sides["torch"] = in_torch(folder, records, tokenizer)
        seconds, tokens = common.alternate(sides, args.repeats)
    values = common.speeds(seconds, tokens["ours"])
    common.report({"steps": args.steps, "tokens": tokens, "index_seconds": round(index_seconds, 2), **values})


if __name__ == "__main__":
    main()
