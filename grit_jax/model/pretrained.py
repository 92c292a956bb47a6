"""A model that can be loaded, wherever it is stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike

from grit_jax.config import EmbeddingConfig, LoRAConfig, TransformerConfig
from grit_jax.model.lora import NO_ADAPTERS, merged
from grit_jax.model.transformer import Params, Transformer, abstract_model, abstract_params
from grit_jax.parallel import sharding
from grit_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class AdapterMetadata:
    """Adapters and their base.

    Attributes:
      base: Where the base is, as in `model.init`.
      fingerprint: Identifies its weights (`base_fingerprint`); None if that is not known, as of PEFT's adapters.
      lora: Settings of the adapters.
    """

    base: str
    fingerprint: str | None
    lora: LoRAConfig


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """The content of a model folder.

    Attributes:
      architecture: Resolved shape of the transformer.
      embedding: How it makes vectors.
      tokenizer: Its tokenizer.
      load: `load(shardings, dtype)` reads parameters in that dtype (float32 by default), each placed by the sharding at
        the same path; those without one are not read. Both are nested as in `abstract_params`.
      adapter: The base of its adapters, which `load` reads too; None for a model without adapters.
      own: With adapters, dotted paths of the parameters that are not the base's.
    """

    architecture: TransformerConfig
    embedding: EmbeddingConfig
    tokenizer: Tokenizer
    load: Callable[..., Params]
    adapter: AdapterMetadata | None = None
    own: frozenset[str] = frozenset()

    @property
    def lora(self) -> LoRAConfig:
        """Its adapters."""
        return self.adapter.lora if self.adapter else NO_ADAPTERS

    @property
    def model(self) -> Transformer:
        """The abstract model."""
        return abstract_model(self.architecture, self.embedding.projection_dim, self.lora)

    def merged(self) -> Pretrained:
        """The model with its adapters merged into their matrices."""
        if self.adapter is None:
            return self

        def load(shardings: Any, dtype: DTypeLike = jnp.float32) -> Params:
            whole = sharding.replicated(jax.tree.leaves(shardings)[0].mesh)
            everywhere = dict.fromkeys(flatten_dict(abstract_params(self.model)), whole)
            asked = flatten_dict(shardings)
            params = self.load(unflatten_dict(everywhere | asked), dtype)
            without = flatten_dict(merged(params, self.architecture, self.lora))
            return unflatten_dict({path: without[path] for path in asked})

        return dataclasses.replace(self, load=load, adapter=None, own=frozenset())
