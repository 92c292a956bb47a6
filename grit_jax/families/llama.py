"""Llama 2 and 3, and every model of their layout. The other families' tables reuse its rows."""

from __future__ import annotations

from grit_jax.families.family import Family, Tensor

HEAD = "lm_head.weight"
LAYER = "model.layers.{layer}."

BASE = (
    Tensor("model.embed_tokens.weight", ("embedding",)),
    Tensor(LAYER + "input_layernorm.weight", ("layers", "attention_norm", "scale")),
    Tensor(LAYER + "self_attn.q_proj.weight", ("layers", "attention", "query", "kernel"), 1),
    Tensor(LAYER + "self_attn.k_proj.weight", ("layers", "attention", "key", "kernel"), 1),
    Tensor(LAYER + "self_attn.v_proj.weight", ("layers", "attention", "value", "kernel"), 1),
    Tensor(LAYER + "self_attn.o_proj.weight", ("layers", "attention", "out", "kernel"), 2),
    Tensor("model.norm.weight", ("final_norm", "scale")),
    Tensor(HEAD, ("head",)),
)
MLP_NORM = (Tensor(LAYER + "post_attention_layernorm.weight", ("layers", "mlp_norm", "scale")),)
MLP = (
    Tensor(LAYER + "mlp.gate_proj.weight", ("layers", "mlp", "gate", "kernel"), 1),
    Tensor(LAYER + "mlp.up_proj.weight", ("layers", "mlp", "up", "kernel"), 1),
    Tensor(LAYER + "mlp.down_proj.weight", ("layers", "mlp", "down", "kernel"), 1),
)

FAMILY = Family(
    "LlamaForCausalLM",
    tensors=BASE + MLP_NORM + MLP,
    constants={"attention_bias": False},
    remote_code=True,
    vllm_gritlm=True,
)
