"""How much a quickstart from a pretrained base trains and measures: what its devices do within minutes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from grit_jax import files
from grit_jax.checkpoints.opening import open_model
from grit_jax.config import Config
from grit_jax.errors import InputError
from grit_jax.hf import hub
from grit_jax.parallel import sharding
from grit_jax.parallel.chips import peak_flops
from grit_jax.parallel.memory import device_memory
from grit_jax.train.memory import gib, state_and_gradient_bytes
from grit_jax.train.resolve import resolved
from grit_jax.train.setup import set_up

# Training, and each measurement of the model, may take this long on devices as fast as `assumed_flops`.
_TRAIN_SECONDS, _MEASURE_SECONDS = 600, 120
_ENOUGH_STEPS, _MOST_STEPS, _LEAST_STEPS, _LEAST_MEASURED = 100, 400, 10, 32

# A step at the first of these batches of which enough steps fit, else at the last.
_BATCHES = tuple(
    dict(zip(("embedding_batch", "generative_batch", "group_size", "passage_max_length"), values, strict=True))
    for values in ((256, 64, 2, 128), (128, 32, 2, 128), (64, 16, 2, 128), (32, 8, 2, 128), (16, 4, 1, 64))
)

# Mean tokens of a query with its instruction, of a passage and of a conversation, by a vocabulary of 49,152 pieces.
_QUERY_TOKENS, _PASSAGE_TOKENS, _CONVERSATION_TOKENS = 45, 100, 70

_FLOPS_PER_TRAINED_TOKEN = 8  # times the parameters: forward, backward, and the forward pass that remat repeats
_FLOPS_PER_READ_TOKEN = 2
_FEWEST_PARAMETERS = 10_000_000  # below these, time does not fall with the parameters

_UTILISATION = 0.25  # of an accelerator's peak
_UNKNOWN_PEAK = 8e12  # of an accelerator that is not in the table of chips
_CORE_FLOPS = 60e9  # of a CPU's core; 135 million parameters read 500 tokens/s on two


class Size(NamedTuple):
    """What a quickstart from a base trains and measures.

    Attributes:
      base: Its `resolved_base`.
      device: The devices it is made for, in words.
      settings: Values by config key, such as `train.steps`.
      measured: Most held-out queries, with as many documents, that the base and the trained model are measured on.
    """

    base: str
    device: str
    settings: dict[str, int]
    measured: int

    @property
    def overrides(self) -> list[str]:
        """The settings as options of a config."""
        return [f"--{key}={value}" for key, value in self.settings.items()]

    def line(self, config: Config) -> str:
        """What the run does, in one line.

        Args:
          config: The run's settings, which may override these.
        """
        data, negatives = config.data, config.data.group_size - 1
        return (
            f"sized for {self.device}: {config.train.steps} steps of {data.embedding_batch} queries with {negatives} "
            f"hard negative{'s' * (negatives != 1)} each and {data.generative_batch} conversations, passages of up to "
            f"{data.passage_max_length} tokens (--train.steps, --data.embedding_batch and so on change it)"
        )


def resolved_base(base: str) -> str:
    """The name of a base that does not depend on the working directory: a folder's whole path, or the name as it is."""
    return base if hub.is_hub_id(base) or files.is_bucket(base) else str(Path(base).resolve())


def refuse_other_base(output: Path, base: str | None) -> None:
    """Refuses a folder with the quickstart of another base.

    Args:
      output: Run folder.
      base: Its `resolved_base`; None for a quickstart from scratch.

    Raises:
      InputError: It holds the quickstart of another base.
    """
    saved = saved_size(output)
    if saved is None and not (output / "data/counts.json").exists():
        return
    if (made_of := saved and saved.base) != base:
        asked, there = (f"--base {name}" if name else "no --base" for name in (base, made_of))
        raise InputError(
            f"{output} holds a quickstart made with {there}, and this one has {asked}; "
            "choose another --output, or remove the one there with --fresh"
        )


def size_of_run(output: Path, base: str, config: Config) -> Size:
    """The size of the run in a folder: the one that it began with, or a new one, which is kept there.

    Args:
      output: Run folder.
      base: Its `resolved_base`.
      config: The settings without a size, with the base as `model.init`.

    Raises:
      InputError: There is no such base, its family is not supported, or no device holds the state of its training.
    """
    size = saved_size(output)
    if size is None:
        size = _fitting_size(base, config)
        files.write_text(_file(output), json.dumps(size._asdict(), indent=2) + "\n")
    return size


