"""Gemma 2: soft caps, alternating windows, scaled embeddings, norms after attention and MLP."""

from __future__ import annotations

from grit_jax.families.family import Family, Tensor
from grit_jax.families.llama import BASE, LAYER, MLP

NORMS = (
    Tensor(LAYER + "post_attention_layernorm.weight", ("layers", "attention_post_norm", "scale")),
    Tensor(LAYER + "pre_feedforward_layernorm.weight", ("layers", "mlp_norm", "scale")),
    Tensor(LAYER + "post_feedforward_layernorm.weight", ("layers", "mlp_post_norm", "scale")),
)

FAMILY = Family(
    "Gemma2ForCausalLM",
    tensors=BASE + NORMS + MLP,
    fixed={"norm_offset": 1.0, "post_norms": True, "scale_embedding": True, "window_bidirectional": True},
    keys={
        "attention_scale_dim": "query_pre_attn_scalar",
        "logit_soft_cap": "final_logit_softcapping",
        "attention_soft_cap": "attn_logit_softcapping",
    },
    defaults={
        "tie_embeddings": True, "sliding_window": 4096, "attention_scale_dim": 256, "head_dim": 256, "num_kv_heads": 4,
        "attention_soft_cap": 50.0, "logit_soft_cap": 30.0,
    },
    constants={"attention_bias": False},
    activation=("hidden_activation", "gelu_pytorch_tanh"),
    windows="layers",
    window_period=2,
    eager=True,
    vllm_is_causal=False,
)  # fmt: skip
