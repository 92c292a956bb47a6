"""Prints the config that the hosts of a pod read: a config file and its overrides in one file, with the run folder set.

python launch/config.py CONFIG RUN_FOLDER [--section.key=value ...]

A wrong key, or a path that only this machine has, ends here, before anything is rented (exit code 2).
"""

import sys
from pathlib import Path

from grit_jax.config import Config, InputError, dump_config, load_config


def refuse_local_paths(config: Config) -> None:
    """Raises InputError for a path that is relative: hosts would look for it in their own home."""
    train, validation = (
        [paths] if isinstance(paths, str) else paths for paths in (config.data.train, config.data.validation)
    )
    named = [("data.train", path) for path in train] + [("data.validation", path) for path in validation]
    # An id on the Hugging Face Hub looks like a relative path; it is one only where there is such a file.
    models = {"model.init": config.model.init, "model.tokenizer": config.model.tokenizer}
    named += [(key, path) for key, path in models.items() if path and Path(path).exists()]
    for key, path in named:
        if "://" not in path and not Path(path).is_absolute():
            raise InputError(
                f"{key}: {path} is on this machine, where no host can read it; copy it to the bucket "
                f"(gcloud storage cp --recursive {path} gs://...) and name it: -- --{key}=gs://..."
            )


def main(arguments: list[str]) -> int:
    """Prints the config; 2 for bad input."""
    path, output, *overrides = arguments
    try:
        config = load_config(path, [*overrides, f"--train.output={output}"])
        refuse_local_paths(config)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(dump_config(config), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