def saved_size(output: Path) -> Size | None:
    """The size that the quickstart in a folder began with; None if it has no base or has not begun."""
    return Size(**json.loads(_file(output).read_text())) if _file(output).exists() else None


def _file(output: Path) -> Path:
    return output / "data/size.json"


def _fitting_size(base: str, config: Config) -> Size:
    pretrained = open_model(base)
    config = resolved(config, pretrained, pretrained.tokenizer)
    mesh = sharding.make_mesh(config.mesh)
    devices: list[jax.Device] = list(mesh.devices.flat)
    abstract = set_up(config, mesh).abstract
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract.params))
    needed, limit = state_and_gradient_bytes(abstract), device_memory(devices[0], mesh.size)
    if limit is not None and needed >= limit:
        raise InputError(
            f"--base {base}: weights, gradients and optimizer of its {parameters:,} parameters need "
            f"{gib(needed)} of each device's memory in float32, and {described(devices)} has {gib(limit)}; "
            f"choose a base of fewer than {int(parameters * limit / needed):,} parameters, or more or larger devices"
        )
    architecture = config.model.architecture
    layer_input_bytes = 4 * architecture.embed_dim * architecture.num_layers
    free = math.inf if limit is None else limit - needed
    settings, measured = choose_size(parameters, devices, most_tokens=len(devices) * free / 2 / layer_input_bytes)
    return Size(base, described(devices), settings, measured)


def choose_size(parameters: int, devices: Sequence[jax.Device], *, most_tokens: float) -> tuple[dict[str, int], int]:
    """`settings` and `measured` of a `Size`.

    The batch is the largest of which enough steps fit the time, and whose layers' inputs fit the memory.

    Args:
      parameters: Number of the base's parameters.
      devices: The devices of the mesh.
      most_tokens: Tokens of a step whose layers' inputs fit the memory.
    """
    flops = assumed_flops(devices) / max(parameters, _FEWEST_PARAMETERS)
    budget = _TRAIN_SECONDS * flops / _FLOPS_PER_TRAINED_TOKEN
    fits = (
        batch for batch in _BATCHES
        if _step_tokens(batch) <= most_tokens and budget >= _ENOUGH_STEPS * _step_tokens(batch)
    )  # fmt: skip
    batch = next(fits, _BATCHES[-1])
    steps = min(max(int(budget / _step_tokens(batch)), _LEAST_STEPS), _MOST_STEPS)
    # Of an object, a search reads query and document; the losses read its group and two conversations.
    read = _group_tokens(batch) + _QUERY_TOKENS + _passage_tokens(batch) + 2 * _CONVERSATION_TOKENS
    measured = max(int(_MEASURE_SECONDS * flops / _FLOPS_PER_READ_TOKEN / read), _LEAST_MEASURED)
    settings = {"train.steps": steps} | {f"data.{name}": value for name, value in batch.items()}
    return settings, measured


def assumed_flops(devices: Sequence[jax.Device]) -> float:
    """FLOP/s that all devices together are assumed to reach; a CPU's devices share its cores."""
    first = devices[0]
    if first.platform == "cpu":
        return _CORE_FLOPS * (os.cpu_count() or 1)
    return len(devices) * _UTILISATION * (peak_flops(first.device_kind) or _UNKNOWN_PEAK)


def described(devices: Sequence[jax.Device]) -> str:
    """The devices in words, such as `1 x Tesla T4`."""
    first = devices[0]
    if first.platform == "cpu":
        return f"a CPU of {os.cpu_count()} cores"
    return f"{len(devices)} x {first.device_kind}"


def _passage_tokens(batch: dict[str, int]) -> int:
    return min(_PASSAGE_TOKENS, batch["passage_max_length"])


def _group_tokens(batch: dict[str, int]) -> int:
    """Tokens of a query and its passages."""
    return _QUERY_TOKENS + batch["group_size"] * _passage_tokens(batch)


def _step_tokens(batch: dict[str, int]) -> int:
    return batch["embedding_batch"] * _group_tokens(batch) + batch["generative_batch"] * _CONVERSATION_TOKENS
