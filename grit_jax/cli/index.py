"""The command `grit-jax index`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from grit_jax.cli.command import MODEL, argument, command, number, progress_bar
from grit_jax.config import parse_config
from grit_jax.retrieval.quantization import DTYPES
from grit_jax.text.prompts import CACHE_FORMS


@command(
    "embed a corpus into a searchable store; run again to resume or to add new documents",
    MODEL,
    argument(
        "corpus", metavar="CORPUS", nargs="+",
        help='.jsonl, .jsonl.gz or .jsonl.zst with {"_id": ..., "title": ..., "text": ...} per line, or folders',
    ),
    argument("store", metavar="STORE", help="folder on a disk, shared by all processes"),
    argument("--dtype", choices=DTYPES, help="type of the vectors (default: float32)"),
    argument("--instruction", help="instruction of the documents; read, not pooled (default: none)"),
    number("--max-length", "N", "most tokens of a document, the rest is cut (default: the model's limit)"),
    argument(
        "--caches", choices=DTYPES,
        help="keep the documents' keys and values too, in this type, for grit-jax answer (default: none)",
    ),
    argument(
        "--cache-form", choices=CACHE_FORMS,
        help="whether the model reads a document first, or second, after a cached query (default: first)",
    ),
    number("--shard-rows", "N", "documents of a shard; a killed command repeats at most one", 4096),
    overrides="--distributed.",
    examples="""\
  grit-jax index runs/mine beir/scifact stores/scifact
  grit-jax index runs/mine news-1.jsonl.gz news-2.jsonl.zst stores/news --dtype int8 --max-length 512
  grit-jax index runs/mine news-3.jsonl stores/news
  grit-jax index runs/mine faq.jsonl stores/faq --caches bfloat16 --max-length 512
""",
)  # fmt: skip
def run(args: argparse.Namespace) -> int:
    """Makes a store, resumes it or adds to it."""
    config = parse_config("", args.overrides)

    from grit_jax.parallel import distributed

    distributed.start(config.distributed)

    import jax

    from grit_jax.inference.model import GritModel
    from grit_jax.retrieval.documents import find_corpus
    from grit_jax.retrieval.ingest import Wanted, add_documents, add_vectors, own_rows, sole_indexer

    corpus = distributed.in_first_process(lambda: find_corpus(args.corpus)) or []
    with sole_indexer(args.store) as writer:
        store = Path(args.store)
        model = GritModel.load(args.model, devices=jax.local_devices())
        wanted = Wanted(args.dtype, args.instruction, args.max_length, args.caches, args.cache_form)
        with progress_bar("reading") as progress:
            begun = add_documents(
                store, corpus, model, wanted,
                name=args.model, shard_rows=args.shard_rows, writer=writer, progress=progress,
            )  # fmt: skip
        started = time.monotonic()
        with progress_bar("embedding", own_rows(begun)) as progress:
            manifest = add_vectors(store, model, writer=writer, progress=progress)
        seconds = time.monotonic() - started
    if jax.process_index() == 0:
        tokens = manifest.num_tokens - begun.num_tokens
        parts, settings, rows = manifest.parts, manifest.settings, manifest.num_rows
        repeated = sum(part.repeated for part in parts)
        size = sum(path.stat().st_size for path in store.iterdir()) / 1e6
        cached = sum(path.stat().st_size for path in store.glob("caches-*")) / 1e6
        caches = (
            f", {cached:,.1f} MB of these keys and values in {settings.caches}, {cached / rows:,.3f} MB each"
            if settings.caches
            else ""
        )
        print(
            f"{store}: {rows:,} documents in {len(manifest.shards):,} shards, {settings.embed_dim} x "
            f"{settings.dtype}, {size:,.1f} MB{caches}; left out {repeated:,} with the text of "
            f"another and {sum(part.empty for part in parts):,} without text; "
            f"{sum(shard.truncated for shard in manifest.shards):,} cut to {settings.max_length:,} tokens\n"
            f"embedded now: {manifest.num_embedded - begun.num_embedded:,} documents, {tokens:,} tokens in "
            f"{seconds:.1f} s ({tokens / seconds:,.0f} tokens/s)"
        )
    return 0
