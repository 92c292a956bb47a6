"""Hugging Face names of each family: tensors and config.json.

A family is one table of tensors and one mapping of its config. Adding one means adding both, and an option in
`model/` only where its mathematics is new.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from grit_jax.config import InputError, TransformerConfig

# How a stored tensor relates to the parameter: as it is, or torch's [out, in] against our [in, out].
Transform = Literal["same", "transpose"]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One row of a family's table.

    Attributes:
      name: Name in the safetensors file; `{layer}` stands for the layer's number.
      path: Path of the parameter.
      transform: Relation of the two arrays, once heads are flattened.
    """

    name: str
    path: tuple[str, ...]
    transform: Transform = "same"

    @property
    def stacked(self) -> bool:
        """Whether there is one tensor per layer."""
        return "{layer}" in self.name


_LAYER = "model.layers.{layer}."
_DECODER = (
    Tensor("model.embed_tokens.weight", ("embedding",)),
    Tensor(_LAYER + "input_layernorm.weight", ("layers", "attention_norm", "scale")),
    Tensor(_LAYER + "self_attn.q_proj.weight", ("layers", "attention", "query", "kernel"), "transpose"),
    Tensor(_LAYER + "self_attn.k_proj.weight", ("layers", "attention", "key", "kernel"), "transpose"),
    Tensor(_LAYER + "self_attn.v_proj.weight", ("layers", "attention", "value", "kernel"), "transpose"),
    Tensor(_LAYER + "self_attn.o_proj.weight", ("layers", "attention", "out", "kernel"), "transpose"),
    Tensor(_LAYER + "post_attention_layernorm.weight", ("layers", "mlp_norm", "scale")),
    Tensor(_LAYER + "mlp.gate_proj.weight", ("layers", "mlp", "gate", "kernel"), "transpose"),
    Tensor(_LAYER + "mlp.up_proj.weight", ("layers", "mlp", "up", "kernel"), "transpose"),
    Tensor(_LAYER + "mlp.down_proj.weight", ("layers", "mlp", "down", "kernel"), "transpose"),
    Tensor("model.norm.weight", ("final_norm", "scale")),
    Tensor("lm_head.weight", ("head",)),
)

TENSORS: Mapping[str, tuple[Tensor, ...]] = {"llama": _DECODER, "mistral": _DECODER}

# The linear embedding head is ours alone and lives in a file of its own.
PROJECTION = (
    Tensor("projection.weight", ("projection", "kernel"), "transpose"),
    Tensor("projection.bias", ("projection", "bias")),
)

# Buffers that older folders carry and that follow from the config.
IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)

_FIELDS = {
    "vocab_size": "vocab_size",
    "embed_dim": "hidden_size",
    "mlp_dim": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "max_length": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
}

# Keys that change the mathematics, with the only values that these families may have here.
_REQUIRED = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "quantization_config": (None,),
    "pretraining_tp": (1, None),
}


def read_config(config: Mapping[str, Any], *, source: str) -> TransformerConfig:
    """The architecture that a config.json describes.

    Raises:
      InputError: It names a family or a feature that is not supported, or lacks a key.
    """
    family = config.get("model_type")
    if family not in TENSORS:
        raise InputError(f"{source}: model_type={family!r} is not supported; supported are {', '.join(TENSORS)}")
    for key, allowed in _REQUIRED.items():
        if config.get(key, allowed[0]) not in allowed:
            raise InputError(f"{source}: {key}={config[key]!r} is not supported for {family}; only {allowed[0]!r} is")
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if (kind := rope.get("rope_type", rope.get("type", "default"))) != "default":
        raise InputError(f"{source}: rope scaling of type {kind!r} is not supported")
    missing = [key for key in _FIELDS.values() if key not in config]
    if missing:
        raise InputError(f"{source}: {', '.join(missing)} missing; the file does not describe a {family} model")
    num_heads = config["num_attention_heads"]
    window = config.get("sliding_window") if family == "mistral" else None
    return TransformerConfig(
        **{ours: config[theirs] for ours, theirs in _FIELDS.items()},
        num_kv_heads=config.get("num_key_value_heads") or num_heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // num_heads,
        rope_theta=float(config.get("rope_theta") or rope.get("rope_theta") or 10000.0),
        sliding_window=window,
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
    )


def write_config(
    architecture: TransformerConfig, *, dtype: str, bos_id: int | None, eos_id: int | None
) -> dict[str, Any]:
    """The config.json of an architecture: a Mistral if it has a sliding window, else a Llama.

    `is_causal` states transformers' default; a key that is present can be overridden to load the bidirectional pass.
    """
    family = "mistral" if architecture.sliding_window else "llama"
    config: dict[str, Any] = {
        "architectures": ["MistralForCausalLM" if family == "mistral" else "LlamaForCausalLM"],
        "model_type": family,
        **{theirs: getattr(architecture, ours) for ours, theirs in _FIELDS.items()},
        "num_key_value_heads": architecture.num_kv_heads,
        "head_dim": architecture.head_dim,
        "rope_theta": architecture.rope_theta,
        "tie_word_embeddings": architecture.tie_embeddings,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "is_causal": True,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if family == "mistral":
        return config | {"sliding_window": architecture.sliding_window}
    return config | {"attention_bias": False, "mlp_bias": False}
