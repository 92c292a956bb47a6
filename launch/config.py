"""Prints the config that the hosts of a pod read: a config file and its overrides in one file, with the run folder set.

python launch/config.py CONFIG BUCKET/runs/NAME [--section.key=value ...]
python launch/config.py --fetched CONFIG [--section.key=value ...]

Paths that begin with models/ or data/ are meant in the bucket, where launch/prepare.sh has put what they name; the
second form prints them, each ended by a NUL. A wrong key, no data, or another path that only this machine has, ends
here, before anything is rented (exit code 2). Nothing is asked but the disk of this machine, and nothing changes.
"""

import dataclasses
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from grit_jax.config import Config, dump_config, load_config
from grit_jax.errors import InputError

# Where a config names files and folders. Hosts read a suite and its data from their disks alone.
_PATHS = {"model": ("init", "tokenizer"), "data": ("train", "validation"), "scorecard": ("suite", "data")}


def with_paths(config: Config, change: Callable[[str, str], str]) -> Config:
    """The config with `change(key, path)` for every path in it that hosts read."""

    def changed(key: str, paths: str | list[str]) -> str | list[str]:
        return change(key, paths) if isinstance(paths, str) else [change(key, path) for path in paths]

    sections = {}
    for section, keys in _PATHS.items():
        values = {key: getattr(getattr(config, section), key) for key in keys}
        values = {key: value and changed(f"{section}.{key}", value) for key, value in values.items()}
        sections[section] = dataclasses.replace(getattr(config, section), **values)
    return dataclasses.replace(config, **sections)


def fetched_folder(key: str, path: str) -> str | None:
    """What launch/prepare.sh brings, models/ORG/NAME or data/SET, where `path` is that or lies in it; else None."""
    depth = {"models": 3, "data": 2}.get(path.partition("/")[0])
    return None if depth is None or key.startswith("scorecard.") else "/".join(path.rstrip("/").split("/")[:depth])


def fetched(config: Config) -> list[str]:
    """What launch/prepare.sh brings for a config, each once."""
    found: dict[str, None] = {}

    def look(key: str, path: str) -> str:
        if folder := fetched_folder(key, path):
            found[folder] = None
        return path

    with_paths(config, look)
    return list(found)


def for_hosts(config: Config, bucket: str) -> Config:
    """The config with paths that hosts can read.

    Raises:
      InputError: Only this machine has a path, or there are no data.
    """

    def reachable(key: str, path: str) -> str:
        if fetched_folder(key, path):
            return f"{bucket}/{path.rstrip('/')}"
        if "://" in path or (key, path) == ("model.tokenizer", "bytes"):
            return path
        # An id on the Hugging Face Hub looks like a relative path, and a disk that hosts alone have like one of here:
        # both are taken for what they are as long as this machine has nothing of that name.
        here = Path(path).exists() or not (key.startswith("model.") or Path(path).is_absolute())
        if here and key.startswith("scorecard."):
            raise InputError(
                f"{key}: {path} is on this machine, where no host can read it, and scorecards are not read from a "
                "bucket; put it on the hosts' disks and name its absolute path, or leave scorecard.suite out"
            )
        if here:
            raise InputError(
                f"{key}: {path} is on this machine, where no host can read it; copy it to the bucket "
                f"(gcloud storage cp --recursive {shlex.quote(path)} gs://...) and name it: -- --{key}=gs://..."
            )
        return path

    if not config.data.train:
        raise InputError("data.train is missing; name what the run trains on: -- --data.train=gs://...")
    return with_paths(config, reachable)


def main(arguments: list[str]) -> int:
    """Prints the config or what is fetched for it; 2 for bad input."""
    try:
        if arguments[0] == "--fetched":
            print("".join(f"{path}\0" for path in fetched(load_config(arguments[1], arguments[2:]))), end="")
        else:
            path, output, *overrides = arguments
            config = load_config(path, [*overrides, f"--train.output={output}"])
            print(dump_config(for_hosts(config, output.rpartition("/runs/")[0])), end="")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
