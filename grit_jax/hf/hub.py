"""The Hugging Face Hub: ids such as `org/name@revision`, and publishing a folder."""

from __future__ import annotations

import os
import re
from pathlib import Path

from etils import epath

from grit_jax.config import InputError

# What a model is made of. Pickled weights and modelling code are never downloaded.
_PATTERNS = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


def is_hub_id(name: str | os.PathLike[str]) -> bool:
    """Whether `name` reads as `org/name` or `org/name@revision` and nothing of that name is on this machine."""
    return bool(_ID.fullmatch(str(name))) and not epath.Path(name).exists()


def snapshot(name: str) -> Path:
    """The local copy of a model on the Hub, downloaded where it is not in huggingface_hub's cache.

    Args:
      name: `org/name`, the newest version, or `org/name@revision` with a branch, tag or commit.

    Raises:
      InputError: There is no such model, its licence has not been accepted, it has no safetensors, or the Hub cannot
        be reached and the cache does not have it.
    """
    import huggingface_hub
    from huggingface_hub import errors

    repository, _, revision = name.partition("@")
    try:
        folder = Path(
            huggingface_hub.snapshot_download(repository, revision=revision or None, allow_patterns=_PATTERNS)
        )
    except errors.GatedRepoError as error:
        raise InputError(
            f"{name}: its authors ask for a licence to be accepted; accept it on the model's page, then set HF_TOKEN "
            "to a token of that account"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{name}: the Hub has {repository} but no revision {revision!r} of it") from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{name}: not a folder here and not a model on the Hub; correct the name, or set HF_TOKEN if it is private"
        ) from error
    except Exception as error:  # the errors of its HTTP library are not huggingface_hub's own
        raise InputError(
            f"{name}: not a folder here, not in the cache, and the Hub cannot be reached ({type(error).__name__}); "
            "check the name and the network"
        ) from error
    if not any(folder.glob("*.safetensors")):
        raise InputError(
            f"{name}: has no safetensors; pickled weights are never opened. Choose a revision that has them"
        )
    return folder


def push(
    folder: str | os.PathLike[str],
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str = "Upload a GRIT model",
) -> str:
    """Uploads an exported folder, model card included, and returns its address.

    Args:
      folder: What `export-hf` wrote.
      repository: `org/name`; made where it is not there.
      private: Whether a new repository is private.
      revision: Branch, made where it is not there; None for the main one.
      message: Of the commit.

    Raises:
      InputError: `folder` is not an export, or the Hub refuses.
    """
    import huggingface_hub
    from huggingface_hub import errors

    folder = Path(folder)
    if missing := [name for name in ("config.json", "README.md") if not (folder / name).is_file()]:
        raise InputError(f"{folder}: no {' and no '.join(missing)}; export the model with grit-jax export-hf first")
    hub = huggingface_hub.HfApi()
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        if revision:
            hub.create_branch(repository, branch=revision, exist_ok=True)
        hub.upload_folder(folder_path=folder, repo_id=repository, revision=revision, commit_message=message)
    except (errors.HfHubHTTPError, errors.HFValidationError, errors.LocalTokenNotFoundError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{repository}: the Hub refuses ({reason}); set HF_TOKEN to a token that may write") from error
    return f"{hub.endpoint}/{repository}" + (f"/tree/{revision}" if revision else "")
