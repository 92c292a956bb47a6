"""The command `grit-jax index`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from grit_jax.cli.arguments import refuse_not_positive
from grit_jax.cli.overrides import refuse_unknown
from grit_jax.cli.progress import progress_bar
from grit_jax.config import parse_config
from grit_jax.retrieval.quantization import DTYPES
from grit_jax.text.prompts import CACHE_FORMS

HELP = "embed a corpus into a store that can be searched; run again, it goes on or adds what is new"
EXAMPLES = """\
  grit-jax index runs/mine beir/scifact stores/scifact
  grit-jax index runs/mine news-1.jsonl.gz news-2.jsonl.zst stores/news --dtype int8 --max-length 512
  grit-jax index runs/mine news-3.jsonl stores/news
  grit-jax index runs/mine faq.jsonl stores/faq --caches bfloat16 --max-length 512
"""
TAKES_OVERRIDES = True  # --distributed.key=value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `index`."""
    parser.add_argument("model", metavar="MODEL", help="run folder, checkpoint or Hugging Face folder")
    parser.add_argument(
        "corpus", metavar="CORPUS", nargs="+",
        help='.jsonl, .jsonl.gz or .jsonl.zst with {"_id": ..., "title": ..., "text": ...} a line, or folders of them',
    )  # fmt: skip
    parser.add_argument("store", metavar="STORE", help="folder on a disk, shared by all processes")
    parser.add_argument("--dtype", choices=DTYPES, help="type of the vectors (default: float32)")
    parser.add_argument("--instruction", help="what the model is told about the documents; not pooled (default: none)")
    parser.add_argument(
        "--max-length", type=int, metavar="N", help="tokens kept of a document (default: the model's limit)"
    )
    parser.add_argument(
        "--caches", choices=DTYPES,
        help="keep the keys and values of documents too, in this type, for grit-jax answer (default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--cache-form", choices=CACHE_FORMS,
        help="whether a document is read first, or second, after a cached query (default: first)",
    )  # fmt: skip
    parser.add_argument(
        "--shard-rows", type=int, default=4096, metavar="N",
        help="documents of a shard, which is what a killed command does again (%(default)s)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Makes a store, goes on with it or adds to it."""
    refuse_not_positive(args, "max_length", "shard_rows")
    refuse_unknown(args.overrides, "index", known="--distributed.")
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
        parts, settings = manifest.parts, manifest.settings
        size = sum(path.stat().st_size for path in store.iterdir()) / 1e6
        cached = sum(path.stat().st_size for path in store.glob("caches-*")) / 1e6
        kept = (
            f"{cached:,.1f} MB of these keys and values in {settings.caches}, {cached / manifest.num_rows:,.3f} MB each"
        )
        print(
            f"{store}: {manifest.num_rows:,} documents in {len(manifest.shards):,} shards, {settings.embed_dim} x "
            f"{settings.dtype}, {size:,.1f} MB{f', {kept}' if settings.caches else ''}; left out "
            f"{sum(part.repeated for part in parts):,} with the text of "
            f"another and {sum(part.empty for part in parts):,} without text; "
            f"{sum(shard.truncated for shard in manifest.shards):,} cut to {settings.max_length:,} tokens\n"
            f"embedded now: {manifest.num_embedded - begun.num_embedded:,} documents, {tokens:,} tokens in "
            f"{seconds:.1f} s ({tokens / seconds:,.0f} tokens/s)"
        )
    return 0
