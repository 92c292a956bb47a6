"""The command `grit-jax export-faiss`."""

from __future__ import annotations

import argparse
from pathlib import Path

from grit_jax.cli.command import STORE, argument, command
from grit_jax.errors import InputError


@command(
    "write a store as a FAISS index",
    STORE,
    argument("output", metavar="OUT.faiss", help="an IndexFlatIP; the ids go to OUT.faiss.ids.jsonl"),
    examples="  grit-jax export-faiss stores/news news.faiss\n",
)
def run(args: argparse.Namespace) -> int:
    """Exports a store."""
    if not args.output.endswith(".faiss"):
        raise InputError(f"{args.output}: must end in .faiss")

    from grit_jax.retrieval.faiss_export import export_faiss
    from grit_jax.retrieval.store import Store

    store = Store(args.store)
    ids = export_faiss(store, Path(args.output))
    print(f"{args.output}: {len(store):,} vectors of {store.settings.embed_dim} numbers; {ids}: their ids")
    return 0
