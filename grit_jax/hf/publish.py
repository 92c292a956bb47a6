"""Uploads the files of an export to the Hugging Face Hub, and no others in its folder."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from etils import epath

from grit_jax.errors import InputError
from grit_jax.hf import hub, tensors

# The files that export-hf writes, and those of tokenizers and licences.
_MODULE = "[0-9]*_*"  # a folder of sentence-transformers, such as 1_Pooling
_PARTS = (
    "README.md", "LICENSE*", "NOTICE*",
    "config.json", "generation_config.json", "grit_config.json", "modeling_grit.py",
    "model*.safetensors", "projection*.safetensors", "*.safetensors.index.json",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
    "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json",
    f"{_MODULE}/config.json", f"{_MODULE}/model*.safetensors",
)  # fmt: skip


def push(
    folder: str | os.PathLike[str],
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str = "Upload a GRIT model",
    tell: Callable[[str], Any] = print,
) -> str:
    """Uploads an exported folder and returns its address; after an interruption it sends only what is missing.

    Args:
      folder: A folder that `export-hf` wrote.
      repository: `org/name`; created if missing.
      private: Whether to make a new repository private.
      revision: Branch, created if missing; None for the main one.
      message: Commit message.
      tell: Called with a line about files left out.

    Raises:
      InputError: `folder` is not a whole export, or the Hub refuses.
      UnreachableError: The Hub does not answer.
    """
    import huggingface_hub

    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name one that grit-jax export-hf wrote")
    parts, left_out = _sorted_out(folder)
    _check_whole(folder, parts, left_out)
    if left_out:
        tell(f"left out: {', '.join(left_out)}")
    api = huggingface_hub.HfApi()
    with hub.asking(repository, "model", repository, revision, token="write to it"):
        api.create_repo(repository, private=private, exist_ok=True)
        if revision:
            api.create_branch(repository, branch=revision, exist_ok=True)
        api.upload_folder(
            folder_path=folder, repo_id=repository, revision=revision, commit_message=message,
            allow_patterns=[glob.escape(part) for part in parts],
        )  # fmt: skip
    return f"{api.endpoint}/{repository}" + (f"/tree/{revision}" if revision else "")


def _sorted_out(folder: Path) -> tuple[list[str], list[str]]:
    """Paths in a folder that belong to an export, and the others, with a reason if it is not their name."""
    parts, left_out = [], []
    root = folder.resolve()
    for entry in _entries(folder):
        name = entry.relative_to(folder).as_posix()
        target = entry.resolve()
        inside = target.is_relative_to(root) and _is_part(target.relative_to(root).as_posix())
        if _is_part(name) and inside and target.is_file():
            parts.append(name)
        elif entry.is_dir():
            left_out.append(f"{name}/")
        elif _is_part(name):
            left_out.append(f"{name} (a link to {target})" if entry.is_symlink() else f"{name} (not a file)")
        else:
            left_out.append(name)
    return parts, left_out


def _entries(folder: Path) -> Iterator[Path]:
    """Files and folders, with the content of modules' folders in their place; links to folders are not followed."""
    for entry in sorted(folder.iterdir()):
        if fnmatchcase(entry.name, _MODULE) and entry.is_dir() and not entry.is_symlink():
            yield from sorted(entry.iterdir())
        else:
            yield entry


def _is_part(name: str) -> bool:
    return any(name.count("/") == part.count("/") and fnmatchcase(name, part) for part in _PARTS)


def _check_whole(folder: Path, parts: list[str], left_out: list[str]) -> None:
    """Raises InputError unless the parts are a whole model."""
    wanted = {"config.json", "README.md"}
    if tensors.WEIGHTS_FILE not in parts and tensors.INDEX_FILE in parts:
        wanted |= tensors.indexed_files(epath.Path(folder / tensors.INDEX_FILE))
    else:
        wanted.add(tensors.WEIGHTS_FILE)
    if missing := sorted(wanted - set(parts)):
        links = [name for name in left_out if name.partition(" (")[0] in missing]
        replace = f"put files in place of {', '.join(links)}"
        remedy = replace if links else "export the model with grit-jax export-hf first"
        raise InputError(f"{folder}: no {' and no '.join(missing)}; {remedy}")
