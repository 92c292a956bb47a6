"""A store as a FAISS index, for corpora that have outgrown exact search."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grit_jax import files
from grit_jax.errors import InputError, install
from grit_jax.retrieval.quantization import unpack
from grit_jax.retrieval.store import Store

_ROWS_AT_ONCE = 65536


def export_faiss(store: Store, path: Path) -> Path:
    """Writes an `IndexFlatIP` of a store's values and, beside it, each row's id, a JSON string per line.

    FAISS holds all vectors in memory, in float32.

    Args:
      store: The store.
      path: File of the index.

    Returns:
      The file of the ids.

    Raises:
      InputError: FAISS is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise InputError(f"FAISS is not installed; {install('faiss')}") from error
    rows, dim = store.vectors.shape
    index: Any = faiss.IndexFlatIP(dim)
    for first in range(0, rows, _ROWS_AT_ONCE):
        some = slice(first, first + _ROWS_AT_ONCE)
        index.add(unpack(store.vectors[some], None if store.scales is None else store.scales[some]))
    with files.replacing(path) as file:
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))  # ty: ignore[missing-attribute]
    ids = path.with_name(f"{path.name}.ids.jsonl")
    with files.replacing(ids, "w") as file:
        for document in store.documents():
            file.write(json.dumps(document.id, ensure_ascii=False) + "\n")
    return ids
