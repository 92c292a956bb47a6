"""Tiny random models of every family, made by transformers."""

import json

import numpy as np

from grit_jax.text.tokenizer import Tokenizer

SHAPE = {
    "vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "initializer_range": 0.3,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
_LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
_GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
}
# Name of a case -> class prefix in transformers, settings beside SHAPE.
CASES = {
    "llama 2": ("Llama", {"rms_norm_eps": 1e-5}),
    "llama 3": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama, linear positions": ("Llama", {"rope_parameters": _LINEAR}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral, window": ("Mistral", {"sliding_window": 5}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2, windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    "qwen3": ("Qwen3", {}),
    "gemma 2": ("Gemma2", {"sliding_window": 5, "query_pre_attn_scalar": 16}),
    "gemma 3": (
        "Gemma3",
        {
            "sliding_window": 5, "query_pre_attn_scalar": 16, "rope_parameters": _GEMMA3_ROPE,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
}  # fmt: skip


def make(family, settings, *, seed=0):
    """A random transformers model that attends eagerly, its norm scales and biases random too."""
    import torch
    import transformers

    name = "Gemma3Text" if family == "Gemma3" else family
    config = getattr(transformers, f"{name}Config")(**SHAPE | settings)
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def save(model, folder, **options):
    """Writes the model as transformers does, with a byte tokenizer."""
    model.save_pretrained(folder, **options)
    for name, text in Tokenizer.load("bytes").files().items():
        (folder / name).write_text(text)


def run(model, tokens, *, is_causal):
    """Logits and final hidden states, float32 numpy."""
    import torch

    with torch.no_grad():
        ids = torch.tensor(np.asarray(tokens), dtype=torch.long)
        out = model(ids, is_causal=is_causal, output_hidden_states=True, use_cache=False)
    return out.logits.numpy(), out.hidden_states[-1].numpy()


def config_of(folder):
    """The folder's config.json."""
    return json.loads((folder / "config.json").read_text())
