"""Fetches models and data sets from the Hugging Face Hub to a disk or a bucket, where training reads them.

A manifest beside them, `fetch.begun.json` and at the end `fetch.json`, holds repository, commit, licence and the sha256
of every file.
"""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from etils import epath

from grit_jax import files
from grit_jax.checkpoints.checkpoint import CheckpointMetadata, save_params
from grit_jax.checkpoints.opening import load_for_conversion
from grit_jax.data import sources
from grit_jax.errors import InputError
from grit_jax.hf import hub, tensors
from grit_jax.runs.lock import writer_lock

DONE, BEGUN = "fetch.json", "fetch.begun.json"
_MANIFEST = {"repository": str, "revision": str | None, "commit": str, "licence": str | None, "files": dict}


class DataSet(NamedTuple):
    """A data set published in GRIT's own format.

    Attributes:
      repository: Its name on the Hub.
      revision: The default commit; a branch if no commit is known.
    """

    repository: str
    revision: str


DATA_SETS = {
    "medi": DataSet("GritLM/MEDI", "2cc8d9af4ae3e394e72278d8cdc10199044204f4"),
    "medi2": DataSet("GritLM/MEDI2", "b0c9ed0beebe7f619cd14c03c1bcadce974cd7df"),
    "medi2bge": DataSet("GritLM/MEDI2BGE", "main"),
    "tulu2": DataSet("GritLM/tulu2", "05160312f2468891b76b8503d92a15b274511d87"),
}


def fetch_model(
    repository: str,
    output: str,
    *,
    revision: str | None = None,
    downloads: Path,
    keep: bool = False,
    tell: Callable[[str], Any] = print,
) -> None:
    """Downloads a model and imports it as a checkpoint; a repeated call continues, or does nothing if all is done.

    The checkpoint is lossless: bfloat16 if the stored weights are, else float32.

    Args:
      repository: `org/name`.
      output: New checkpoint folder.
      revision: Branch, tag or commit; None for the main branch.
      downloads: Folder on a disk for downloads.
      keep: Whether to keep downloads at the end.
      tell: Called with progress messages.

    Raises:
      InputError: The Hub refuses, the model is not supported, or `output` holds something else or is being written.
      UnreachableError: The Hub, the disk or the bucket failed in a way that may be temporary.
    """
    work = _begin("model", repository, output, revision, downloads, tell)
    if work is None:
        return
    with writer_lock(output) as lock:
        for file in _model_files(work):
            work.get(file, tell)
        pretrained, params = load_for_conversion(work.folder, dtype=_exact_dtype(work.folder))
        metadata = CheckpointMetadata(pretrained.architecture, pretrained.embedding, pretrained.tokenizer.files())
        lock.confirm()
        save_params(output, params, metadata)
        lock.confirm()
        work.finish(keep)
    tell(f"{output}: a checkpoint of {repository}; name it as model.init")


def fetch_data(
    name: str,
    output: str,
    *,
    revision: str | None = None,
    downloads: Path,
    keep: bool = False,
    tell: Callable[[str], Any] = print,
) -> None:
    """Copies the data files of a published set; a repeated call continues, or does nothing if all is done.

    Args:
      name: One of `DATA_SETS`.
      output: New folder.
      revision: Branch, tag or commit; None for the set's default.
      downloads: Folder on a disk for downloads.
      keep: Whether to keep downloads at the end; otherwise each is removed once copied.
      tell: Called with progress messages.

    Raises:
      InputError: There is no such set, the Hub refuses, a file is not GRIT data, or `output` holds something else or is
        being written.
      UnreachableError: The Hub, the disk or the bucket failed in a way that may be temporary.
    """
    if name == "e5s":
        raise InputError("e5s was never released; take medi2, which the configs train on, or medi2bge (docs/fetch.md)")
    if name not in DATA_SETS:
        raise InputError(f"{name}: not a known data set; known are {', '.join(DATA_SETS)}")
    known = DATA_SETS[name]
    work = _begin("dataset", known.repository, output, revision or known.revision, downloads, tell)
    if work is None:
        return
    wanted = [file for file in work.repository.files if file.name.endswith(sources.SUFFIXES)]
    if not wanted:
        raise InputError(f"{known.repository}: holds no file that ends in {', '.join(sources.SUFFIXES)}")
    with writer_lock(output) as lock:
        for file in wanted:
            if "stream" in work.manifest["files"].get(file.name, {}):
                continue  # copied by an earlier call
            path = work.get(file, tell)
            source = sources.open_source(path, skip_bad=True)
            lock.confirm()
            files.copy(path, files.join(output, file.name))
            work.record(file.name, records=len(source), stream=source.record_type.name)
            if not keep:
                path.unlink()
        lock.confirm()
        work.finish(keep)
    entries = work.manifest["files"].values()
    counts: Counter[str] = Counter()
    for entry in entries:
        counts[entry["stream"]] += entry["records"]
    counted = " and ".join(f"{count:,} {stream} records" for stream, count in counts.items())
    tell(f"{output}: {counted} in {len(entries)} file{'s' * (len(entries) > 1)}; name it in data.train")


