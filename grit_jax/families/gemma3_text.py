"""Gemma 3, text: Gemma 2 without attention caps, with normalised queries and keys and two rotary bases."""

from __future__ import annotations

from grit_jax.families import gemma2
from grit_jax.families.family import Family
from grit_jax.families.llama import BASE, MLP
from grit_jax.families.qwen3 import HEAD_NORMS

FAMILY = Family(
    "Gemma3ForCausalLM",
    tensors=BASE + HEAD_NORMS + gemma2.NORMS + MLP,
    fixed={**gemma2.FAMILY.fixed, "qk_norm": True},
    keys={
        "attention_scale_dim": "query_pre_attn_scalar",
        "logit_soft_cap": "final_logit_softcapping",
        "local_rope_theta": "rope_local_base_freq",
    },
    defaults={
        "tie_embeddings": True, "sliding_window": 4096, "attention_scale_dim": 256, "head_dim": 256, "num_kv_heads": 4,
        "rope_theta": 1e6, "local_rope_theta": 10000.0,
    },
    constants={"attention_bias": False},
    activation=gemma2.FAMILY.activation,
    windows="layers",
    window_period=("sliding_window_pattern", 6),
)  # fmt: skip
