"""The command `grit-jax answer`."""

from __future__ import annotations

import argparse
import json

from grit_jax.cli.arguments import refuse_empty, refuse_not_positive, shortened
from grit_jax.text.prompts import POSITIONS, RAG_METHODS

HELP = "answer queries from a store, with or without its documents' keys and values"
EXAMPLES = """\
  grit-jax answer runs/mine stores/faq --query "how do I reset my password?"
  grit-jax answer runs/mine stores/news --query "who won the election?" --method document_first --k 3 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `answer`."""
    parser.add_argument("model", metavar="MODEL", help="the model that made the store")
    parser.add_argument(
        "store", metavar="STORE", help="folder from grit-jax index, with --caches for the default method"
    )
    parser.add_argument("--query", action="append", required=True, metavar="TEXT", help="what is asked; may repeat")
    parser.add_argument(
        "--method", choices=RAG_METHODS, default="document_cache",
        help="how query and documents come to the model (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--instruction", default="", help="what the model is told about the queries; not pooled")
    parser.add_argument("--k", type=int, default=1, metavar="N", help="documents that are used (%(default)s)")
    parser.add_argument(
        "--positions", choices=POSITIONS, default="own",
        help="of a cached text after another: its own, or moved on behind the other (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="most tokens (%(default)s)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may repeat")
    parser.add_argument("--json", action="store_true", help="print an object a query, with whole documents")


def run(args: argparse.Namespace) -> int:
    """Prints the answer of each query and the documents that it was made from."""
    refuse_not_positive(args, "k", "max_new_tokens")
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
        if args.json:
            print(json.dumps({"query": query, "answer": answered.text.strip(), "documents": as_json(answered.hits),
                              "cached_tokens": answered.num_cached, "read_tokens": answered.num_read},
                             ensure_ascii=False))  # fmt: skip
            continue
        print(f"{query}\n  {answered.text.strip()}")
        for hit in answered.hits:
            shown = shortened(hit.document.embedded)
            print(f"  from {hit.document.id} ({hit.score:.4f})  {shown}")
        print(f"  {answered.num_cached:,} tokens cached, {answered.num_read:,} read")
    return 0
