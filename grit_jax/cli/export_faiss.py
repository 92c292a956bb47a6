"""The command `grit-jax export-faiss`."""

from __future__ import annotations

import argparse
from pathlib import Path

from grit_jax.cli.command import STORE, Command, argument
from grit_jax.errors import InputError


def _run(args: argparse.Namespace) -> int:
    if not args.output.endswith(".faiss"):
        raise InputError(f"{args.output}: must end in .faiss")

    from grit_jax.retrieval.faiss_export import export_faiss
    from grit_jax.retrieval.layout import Store

    store = Store(args.store)
    ids = export_faiss(store, Path(args.output))
    print(f"{args.output}: {len(store):,} vectors of {store.settings.embed_dim} numbers; {ids}: their ids")
    return 0


COMMAND = Command(
    "write a store as an index of FAISS",
    _run,
    (STORE, argument("output", metavar="OUT.faiss", help="an IndexFlatIP; the ids go to OUT.faiss.ids.jsonl")),
    examples="  grit-jax export-faiss stores/news news.faiss\n",
)
