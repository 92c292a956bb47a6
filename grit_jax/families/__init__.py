"""Model families, one file each: a module named after its `model_type` with a `FAMILY`."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

from grit_jax.families.family import Family

NAMES = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma2", "gemma3_text")

FAMILIES: Mapping[str, Family] = {name: import_module(f"{__name__}.{name}").FAMILY for name in NAMES}
