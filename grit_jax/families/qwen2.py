"""Qwen2 and Qwen2.5: Llama with query, key and value biases, and windows in some layers."""

from __future__ import annotations

from grit_jax.families.family import Family, Tensor
from grit_jax.families.llama import BASE, LAYER, MLP, MLP_NORM

_BIASES = (
    Tensor(LAYER + "self_attn.q_proj.bias", ("layers", "attention", "query", "bias"), 0),
    Tensor(LAYER + "self_attn.k_proj.bias", ("layers", "attention", "key", "bias"), 0),
    Tensor(LAYER + "self_attn.v_proj.bias", ("layers", "attention", "value", "bias"), 0),
)

FAMILY = Family(
    "Qwen2ForCausalLM",
    tensors=BASE + _BIASES + MLP_NORM + MLP,
    fixed={"qkv_bias": True, "window_bidirectional": True},
    defaults={"sliding_window": 4096, "num_kv_heads": 32},
    windows="optional",
    remote_code=True,
)
