"""Prints the config that the hosts of a pod read: a config file and its overrides in one file, with the run folder set.

python launch/config.py CONFIG BUCKET/runs/NAME [--section.key=value ...]
python launch/config.py --fetched CONFIG [--section.key=value ...]

Paths that begin with models/ or data/ are meant in the bucket, where launch/prepare.sh has put what they name; the
second form prints them. A wrong key, or another path that only this machine has, ends here, before anything is rented
(exit code 2).
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

from grit_jax.config import Config, InputError, dump_config, load_config


def with_paths(config: Config, change: Callable[[str, str], str]) -> Config:
    """The config with `change(key, path)` for every path in it that hosts read."""

    def changed(key: str, paths: str | list[str]) -> str | list[str]:
        return change(key, paths) if isinstance(paths, str) else [change(key, path) for path in paths]

    model = {key: getattr(config.model, key) for key in ("init", "tokenizer")}
    model = {key: path and change(f"model.{key}", path) for key, path in model.items()}
    data = {key: changed(f"data.{key}", getattr(config.data, key)) for key in ("train", "validation")}
    return dataclasses.replace(
        config, data=dataclasses.replace(config.data, **data), model=dataclasses.replace(config.model, **model)
    )


def is_fetched(path: str) -> bool:
    """Whether launch/prepare.sh brings what `path` names."""
    return path.startswith(("models/", "data/"))


def fetched(config: Config) -> list[str]:
    """What launch/prepare.sh brings for a config, each once."""
    found: dict[str, None] = {}

    def look(key: str, path: str) -> str:
        if is_fetched(path):
            found[path] = None
        return path

    with_paths(config, look)
    return list(found)


def for_hosts(config: Config, bucket: str) -> Config:
    """The config with paths that hosts can read; raises InputError for one that only this machine has."""

    def reachable(key: str, path: str) -> str:
        if is_fetched(path):
            return f"{bucket}/{path}"
        # An id on the Hugging Face Hub looks like a relative path; it is one only where there is such a file.
        named_here = key.startswith("data.") or Path(path).exists()
        if named_here and "://" not in path and not Path(path).is_absolute():
            raise InputError(
                f"{key}: {path} is on this machine, where no host can read it; copy it to the bucket "
                f"(gcloud storage cp --recursive {path} gs://...) and name it: -- --{key}=gs://..."
            )
        return path

    return with_paths(config, reachable)


def main(arguments: list[str]) -> int:
    """Prints the config or what is fetched for it; 2 for bad input."""
    try:
        if arguments[0] == "--fetched":
            print("\n".join(fetched(load_config(arguments[1], arguments[2:]))))
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
