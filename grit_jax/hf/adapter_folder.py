"""Adapters in PEFT's layout, `adapter_config.json` and `adapter_model.safetensors`, whose base has a folder of its own.

The rows of a family's table give the tensors of adapters too: A and B of a matrix are stored as matrices are.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from etils import epath
from jax.typing import DTypeLike

from grit_jax import files
from grit_jax.config import ALL_LINEAR, LoRAConfig, TransformerConfig, jsonfile
from grit_jax.config.ranges import BELOW_ONE, POSITIVE
from grit_jax.errors import InputError
from grit_jax.families import FAMILIES
from grit_jax.families.family import Tensor
from grit_jax.hf import model_folder, tensors
from grit_jax.model.adapter import on_base
from grit_jax.model.lora import adapted_modules
from grit_jax.model.pretrained import AdapterMetadata, Pretrained
from grit_jax.model.transformer import Params, abstract_params

CONFIG_FILE, WEIGHTS = "adapter_config.json", "adapter_model"
BASE_FILE = "grit_base.json"  # what PEFT's layout has no place for: the base's fingerprint

_PREFIX = "base_model.model."  # of PEFT's wrapper
# Keys of PEFT that change what a model computes, and that must be off here.
_UNSUPPORTED = (
    "fan_in_fan_out", "modules_to_save", "layers_to_transform", "rank_pattern", "alpha_pattern", "exclude_modules",
    "trainable_token_indices", "target_parameters", "use_dora", "use_qalora", "use_bdlora", "lora_bias",
    "alora_invocation_tokens", "layer_replication", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether `path` holds adapters in PEFT's layout."""
    return files.exists(epath.Path(path) / CONFIG_FILE)


def adapter_tensors(architecture: TransformerConfig, lora: LoRAConfig) -> list[Tensor]:
    """Every parameter of adapters, as stored."""
    adapted = set(adapted_modules(architecture, lora).values())
    rows = []
    for row in FAMILIES[architecture.family].tensors:
        if row.path[0] == "layers" and row.path[-1] == "kernel" and row.path[1:-1] in adapted:
            stem, path = _PREFIX + row.name.removesuffix("weight"), (*row.path[:-1], "lora")
            rows.append(Tensor(f"{stem}lora_A.weight", (*path, "a"), row.in_dims))
            rows.append(Tensor(f"{stem}lora_B.weight", (*path, "b"), 1))
    return rows


def save_folder(out: str | Path, pretrained: Pretrained, params: Params, *, dtype: tensors.Dtype) -> None:
    """Writes adapters as PEFT does.

    Args:
      out: New folder.
      pretrained: The model.
      params: Its parameters, of which only its own are written.
      dtype: Dtype of the stored weights.

    Raises:
      InputError: `out` exists, the model has no adapters, or more than adapters and a projection head was trained.
    """
    out, adapter = Path(out), pretrained.adapter
    if adapter is None:
        raise InputError(f"{out}: --adapter needs a run with adapters, and this one has none; leave --adapter out")
    rows = adapter_tensors(pretrained.architecture, adapter.lora)
    stored = {".".join(row.path) for row in (*rows, *tensors.PROJECTION)}
    if others := sorted(pretrained.own - stored):
        raise InputError(
            f"{out}: {', '.join(others)} was trained too, for which PEFT's layout has no place; leave --adapter out to "
            "export the merged model"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not empty; choose another folder")
    partial, lora = out.with_name(out.name + ".partial"), adapter.lora
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base,
        "r": lora.r,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": list(adapted_modules(pretrained.architecture, lora)),
        "use_rslora": lora.use_rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    model_folder.write_json(partial / CONFIG_FILE, config)
    model_folder.write_json(partial / BASE_FILE, {"fingerprint": adapter.fingerprint})
    model_folder.write_json(partial / model_folder.GRIT_CONFIG_FILE, dataclasses.asdict(pretrained.embedding))

    def write(stem: str, rows: Any) -> None:
        values = tensors.stored_values(rows, params, dtype)
        tensors.write_tensors(partial, stem, values, max_shard_bytes=sys.maxsize)

    write(WEIGHTS, rows)
    if tensors.PROJECTION[0].path[0] in {path.split(".")[0] for path in pretrained.own}:
        write("projection", tensors.PROJECTION)
    partial.rename(out)


def open_folder(path: str | os.PathLike[str], open_base: Callable[[str], Pretrained]) -> Pretrained:
    """The model of adapters in PEFT's layout and of their base.

    Args:
      path: The folder.
      open_base: Opens the base that the folder names.

    Raises:
      InputError: A file is missing or malformed, a feature of PEFT is not supported, or base and adapters do not match.
    """
    folder = epath.Path(path)
    section = jsonfile.read(folder / CONFIG_FILE)
    section.choice("peft_type", ["LORA"])
    section.choice("bias", ["none"], default="none")
    for key in _UNSUPPORTED:
        if section.values.get(key):
            raise section.error(key, "is not supported; merge these adapters with PEFT, and import the whole model")
    name = section.text("base_model_name_or_path")
    try:
        base = open_base(name).merged()
    except InputError as error:
        raise InputError(f"{folder}: its adapters need their base {name}: {error}") from error
    lora = LoRAConfig(
        r=section.integer("r"),
        alpha=section.number("lora_alpha", POSITIVE),
        dropout=section.number("lora_dropout", BELOW_ONE, default=0.0),
        target_modules=_target_modules(section),
        use_rslora=section.flag("use_rslora", default=False),
    )
    embedding = base.embedding
    if files.exists(folder / model_folder.GRIT_CONFIG_FILE):
        embedding = model_folder.read_embedding(jsonfile.read(folder / model_folder.GRIT_CONFIG_FILE))
    fingerprint = None
    if files.exists(folder / BASE_FILE):
        fingerprint = jsonfile.read(folder / BASE_FILE).text("fingerprint", null=True)
    rows = adapter_tensors(base.architecture, lora)
    has_head = files.exists(folder / tensors.PROJECTION_FILE)
    rows += tensors.PROJECTION if has_head else ()
    own = frozenset(".".join(row.path) for row in rows)
    adapter = AdapterMetadata(name, fingerprint, lora)

    def load(shardings: Any, dtype: DTypeLike = jnp.float32) -> Params:
        stored = tensors.file_tensors(folder, f"{WEIGHTS}.safetensors", *[tensors.PROJECTION_FILE] * has_head)
        tensors.check_tensors(str(folder), stored, rows, abstract_params(adapters.model), described_by=CONFIG_FILE)
        return tensors.load_params(str(folder), rows, stored, abstract_params(adapters.model), shardings, dtype)

    adapters = Pretrained(base.architecture, embedding, base.tokenizer, load, adapter, own)
    return on_base(folder, adapters, base)


def _target_modules(section: jsonfile.Section) -> str | list[str]:
    if section.values.get("target_modules") == ALL_LINEAR:
        return ALL_LINEAR
    return sorted(name.rpartition(".")[2] for name in section.texts("target_modules"))
