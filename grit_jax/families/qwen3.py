"""Qwen3: Llama with normalised queries and keys, and windows in some layers."""

from __future__ import annotations

from grit_jax.families.family import Family, Tensor
from grit_jax.families.llama import BASE, LAYER, MLP, MLP_NORM

HEAD_NORMS = (
    Tensor(LAYER + "self_attn.q_norm.weight", ("layers", "attention", "query_norm", "scale")),
    Tensor(LAYER + "self_attn.k_norm.weight", ("layers", "attention", "key_norm", "scale")),
)

FAMILY = Family(
    "Qwen3ForCausalLM",
    tensors=BASE + HEAD_NORMS + MLP_NORM + MLP,
    fixed={"qk_norm": True, "window_bidirectional": True},
    defaults={"sliding_window": 4096, "head_dim": 128, "num_kv_heads": 32},
    constants={"attention_bias": False},
    windows="optional",
)