class _Work:
    """A fetch in progress: the repository, the folder of its downloads, and the manifest."""

    def __init__(self, repository: hub.Repository, output: str, downloads: Path, manifest: dict[str, Any]):
        self.repository, self.manifest, self._output = repository, manifest, output
        self.folder = downloads / f"{repository.repo_type}s--{repository.name.replace('/', '--')}" / repository.commit

    def get(self, file: hub.RemoteFile, tell: Callable[[str], Any]) -> Path:
        """Downloads a file and checks it."""
        path, sha256 = hub.download(self.repository, file, self.folder)
        self.manifest["files"][file.name] = {"bytes": file.size, "sha256": sha256}
        tell(f"  {file.name}: {_readable(file.size)}, has the Hub's checksum")
        return path

    def record(self, name: str, **more: Any) -> None:
        """Notes in the manifest that a file is done, with facts about it."""
        self.manifest["files"][name] |= more
        _write(files.join(self._output, BEGUN), self.manifest)

    def finish(self, keep: bool) -> None:
        """Writes the final manifest."""
        _write(files.join(self._output, DONE), self.manifest)
        files.remove(files.join(self._output, BEGUN))
        if not keep:
            shutil.rmtree(self.folder, ignore_errors=True)


def _begin(
    repo_type: hub.RepoType, name: str, output: str, revision: str | None, downloads: Path, tell: Callable[[str], Any]
) -> _Work | None:
    """Begins or continues a fetch; None if all is done."""
    done = _read(files.join(output, DONE))
    manifest = done or _read(files.join(output, BEGUN))
    if manifest:
        if manifest["repository"] != name or revision not in (None, manifest["revision"], manifest["commit"]):
            raise InputError(
                f"{output}: holds {manifest['repository']} at {manifest['revision'] or manifest['commit']}; choose "
                "another folder"
            )
        if done:
            tell(f"{output}: {name} is already there, at {manifest['commit']}")
            return None
    elif files.names(output):
        raise InputError(f"{output} exists and is not empty; choose another folder")
    # A fetch continues with its commit: the branch may have moved.
    repository = hub.look_up(repo_type, name, manifest["commit"] if manifest else revision)
    licence = repository.licence or "none stated on its card"
    tell(f"{name} at {repository.commit}\nlicence: {licence} ({repository.page})")
    if not manifest:
        manifest = {
            "repository": name, "revision": revision, "commit": repository.commit, "licence": repository.licence,
            "files": {},
        }  # fmt: skip
        _write(files.join(output, BEGUN), manifest)
    return _Work(repository, output, downloads, manifest)


def _model_files(work: _Work) -> list[hub.RemoteFile]:
    """Config, tokenizer, and one copy of the weights."""
    there = {
        file.name: file
        for file in work.repository.files
        if "/" not in file.name and any(fnmatch.fnmatch(file.name, pattern) for pattern in hub.MODEL_PATTERNS)
    }
    weights = {name for name in there if name.endswith(".safetensors")}
    used = {tensors.WEIGHTS_FILE}
    if tensors.WEIGHTS_FILE not in weights and tensors.INDEX_FILE in there:
        index, _ = hub.download(work.repository, there[tensors.INDEX_FILE], work.folder)
        used = tensors.indexed_files(epath.Path(index))
    if not used & weights:
        raise InputError(
            f"{work.repository.name}: has no safetensors; pickled weights are never opened. Choose a revision that has "
            "them"
        )
    unused = weights - used - {tensors.PROJECTION_FILE}
    return [file for name, file in there.items() if name not in unused]


def _exact_dtype(folder: Path) -> Any:
    stored = {tensor.dtype for tensor in tensors.stored_tensors(epath.Path(folder)).values()}
    return jnp.bfloat16 if stored == {np.dtype(ml_dtypes.bfloat16)} else jnp.float32


def _read(path: str) -> dict[str, Any] | None:
    """A manifest; None if there is none.

    Raises:
      InputError: It is damaged.
    """
    content = files.read_bytes(path)
    if content is None:
        return None
    try:
        manifest = json.loads(content)
        for key, value_type in _MANIFEST.items():
            if not isinstance(manifest[key], value_type):
                raise TypeError(f"{key} is {manifest[key]!r:.60}")
        if not all(isinstance(entry, dict) for entry in manifest["files"].values()):
            raise TypeError("files are not all described")
        return manifest
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: is damaged ({type(error).__name__}: {error}); remove all of its folder to fetch again"
        ) from error


def _write(path: str, manifest: dict[str, Any]) -> None:
    files.write_text(path, json.dumps(manifest, indent=2) + "\n")


def _readable(size: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
