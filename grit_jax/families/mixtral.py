"""Mixtral, GritLM-8x7B: Mistral with experts."""

from __future__ import annotations

from grit_jax.families.family import Family, Tensor
from grit_jax.families.llama import BASE, LAYER, MLP_NORM

_EXPERT = LAYER + "block_sparse_moe.experts.{expert}."
_EXPERTS = (
    Tensor(LAYER + "block_sparse_moe.gate.weight", ("layers", "mlp", "router", "kernel"), 1),
    Tensor(_EXPERT + "w1.weight", ("layers", "mlp", "gate"), 1),
    Tensor(_EXPERT + "w3.weight", ("layers", "mlp", "up"), 1),
    Tensor(_EXPERT + "w2.weight", ("layers", "mlp", "down"), 1),
)

FAMILY = Family(
    "MixtralForCausalLM",
    tensors=BASE + MLP_NORM + _EXPERTS,
    keys={"num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"},
    defaults={"num_experts": 8, "rope_theta": 1e6, "num_kv_heads": 8},
    aliases={"num_experts": "num_experts"},  # transformers reads it as num_local_experts
    windows="all",
    remote_code=True,
    vllm_is_causal=False,
)
