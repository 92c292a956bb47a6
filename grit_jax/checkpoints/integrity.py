"""Checksums of checkpoints. Orbax has no settings for them, so two of its functions are extended here.

Arrays are stored with a CRC-32C of each chunk, besides those of OCDBT's nodes and zarr's indexes; TensorStore checks
whatever it reads. Digests of the other, small files are written last, to `DIGESTS`. Checkpoints without them open too.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import posixpath
import re
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from orbax.checkpoint._src.path import atomicity
from orbax.checkpoint._src.serialization import tensorstore_utils

from grit_jax import files

DIGESTS = "digests.json"
_CHECKED = re.compile(r"d|ocdbt\.process_\d+")  # folders of arrays, which TensorStore checks
_METADATA = "custom metadata"  # key of the digest of a checkpoint's metadata
_CHANGING = "_CHECKPOINT_METADATA"  # Orbax rewrites it from its own threads, even after digests are made

_array_metadata, _commit = tensorstore_utils._build_zarr3_metadata, atomicity.on_commit_callback
_before_commit: dict[str, tuple[Any, Callable[[], None]]] = {}  # by the final folder of a checkpoint


def _checked_array_metadata(*arguments: Any, **options: Any) -> dict[str, Any]:
    metadata: Any = _array_metadata(*arguments, **options)
    metadata["codecs"][0]["configuration"]["codecs"].append({"name": "crc32c"})
    return metadata


async def _checked_commit(checkpoint: Any, **options: Any) -> None:
    if found := _before_commit.get(str(checkpoint.get_final())):
        metadata, confirm = found
        await asyncio.to_thread(_write_digests, checkpoint.get(), metadata)
        await asyncio.to_thread(confirm)
    await _commit(checkpoint, **options)


tensorstore_utils._build_zarr3_metadata = _checked_array_metadata  # ty: ignore[invalid-assignment]
atomicity.on_commit_callback = _checked_commit  # ty: ignore[invalid-assignment]


@contextlib.contextmanager
def committing(checkpoint: files.PathLike, metadata: Any, confirm: Callable[[], None]) -> Generator[None]:
    """Around saving a checkpoint: process 0 writes its digests and calls `confirm` before the commit.

    `metadata` is the checkpoint's, as JSON values.
    """
    _before_commit[str(checkpoint)] = metadata, confirm
    try:
        yield
    finally:
        _before_commit.pop(str(checkpoint), None)


def _write_digests(checkpoint: files.PathLike, metadata: Any) -> None:
    digests = _digests(checkpoint, list(_described(checkpoint))) | {_METADATA: _digest_of(metadata)}
    files.write_text(files.join(checkpoint, DIGESTS), json.dumps(digests, indent=1) + "\n")


def _digest_of(metadata: Any) -> str:
    return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()


def check_digests(checkpoint: files.PathLike) -> str | None:
    """Compares the files of a checkpoint without arrays with their digests, if there are any.

    Returns:
      The digest for `check_metadata`, if there is one.

    Raises:
      ValueError: A file is missing or differs.
    """
    expected = json.loads(files.read_text(files.join(checkpoint, DIGESTS)) or "{}")
    metadata = expected.pop(_METADATA, None)
    found = _digests(checkpoint, list(expected))
    if differing := [name for name in expected if found[name] != expected[name]]:
        raise ValueError(f"{', '.join(differing[:3])} differs from the digest in {DIGESTS}, or is missing")
    return metadata


def check_metadata(metadata: Any, digest: str | None) -> None:
    """Compares the metadata of a checkpoint with its digest, if there is one.

    Raises:
      ValueError: It differs.
    """
    if digest not in (None, _digest_of(metadata)):
        raise ValueError(f"its metadata differs from the digest in {DIGESTS}")


def _digests(checkpoint: files.PathLike, names: list[str]) -> dict[str, str | None]:
    def digest(name: str) -> str | None:
        content = files.read_bytes(files.join(checkpoint, name))
        return None if content is None else hashlib.sha256(content).hexdigest()

    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def _described(folder: files.PathLike, below: str = "") -> Iterator[str]:
    """Names of the files of a checkpoint without arrays."""
    for name in files.names(files.join(folder, below) if below else folder):
        path = posixpath.join(below, name)
        if name != _CHANGING and not _CHECKED.fullmatch(name):
            yield from _described(folder, path) if files.is_folder(files.join(folder, path)) else [path]
