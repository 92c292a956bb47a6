"""A model that can be loaded, wherever it is stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from grit_jax.config import EmbeddingConfig, TransformerConfig
from grit_jax.model.transformer import Params
from grit_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """The content of a model folder.

    Attributes:
      architecture: Resolved shape of the transformer.
      embedding: How it makes vectors.
      tokenizer: Its tokenizer.
      load: `load(shardings, dtype)` reads parameters in that dtype (float32 by default), each placed by the sharding at
        the same path; those without one are not read. Both are nested as in `abstract_params`.
    """

    architecture: TransformerConfig
    embedding: EmbeddingConfig
    tokenizer: Tokenizer
    load: Callable[..., Params]
