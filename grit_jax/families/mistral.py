"""Mistral, GritLM-7B: Llama with a sliding window in the causal pass."""

from __future__ import annotations

from grit_jax.families import llama
from grit_jax.families.family import Family

FAMILY = Family(
    "MistralForCausalLM",
    tensors=llama.FAMILY.tensors,
    defaults={"sliding_window": 4096, "num_kv_heads": 8},
    windows="all",
    remote_code=True,
    vllm_gritlm=True,
)
