"""The command `grit-jax search`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from grit_jax.cli.command import (
    MODEL_OF_STORE,
    QUERY_INSTRUCTION,
    STORE,
    argument,
    command,
    flag,
    number,
    refuse_empty,
    repeated,
    shortened,
)
from grit_jax.cli.encode import read_texts
from grit_jax.errors import InputError


@command(
    "find the documents of a store that answer queries",
    MODEL_OF_STORE,
    STORE,
    repeated("--query", "TEXT", "text to search for"),
    argument("--queries", metavar="FILE", help='.jsonl with {"text": ...} per line, or .txt with one per line'),
    QUERY_INSTRUCTION,
    number("--k", "N", "documents per query", 10),
    flag("--json", "print one object per query, with whole texts"),
    examples="""\
  grit-jax search runs/mine stores/news --query "who won the election?" --instruction "Find the answer"
  grit-jax search runs/mine stores/scifact --queries questions.txt --k 100 --json > found.jsonl
""",
)
def run(args: argparse.Namespace) -> int:
    """Prints the best documents of each query."""
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
            ids = ", ".join([hit.document.id, *hit.duplicates])
            print(f"{rank:4}  {hit.score:.4f}  {ids}  {shortened(hit.document.embedded)}")
    return 0
