"""Hugging Face names of tensors, one table per family."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

from grit_jax.config import EmbeddingConfig, TransformerConfig


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One row of a family's table: a parameter and the stored tensors that it is made of.

    Attributes:
      name: Name in the safetensors file; `{layer}` and `{expert}` stand for the indices of the parameter's first dims.
      path: Path of the parameter.
      in_dims: Input dims of a matrix product, before the output dims: torch stores [out, in], flattened, where the
        parameter is [in..., out...]. None for a tensor that is stored as it is.
    """

    name: str
    path: tuple[str, ...]
    in_dims: int | None = None

    def places(self, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The name of each stored tensor and its index in a parameter of `shape`."""
        keys = [key for key in ("layer", "expert") if f"{{{key}}}" in self.name]
        for index in itertools.product(*map(range, shape[: len(keys)])):
            yield self.name.format(**dict(zip(keys, index, strict=True))), index

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of each stored tensor of a parameter of `shape`."""
        shape = shape[self.name.count("{") :]
        if self.in_dims is None:
            return shape
        fan_out = math.prod(shape[self.in_dims :])
        return (fan_out, math.prod(shape[: self.in_dims])) if self.in_dims else (fan_out,)

    def to_stored(self, value: Any) -> Any:
        """One stored tensor from its part of the parameter; numpy or JAX."""
        if self.in_dims is None:
            return value
        return value.reshape(math.prod(value.shape[: self.in_dims]), -1).T if self.in_dims else value.reshape(-1)

    def from_stored(self, stored: Any, shape: tuple[int, ...]) -> Any:
        """The inverse of `to_stored`, for a parameter of `shape`."""
        return (stored.T if self.in_dims else stored).reshape(shape[self.name.count("{") :])


HEAD = "lm_head.weight"
_LAYER = "model.layers.{layer}."
_BASE = (
    Tensor("model.embed_tokens.weight", ("embedding",)),
    Tensor(_LAYER + "input_layernorm.weight", ("layers", "attention_norm", "scale")),
    Tensor(_LAYER + "self_attn.q_proj.weight", ("layers", "attention", "query", "kernel"), 1),
    Tensor(_LAYER + "self_attn.k_proj.weight", ("layers", "attention", "key", "kernel"), 1),
    Tensor(_LAYER + "self_attn.v_proj.weight", ("layers", "attention", "value", "kernel"), 1),
    Tensor(_LAYER + "self_attn.o_proj.weight", ("layers", "attention", "out", "kernel"), 2),
    Tensor("model.norm.weight", ("final_norm", "scale")),
    Tensor(HEAD, ("head",)),
)
_MLP = (
    Tensor(_LAYER + "mlp.gate_proj.weight", ("layers", "mlp", "gate", "kernel"), 1),
    Tensor(_LAYER + "mlp.up_proj.weight", ("layers", "mlp", "up", "kernel"), 1),
    Tensor(_LAYER + "mlp.down_proj.weight", ("layers", "mlp", "down", "kernel"), 1),
)
_EXPERT = _LAYER + "block_sparse_moe.experts.{expert}."
_EXPERTS = (
    Tensor(_LAYER + "block_sparse_moe.gate.weight", ("layers", "mlp", "router", "kernel"), 1),
    Tensor(_EXPERT + "w1.weight", ("layers", "mlp", "gate"), 1),
    Tensor(_EXPERT + "w3.weight", ("layers", "mlp", "up"), 1),
    Tensor(_EXPERT + "w2.weight", ("layers", "mlp", "down"), 1),
)
_BIASES = (
    Tensor(_LAYER + "self_attn.q_proj.bias", ("layers", "attention", "query", "bias"), 0),
    Tensor(_LAYER + "self_attn.k_proj.bias", ("layers", "attention", "key", "bias"), 0),
    Tensor(_LAYER + "self_attn.v_proj.bias", ("layers", "attention", "value", "bias"), 0),
)
_HEAD_NORMS = (
    Tensor(_LAYER + "self_attn.q_norm.weight", ("layers", "attention", "query_norm", "scale")),
    Tensor(_LAYER + "self_attn.k_norm.weight", ("layers", "attention", "key_norm", "scale")),
)
_MLP_NORM = (Tensor(_LAYER + "post_attention_layernorm.weight", ("layers", "mlp_norm", "scale")),)
_GEMMA_NORMS = (
    Tensor(_LAYER + "post_attention_layernorm.weight", ("layers", "attention_post_norm", "scale")),
    Tensor(_LAYER + "pre_feedforward_layernorm.weight", ("layers", "mlp_norm", "scale")),
    Tensor(_LAYER + "post_feedforward_layernorm.weight", ("layers", "mlp_post_norm", "scale")),
)

TENSORS: Mapping[str, tuple[Tensor, ...]] = {
    "llama": _BASE + _MLP_NORM + _MLP,
    "mistral": _BASE + _MLP_NORM + _MLP,
    "mixtral": _BASE + _MLP_NORM + _EXPERTS,
    "qwen2": _BASE + _BIASES + _MLP_NORM + _MLP,
    "qwen3": _BASE + _HEAD_NORMS + _MLP_NORM + _MLP,
    "gemma2": _BASE + _GEMMA_NORMS + _MLP,
    "gemma3_text": _BASE + _HEAD_NORMS + _GEMMA_NORMS + _MLP,
}

# The output head of a model whose head is its embedding table.
TIED_HEAD = Tensor(HEAD, ("embedding",))

# The linear embedding head is ours alone and lives in a file of its own.
PROJECTION = (
    Tensor("projection.weight", ("projection", "kernel"), 1),
    Tensor("projection.bias", ("projection", "bias"), 0),
)

# Buffers that older folders carry and that follow from the config.
IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)


def table(architecture: TransformerConfig, embedding: EmbeddingConfig) -> list[Tensor]:
    """The rows of every parameter of a model."""
    rows = [row for row in TENSORS[architecture.family] if row.path != ("head",) or not architecture.tie_embeddings]
    return rows + (list(PROJECTION) if embedding.projection_dim else [])


def get(tree: Any, path: tuple[str, ...]) -> Any:
    """The entry of a nested dict at a row's path."""
    for key in path:
        tree = tree[key]
    return tree
