"""What a config leaves open: the tokenizer, the architecture, and whether the run folder holds this run."""

from __future__ import annotations

import dataclasses

import jax

from grit_jax import files
from grit_jax.checkpoints.checkpoint import CheckpointMetadata
from grit_jax.checkpoints.opening import open_tokenizer
from grit_jax.config import (
    TRAIN_ALL,
    Config,
    TransformerConfig,
    config_differences,
    field_differences,
    flat_values,
    load_config,
    parse_config,
)
from grit_jax.data.schedule import same_data
from grit_jax.errors import InputError
from grit_jax.model.pretrained import Pretrained
from grit_jax.runs import folder
from grit_jax.text.tokenizer import Tokenizer

# Keys that change no update, and those that may differ between a run folder's config and the one that resumes it.
_CHANGES_NO_UPDATE = (
    "train.output", "train.max_skipped", "train.watchdog_seconds", "train.preemption_notices", "train.embedding_chunks",
    "train.generative_chunks", "model.remat", "model.layer_rows", "model.compiler_options", "loss.negatives",
    "mesh.", "logging.", "scorecard.", "checkpoint.", "distributed.",
)  # fmt: skip
MAY_DIFFER = (*_CHANGES_NO_UPDATE, "train.steps")

# Keys that may differ between the hosts of a run: where each finds its files, and which one it is.
_MAY_DIFFER_BY_HOST = (
    "model.init", "model.tokenizer", "data.train", "data.validation", "train.output", "scorecard.suite",
    "scorecard.data", "distributed.coordinator", "distributed.process_id",
)  # fmt: skip

_HEAD = "projection.*"  # pattern of the parameters that a run may have and its `model.init` lack


def host_facts(config: Config, tokenizer: Tokenizer) -> dict[str, str]:
    """What `distributed.require_same` compares of a resolved config, its tokenizer and JAX."""
    values = {key: repr(value) for key, value in flat_values(config).items() if key not in _MAY_DIFFER_BY_HOST}
    return values | {"the tokenizer": tokenizer.fingerprint, "the version of jax": jax.__version__}


def resolve_tokenizer(config: Config, pretrained: Pretrained | None) -> Tokenizer:
    """The tokenizer of `model.init`, which `model.tokenizer` may repeat, or the one named for a model from scratch.

    Raises:
      InputError: There is none, or the two differ.
    """
    if pretrained is None:
        return open_tokenizer(config.model.tokenizer or "bytes")
    if config.model.tokenizer:
        named = open_tokenizer(config.model.tokenizer)
        if named.fingerprint != pretrained.tokenizer.fingerprint:
            raise InputError(
                f"model.tokenizer={config.model.tokenizer!r} is not the tokenizer of model.init={config.model.init!r}; "
                "remove model.tokenizer to use the model's own"
            )
    return pretrained.tokenizer


def resolve_architecture(config: Config, pretrained: Pretrained | None, tokenizer: Tokenizer) -> TransformerConfig:
    """The architecture of `model.init`, which `model.architecture` may repeat, or the one from scratch.

    Raises:
      InputError: The two differ.
    """
    given = config.model.architecture
    if pretrained is None:
        return given.resolve(tokenizer.vocab_size)
    found = pretrained.architecture.resolve(tokenizer.vocab_size)
    if given != TransformerConfig() and (given := given.resolve(tokenizer.vocab_size)) != found:
        differences = "; ".join(field_differences(given, found))
        raise InputError(
            f"model.architecture is not that of model.init={config.model.init!r} ({differences}); "
            "correct it or leave it out"
        )
    return found


def resolved(config: Config, pretrained: Pretrained | None, tokenizer: Tokenizer) -> Config:
    """The config with the architecture of `resolve_architecture`, which raises.

    With adapters, a projection head that `model.init` lacks is among the trained parameters.
    """
    architecture, train = resolve_architecture(config, pretrained, tokenizer), config.train
    has_head = config.model.embedding.projection_dim is not None
    if config.lora.r is not None and has_head and pretrained and pretrained.embedding.projection_dim is None:
        others = [pattern for pattern in train.trainable if pattern not in (*TRAIN_ALL, _HEAD)]
        train = dataclasses.replace(train, trainable=[*others, _HEAD])
    return dataclasses.replace(config, model=dataclasses.replace(config.model, architecture=architecture), train=train)


def embedding_changes(config: Config, pretrained: Pretrained) -> list[str]:
    """Lines that say where `model.embedding`, which is trained, differs from that of `model.init`.

    Raises:
      InputError: Both have a projection head, of different widths.
    """
    there, here, init = pretrained.embedding, config.model.embedding, config.model.init
    lines = [
        f"model.embedding.{name}={getattr(here, name)} (model.init={init} has {getattr(there, name)})"
        for name in ("attention", "pooling", "normalized")
        if getattr(here, name) != getattr(there, name)
    ]
    width, found = here.projection_dim, there.projection_dim
    if width == found:
        return lines
    key = f"model.embedding.projection_dim={'null' if width is None else width}"
    if width and found:
        raise InputError(
            f"{key} is not the width of the projection head of model.init={init}, {found}; set it to {found} to go on "
            "with that head, or to null to leave it out"
        )
    if found:
        return [*lines, f"{key} leaves out the projection head of model.init={init}, of width {found}"]
    return [*lines, f"{key} adds a projection head, initialised from train.seed (model.init={init} has none)"]


def check_folder(config: Config) -> None:
    """Checks that `train.output` is new or holds the run of the resolved `config`.

    If the run there ended before its first checkpoint, any config may start.

    Raises:
      InputError: It holds another run; the message lists the differences.
    """
    output = config.train.output
    saved = files.join(output, folder.CONFIG)
    if folder.last_checkpoint(output) is None or not files.exists(saved):
        return
    changed = _differences(load_config(saved), config, ignore=MAY_DIFFER)
    if changed:
        raise InputError(
            f"{output} holds a run with another config ({'; '.join(changed)}); "
            "put these values back to resume it, or choose another train.output"
        )


def check_data(output: files.PathLike, recorded: str, fingerprint: str) -> None:
    """Checks that a checkpoint of the run folder `output` was trained on the data that are there now.

    Args:
      output: `train.output`.
      recorded: Fingerprint in the checkpoint.
      fingerprint: Fingerprint of the data.

    Raises:
      InputError: It was trained on other data.
    """
    if not same_data(recorded, fingerprint):
        raise InputError(
            f"{output}: data.train is not what this run was trained on (its files changed, or another version "
            "of grit_jax puts them in another order); put them back, or start again in another train.output"
        )


def same_run(saved: CheckpointMetadata, about: CheckpointMetadata) -> bool:
    """Whether two checkpoints of a step hold the same parameters, by their metadata."""
    if saved.config is None or about.config is None:
        return False
    old, new = parse_config(saved.config), parse_config(about.config)
    same_config = not _differences(old, new, ignore=_CHANGES_NO_UPDATE)
    return same_config and same_data(saved.data["fingerprint"], about.data["fingerprint"])


def _differences(old: Config, new: Config, *, ignore: tuple[str, ...]) -> list[str]:
    """`config_differences`, in which `auto` is what it means without adapters: earlier configs say `float32`."""

    def written_out(config: Config) -> Config:
        if config.lora.r is not None or config.train.frozen_dtype != "auto":
            return config
        return dataclasses.replace(config, train=dataclasses.replace(config.train, frozen_dtype="float32"))

    return config_differences(written_out(old), written_out(new), ignore=ignore)
