"""The Hugging Face Hub: ids such as `org/name@revision`, and checked downloads."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Generator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from etils import epath

from grit_jax.errors import InputError
from grit_jax.files import UnreachableError

RepoType = Literal["model", "dataset"]

# The files of a model. Pickled weights and modelling code are never downloaded.
MODEL_PATTERNS = ("*.json", "*.safetensors", "tokenizer.model", "*.jinja")
_BLOCK = 1 << 22  # bytes read at a time
_RETRY = (408, 409, 412, 425, 429)  # status codes that ask for another try
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


def is_hub_id(name: str | os.PathLike[str]) -> bool:
    """Whether `name` reads as `org/name` or `org/name@revision` and is not a path on this machine."""
    return bool(_ID.fullmatch(str(name))) and not epath.Path(name).exists()


def snapshot(name: str) -> Path:
    """The local copy of a model on the Hub, downloaded unless huggingface_hub's cache has it.

    Args:
      name: `org/name`, or `org/name@revision` with a branch, tag or commit.

    Raises:
      InputError: There is no such model, its licence has not been accepted, it has no safetensors, or the Hub cannot
        be reached and the model is not in the cache.
    """
    import huggingface_hub

    repository, _, revision = name.partition("@")
    try:
        with _refusals("model", repository, revision, name, unknown="not a folder here and not a model on the Hub"):
            folder = Path(
                huggingface_hub.snapshot_download(
                    repository, revision=revision or None, allow_patterns=list(MODEL_PATTERNS)
                )
            )
    except InputError:
        raise
    except Exception as error:  # errors of the HTTP library are not huggingface_hub's own
        raise InputError(
            f"{name}: not a folder here, not in the cache, and the Hub cannot be reached ({type(error).__name__}); "
            "check the name and the network"
        ) from error
    if not any(folder.glob("*.safetensors")):
        raise InputError(
            f"{name}: has no safetensors; pickled weights are never opened. Choose a revision that has them"
        )
    return folder


class RemoteFile(NamedTuple):
    """A file of a repository.

    Attributes:
      name: Path in the repository.
      size: Bytes.
      sha256: Digest of its content, for large files.
      git_sha1: Digest of its git blob, for other files.
    """

    name: str
    size: int
    sha256: str | None
    git_sha1: str | None


class Repository(NamedTuple):
    """A repository of the Hub at one commit.

    Attributes:
      repo_type: Model or dataset.
      name: `org/name`.
      commit: All 40 digits.
      licence: The licence that its card states, if any.
      page: Its address.
      files: All files.
    """

    repo_type: RepoType
    name: str
    commit: str
    licence: str | None
    page: str
    files: list[RemoteFile]


def look_up(repo_type: RepoType, name: str, revision: str | None = None) -> Repository:
    """Asks the Hub for a repository's files and their checksums.

    Args:
      repo_type: Model or dataset.
      name: `org/name`.
      revision: Branch, tag or commit; None for the main branch.

    Raises:
      InputError: There is no such repository or revision, or its licence has not been accepted.
      UnreachableError: The Hub does not answer.
    """
    import huggingface_hub

    hub = huggingface_hub.HfApi()
    with asking(name, repo_type, name, revision):
        info: Any = hub.repo_info(name, repo_type=repo_type, revision=revision, files_metadata=True)
    card = info.card_data or {}
    licence = card.get("license_name") or card.get("license")
    found = [
        RemoteFile(file.rfilename, file.size, file.lfs.sha256 if file.lfs else None, None if file.lfs else file.blob_id)
        for file in info.siblings
    ]
    licence = ", ".join(licence) if isinstance(licence, list) else licence
    return Repository(repo_type, name, info.sha, licence, _page(repo_type, name), found)


def download(repository: Repository, file: RemoteFile, folder: Path) -> tuple[Path, str]:
    """Downloads a file of a repository to `folder`, unless it is already there, and returns its path and sha256.

    Raises:
      InputError: The licence has not been accepted.
      UnreachableError: The Hub does not answer, or the file differs from the Hub's checksum and was removed.
    """
    import huggingface_hub

    repo_type, name, commit = repository.repo_type, repository.name, repository.commit
    with asking(f"{name}: {file.name}", repo_type, name, commit):
        path = Path(
            huggingface_hub.hf_hub_download(name, file.name, repo_type=repo_type, revision=commit, local_dir=folder)
        )
    sha256, git_sha1 = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as content:
        while block := content.read(_BLOCK):
            sha256.update(block)
            if file.git_sha1:
                git_sha1.update(block)
    sum_name, found, wanted = "sha256", sha256.hexdigest(), file.sha256
    if file.git_sha1:
        sum_name, found, wanted = "git sha1", git_sha1.hexdigest(), file.git_sha1
    if found != wanted:
        path.unlink()
        raise UnreachableError(
            f"{name}: {file.name} arrived damaged: its {sum_name} is {found}, the Hub says {wanted}; it is removed"
        )
    return path, sha256.hexdigest()


def _page(repo_type: RepoType, name: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{'datasets/' if repo_type == 'dataset' else ''}{name}"


@contextlib.contextmanager
def _refusals(
    repo_type: RepoType, repository: str, revision: str | None, name: str | None = None, *, unknown: str | None = None
) -> Generator[None]:
    """Turns refusals of the Hub into InputErrors.

    Args:
      repo_type: Model or dataset.
      repository: `org/name`.
      revision: Branch, tag or commit.
      name: The name that the user wrote; None for `repository`.
      unknown: Message for a repository that the Hub does not have.
    """
    from huggingface_hub import errors

    name = name or repository
    try:
        yield
    except errors.GatedRepoError as error:
        raise InputError(
            f"{name}: its authors ask for a licence to be accepted; accept it on its page, "
            f"{_page(repo_type, repository)}, then log in with `hf auth login` or set HF_TOKEN to that account's token"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{name}: the Hub has {repository} but no revision {revision!r} of it") from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{name}: {unknown or f'not a {repo_type} on the Hub'}; correct the name, or set HF_TOKEN if it is private"
        ) from error
    except errors.HFValidationError as error:
        raise InputError(f"{name}: not a name that the Hub can have; it is ORG/NAME") from error


@contextlib.contextmanager
def asking(
    what: str, repo_type: RepoType, repository: str, revision: str | None, *, token: str = "read it"
) -> Generator[None]:
    """Turns errors of a request to the Hub into permanent and temporary ones.

    Args:
      what: Subject of the messages.
      repo_type: Model or dataset.
      repository: `org/name`.
      revision: Branch, tag or commit.
      token: What the access token must be allowed to do.

    Raises:
      InputError: The Hub refuses, or HF_HUB_OFFLINE is set.
      UnreachableError: The Hub does not answer, or cannot answer now.
    """
    from huggingface_hub import errors

    try:
        with _refusals(repo_type, repository, revision):
            yield
    except InputError:
        raise
    except errors.OfflineModeIsEnabled as error:
        raise InputError(f"{what}: HF_HUB_OFFLINE is set, so the Hub is not asked; unset it") from error
    except Exception as error:  # errors of the HTTP library are not huggingface_hub's own
        while isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
            error = error.__cause__  # when several files are uploaded
        status, said = None, str(error)
        if isinstance(error, errors.HfHubHTTPError):
            status, said = error.response.status_code, error.server_message or said
        reason = f"{type(error).__name__ if status is None else status}: {' '.join(said.split())[:300]}"
        if status in (401, 403) or isinstance(error, errors.LocalTokenNotFoundError):
            remedy = f"log in with `hf auth login` or set HF_TOKEN to a token that may {token}"
            raise InputError(f"{what}: the Hub refuses ({reason}); {remedy}") from error
        if status is not None and 400 <= status < 500 and status not in _RETRY:
            raise InputError(f"{what}: the Hub refuses ({reason})") from error
        # A name or a token that cannot be sent; a response that is not JSON comes from a proxy.
        if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError):
            raise InputError(f"{what}: the Hub cannot be asked ({reason}); correct the name or HF_TOKEN") from error
        trouble = "cannot be reached" if status is None else "cannot answer now"
        raise UnreachableError(f"{what}: the Hub {trouble} ({reason})") from error
