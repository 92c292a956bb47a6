"""The command `grit-jax answer`."""

from __future__ import annotations

import argparse
import json

from grit_jax.cli.command import (
    MODEL_OF_STORE,
    QUERY_INSTRUCTION,
    STOP,
    argument,
    command,
    flag,
    number,
    refuse_empty,
    shortened,
)
from grit_jax.text.prompts import POSITIONS, RAG_METHODS


@command(
    "answer queries from a store, with or without its documents' keys and values",
    MODEL_OF_STORE,
    argument("store", metavar="STORE", help="folder from grit-jax index, with --caches for the default method"),
    argument("--query", action="append", required=True, metavar="TEXT", help="question; may be repeated"),
    argument(
        "--method", choices=RAG_METHODS, default="document_cache",
        help="how the model reads query and documents (%(default)s)",
    ),
    QUERY_INSTRUCTION,
    number("--k", "N", "documents to use", 1),
    argument(
        "--positions", choices=POSITIONS, default="own",
        help="positions of a cached text after another: its own, or shifted behind the other (%(default)s)",
    ),
    number("--max-new-tokens", "N", "most tokens", 64),
    STOP,
    flag("--json", "print one object per query, with whole documents"),
    examples="""\
  grit-jax answer runs/mine stores/faq --query "how do I reset my password?"
  grit-jax answer runs/mine stores/news --query "who won the election?" --method document_first --k 3 --json
""",
)  # fmt: skip
def run(args: argparse.Namespace) -> int:
    """Prints the answer of each query and the documents behind it."""
    refuse_empty(args.query)

    from grit_jax.inference.model import GritModel
    from grit_jax.retrieval.rag import Rag
    from grit_jax.retrieval.retriever import as_json
    from grit_jax.retrieval.store import Store

    store = Store(args.store)
    rag = Rag(GritModel.load(args.model), store, name=args.model)
    for query in args.query:
        prepared = rag.prepare(
            query, method=args.method, instruction=args.instruction, k=args.k, positions=args.positions
        )
        answered = rag.answer(prepared, max_new_tokens=args.max_new_tokens, stop=args.stop)
        text, cached, read = answered.text.strip(), answered.num_cached, answered.num_read
        if args.json:
            found = {"query": query, "answer": text, "documents": as_json(answered.hits)}
            print(json.dumps(found | {"cached_tokens": cached, "read_tokens": read}, ensure_ascii=False))
            continue
        print(f"{query}\n  {text}")
        for hit in answered.hits:
            print(f"  from {hit.document.id} ({hit.score:.4f})  {shortened(hit.document.embedded)}")
        print(f"  {cached:,} tokens cached, {read:,} read")
    return 0
