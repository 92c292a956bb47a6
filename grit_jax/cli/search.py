"""The command `grit-jax search`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from grit_jax.cli.arguments import refuse_empty, refuse_not_positive, shortened
from grit_jax.cli.encode import read_texts
from grit_jax.errors import InputError

HELP = "find the documents of a store that answer queries"
EXAMPLES = """\
  grit-jax search runs/mine stores/news --query "who won the election?" --instruction "Find the answer"
  grit-jax search runs/mine stores/scifact --queries questions.txt --k 100 --json > found.jsonl
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `search`."""
    parser.add_argument("model", metavar="MODEL", help="the model that made the store")
    parser.add_argument("store", metavar="STORE", help="folder from grit-jax index")
    parser.add_argument("--query", action="append", default=[], metavar="TEXT", help="what is asked; may repeat")
    parser.add_argument("--queries", metavar="FILE", help='.jsonl with {"text": ...} a line, or .txt with one a line')
    parser.add_argument("--instruction", default="", help="what the model is told about the queries; not pooled")
    parser.add_argument("--k", type=int, default=10, metavar="N", help="documents of each query (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print an object a query, with whole texts")


def run(args: argparse.Namespace) -> int:
    """Prints the best documents of each query."""
    refuse_not_positive(args, "k")
    queries = args.query + (read_texts(Path(args.queries), option="--queries") if args.queries else [])
    if not queries:
        raise InputError("there is nothing to search for; give --query or --queries")
    refuse_empty(queries)

    from grit_jax.inference.model import GritModel
    from grit_jax.retrieval.retriever import Retriever, as_json
    from grit_jax.retrieval.store import Store

    store = Store(args.store)
    retriever = Retriever(GritModel.load(args.model), store, name=args.model)
    for query, hits in zip(queries, retriever.find(queries, instruction=args.instruction, k=args.k), strict=True):
        if args.json:
            print(json.dumps({"query": query, "documents": as_json(hits)}, ensure_ascii=False))
            continue
        print(query)
        for rank, hit in enumerate(hits, start=1):
            shown = shortened(hit.document.embedded)
            print(f"{rank:4}  {hit.score:.4f}  {', '.join([hit.document.id, *hit.duplicates])}  {shown}")
    return 0
