"""Models and data sets from the Hugging Face Hub, laid where training reads them, on a disk or in a bucket.

What is fetched is known by a file beside it: `fetch.begun.json` while work is left, `fetch.json` when all is there.
Both hold repository, commit, licence and the sha256 of every file.
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
    """A data set that is published in GRIT's own layout.

    Attributes:
      repository: Its name on the Hub.
      revision: The commit that is taken unless another is asked for; a branch where no commit is known.
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
    report: Callable[[str], Any] = print,
) -> None:
    """Downloads a model and imports it as a checkpoint; again, it goes on, or does nothing where all is done.

    The checkpoint has the type of the stored weights where that is bfloat16, and float32 otherwise: nothing is lost.

    Args:
      repository: `org/name`.
      output: New checkpoint folder.
      revision: Branch, tag or commit; None for the main branch.
      downloads: Folder on a disk for what is downloaded.
      keep: Whether that stays when all is done.
      report: Gets lines for people.

    Raises:
      InputError: The Hub refuses, the model is not supported, or `output` holds something else or is being written.
      UnreachableError: The Hub, the disk or the bucket failed in a way that may pass.
    """
    work = _begin("model", repository, output, revision, downloads, report)
    if work is None:
        return
    with writer_lock(output) as lock:
        for file in _model_files(work):
            work.get(file, report)
        pretrained, params = load_for_conversion(work.folder, dtype=_exact_dtype(work.folder))
        metadata = CheckpointMetadata(pretrained.architecture, pretrained.embedding, pretrained.tokenizer.files())
        lock.confirm()
        save_params(output, params, metadata)
        lock.confirm()
        work.finish(keep)
    report(f"{output}: a checkpoint of {repository}; name it as model.init")


def fetch_data(
    name: str,
    output: str,
    *,
    revision: str | None = None,
    downloads: Path,
    keep: bool = False,
    report: Callable[[str], Any] = print,
) -> None:
    """Copies the data files of a published set; again, it goes on, or does nothing where all is done.

    Args:
      name: One of `DATA_SETS`.
      output: New folder.
      revision: Branch, tag or commit; None for the set's own.
      downloads: Folder on a disk for what is downloaded.
      keep: Whether that stays when all is done; otherwise a file goes when it has been copied.
      report: Gets lines for people.

    Raises:
      InputError: There is no such set, the Hub refuses, a file is not GRIT data, or `output` holds something else or is
        being written.
      UnreachableError: The Hub, the disk or the bucket failed in a way that may pass.
    """
    if name == "e5s":
        raise InputError("e5s was never released; take medi2, which the configs train on, or medi2bge (docs/fetch.md)")
    if name not in DATA_SETS:
        raise InputError(f"{name}: not a set that is known; known are {', '.join(DATA_SETS)}")
    known = DATA_SETS[name]
    work = _begin("dataset", known.repository, output, revision or known.revision, downloads, report)
    if work is None:
        return
    wanted = [file for file in work.repository.files if file.name.endswith(sources.SUFFIXES)]
    if not wanted:
        raise InputError(f"{known.repository}: holds no file that ends in {', '.join(sources.SUFFIXES)}")
    with writer_lock(output) as lock:
        for file in wanted:
            if "stream" in work.manifest["files"].get(file.name, {}):
                continue  # copied by an earlier call
            path = work.get(file, report)
            source = sources.open_source(path, skip_bad=True)
            lock.confirm()
            files.copy(path, files.join(output, file.name))
            work.record(file.name, records=len(source), stream=source.kind.kind)
            if not keep:
                path.unlink()
        lock.confirm()
        work.finish(keep)
    entries = work.manifest["files"].values()
    counts: Counter[str] = Counter()
    for entry in entries:
        counts[entry["stream"]] += entry["records"]
    counted = " and ".join(f"{count:,} {stream} records" for stream, count in counts.items())
    report(f"{output}: {counted} in {len(entries)} file{'s' * (len(entries) > 1)}; name it in data.train")


class _Work:
    """A fetch that has begun: what the Hub has, where it is downloaded to, and what is done."""

    def __init__(self, repository: hub.Repository, output: str, downloads: Path, manifest: dict[str, Any]):
        self.repository, self.manifest, self._output = repository, manifest, output
        place = f"{repository.repo_type}s--{repository.name.replace('/', '--')}"
        self.folder = downloads / place / repository.commit

    def get(self, file: hub.RemoteFile, report: Callable[[str], Any]) -> Path:
        """A file on this disk, checked."""
        path, sha256 = hub.download(self.repository, file, self.folder)
        self.manifest["files"][file.name] = {"bytes": file.size, "sha256": sha256}
        report(f"  {file.name}: {_readable(file.size)}, has the Hub's checksum")
        return path

    def record(self, name: str, **more: Any) -> None:
        """Keeps that a file is done, and what is known of it."""
        self.manifest["files"][name] |= more
        _write(files.join(self._output, BEGUN), self.manifest)

    def finish(self, keep: bool) -> None:
        """Says that all is there."""
        _write(files.join(self._output, DONE), self.manifest)
        files.remove(files.join(self._output, BEGUN))
        if not keep:
            shutil.rmtree(self.folder, ignore_errors=True)


def _begin(
    kind: hub.RepoType, name: str, output: str, revision: str | None, downloads: Path, report: Callable[[str], Any]
) -> _Work | None:
    """Begins a fetch or goes on with one; None where all is done."""
    done = _read(files.join(output, DONE))
    manifest = done or _read(files.join(output, BEGUN))
    if manifest:
        if manifest["repository"] != name or revision not in (None, manifest["revision"], manifest["commit"]):
            raise InputError(
                f"{output}: holds {manifest['repository']} at {manifest['revision'] or manifest['commit']}; choose "
                "another folder"
            )
        if done:
            report(f"{output}: {name} is there already, at {manifest['commit']}")
            return None
    elif files.names(output):
        raise InputError(f"{output} exists and is not empty; choose another folder")
    # What has begun goes on with its commit: a branch may have moved on.
    repository = hub.look_up(kind, name, manifest["commit"] if manifest else revision)
    licence = repository.licence or "none stated on its card"
    report(f"{name} at {repository.commit}\nlicence: {licence} ({repository.page})")
    if not manifest:
        manifest = {
            "repository": name, "revision": revision, "commit": repository.commit, "licence": repository.licence,
            "files": {},
        }  # fmt: skip
        _write(files.join(output, BEGUN), manifest)
    return _Work(repository, output, downloads, manifest)


def _model_files(work: _Work) -> list[hub.RemoteFile]:
    """Config, tokenizer and weights; of weights that are there in several formats or twice, one."""
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
    """A manifest, None where there is none.

    Raises:
      InputError: It is damaged.
    """
    content = files.read_bytes(path)
    if content is None:
        return None
    try:
        manifest = json.loads(content)
        for key, kind in _MANIFEST.items():
            if not isinstance(manifest[key], kind):
                raise TypeError(f"{key} is {manifest[key]!r:.60}")
        if not all(isinstance(entry, dict) for entry in manifest["files"].values()):
            raise TypeError("files are not all described")
        return manifest
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: is damaged ({type(error).__name__}: {error}); remove all of its folder to fetch anew"
        ) from error


def _write(path: str, manifest: dict[str, Any]) -> None:
    files.write_text(path, json.dumps(manifest, indent=2) + "\n")


def _readable(size: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
