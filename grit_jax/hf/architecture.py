"""config.json of each family and the architecture it describes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from grit_jax.config import InputError, RopeScaling, TransformerConfig

# Fields that every family stores under the same key.
_FIELDS = {
    "vocab_size": "vocab_size",
    "embed_dim": "hidden_size",
    "mlp_dim": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "max_length": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
}

# Keys that change the mathematics, with the only values that are supported; a key that is absent has the first one.
_REQUIRED: Mapping[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0.0, None),
    "router_jitter_noise": (0.0, None),
    "partial_rotary_factor": (1.0, None),
    "use_bidirectional_attention": (False, None),
    "quantization_config": (None,),
    "pretraining_tp": (1, None),
    "is_causal": (True, None),
    "norm_topk_prob": (True, None),
    "use_qk_norm": (False, None),
    "qk_layernorm": (False, None),
    "clip_qkv": (None,),
    "logit_scale": (1.0, None),
    "logits_scaling": (1.0, None),
    "embedding_multiplier": (1.0, None),
    "residual_multiplier": (1.0, None),
    "attention_multiplier": (None,),
}


@dataclasses.dataclass(frozen=True)
class _Family:
    """What a family's config.json says beside `_FIELDS`, by the field it stands for.

    Attributes:
      model: Class that transformers opens the folder with.
      fixed: Fields that follow from the family alone.
      keys: Fields and their keys; an absent key has the field's value in `defaults`.
      defaults: Values of absent keys, where they are not this package's own defaults.
      activation: The key of the activation and its value where it is absent.
      windows: How layers with a sliding window are told: `none`, `all`, `optional` or `layers`.
    """

    model: str
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    activation: tuple[str, str] = ("hidden_act", "silu")
    windows: str = "none"


_GEMMA = {
    "norm_offset": 1.0,
    "post_norms": True,
    "scale_embedding": True,
    "window_bidirectional": True,
}
_GEMMA_KEYS = {
    "attention_scale_dim": "query_pre_attn_scalar",
    "logit_soft_cap": "final_logit_softcapping",
}
_GEMMA_DEFAULTS = {"tie_embeddings": True, "sliding_window": 4096, "attention_scale_dim": 256, "head_dim": 256}
_GEMMA_ACTIVATION = ("hidden_activation", "gelu_pytorch_tanh")
_FAMILIES: Mapping[str, _Family] = {
    "llama": _Family("LlamaForCausalLM"),
    "mistral": _Family("MistralForCausalLM", defaults={"sliding_window": 4096}, windows="all"),
    "mixtral": _Family(
        "MixtralForCausalLM",
        keys={"num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"},
        defaults={"num_experts": 8, "rope_theta": 1e6},
        windows="all",
    ),
    "qwen2": _Family(
        "Qwen2ForCausalLM",
        fixed={"qkv_bias": True, "window_bidirectional": True},
        defaults={"sliding_window": 4096},
        windows="optional",
    ),
    "qwen3": _Family(
        "Qwen3ForCausalLM",
        fixed={"qk_norm": True, "window_bidirectional": True},
        defaults={"sliding_window": 4096, "head_dim": 128},
        windows="optional",
    ),
    "gemma2": _Family(
        "Gemma2ForCausalLM",
        fixed=_GEMMA,
        keys=_GEMMA_KEYS | {"attention_soft_cap": "attn_logit_softcapping"},
        defaults=_GEMMA_DEFAULTS | {"attention_soft_cap": 50.0, "logit_soft_cap": 30.0},
        activation=_GEMMA_ACTIVATION,
        windows="layers",
    ),
    "gemma3_text": _Family(
        "Gemma3ForCausalLM",
        fixed=_GEMMA | {"qk_norm": True},
        keys=_GEMMA_KEYS | {"local_rope_theta": "rope_local_base_freq"},
        defaults=_GEMMA_DEFAULTS | {"rope_theta": 1e6, "local_rope_theta": 10000.0},
        activation=_GEMMA_ACTIVATION,
        windows="layers",
    ),
}  # fmt: skip
_ACTIVATIONS: Mapping[str, Any] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_LAYER_TYPES = {"sliding_attention": True, "full_attention": False}

# Keys of windows that each way of telling them reads, beside layer_types.
_WINDOW_KEYS = {
    "none": (),
    "all": ("sliding_window",),
    "optional": ("sliding_window", "use_sliding_window"),
    "layers": ("sliding_window",),
}
# What each kind of rotary embedding must say.
_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def _own_keys(name: str, family: _Family) -> set[str]:
    """Keys of features that not every family has and this one does."""
    pattern = {"sliding_window_pattern"} if name == "gemma3_text" else set()
    return {*family.keys.values(), *_WINDOW_KEYS[family.windows]} | pattern


_FEATURES = set[str]().union(*(_own_keys(*entry) for entry in _FAMILIES.items()))


def model_class(architecture: TransformerConfig) -> str:
    """The transformers class that generates with this architecture."""
    return _FAMILIES[architecture.family].model


def read_config(config: Mapping[str, Any], *, source: str) -> TransformerConfig:
    """The architecture that a config.json describes.

    Raises:
      InputError: It names a family or a feature that is not supported, or lacks a key.
    """
    name: Any = config.get("model_type")
    if name not in _FAMILIES:
        raise InputError(f"{source}: model_type={name!r} is not supported; supported are {', '.join(_FAMILIES)}")
    family = _FAMILIES[name]
    for key, allowed in _REQUIRED.items():
        if config.get(key, allowed[0]) not in allowed:
            raise InputError(f"{source}: {key}={config[key]!r} is not supported for {name}; only {allowed[0]!r} is")
    if foreign := sorted(key for key in _FEATURES - _own_keys(name, family) if config.get(key)):
        raise InputError(f"{source}: {foreign[0]}={config[foreign[0]]!r} is a feature that {name} does not have")
    if missing := [key for key in _FIELDS.values() if key not in config]:
        raise InputError(f"{source}: {', '.join(missing)} missing; the file does not describe a {name} model")

    def value(field: str, key: str) -> Any:
        fallback = next(f for f in dataclasses.fields(TransformerConfig) if f.name == field).default
        return config.get(key, family.defaults.get(field, fallback))

    activation: Any = config.get(*family.activation)
    if activation not in _ACTIVATIONS:
        raise InputError(
            f"{source}: {family.activation[0]}={activation!r} is not supported; known are {', '.join(_ACTIVATIONS)}"
        )
    num_heads = config["num_attention_heads"]
    fields = {ours: config[theirs] for ours, theirs in _FIELDS.items()} | dict(family.fixed)
    fields |= {ours: value(ours, theirs) for ours, theirs in family.keys.items()}
    fields |= _read_windows(config, family, source) | _read_rope(config, family, source)
    head_dim = config.get("head_dim", family.defaults.get("head_dim")) or config["hidden_size"] // num_heads
    if fields.get("attention_scale_dim") == head_dim:
        fields["attention_scale_dim"] = None
    tied = config.get("tie_word_embeddings", family.defaults.get("tie_embeddings", False))
    return TransformerConfig(
        family=name,
        num_kv_heads=config.get("num_key_value_heads") or num_heads,
        head_dim=head_dim,
        tie_embeddings=bool(tied),
        activation=_ACTIVATIONS[activation],
        **fields,
    )


def _read_windows(config: Mapping[str, Any], family: _Family, source: str) -> dict[str, Any]:
    """`sliding_window` and, where layers differ, `windowed_layers`."""
    window = config.get("sliding_window", family.defaults.get("sliding_window"))
    num_layers = config["num_hidden_layers"]
    if family.windows == "none" or (family.windows == "optional" and not config.get("use_sliding_window", False)):
        window = None
    types = config.get("layer_types") or []
    if unknown := sorted(set(types) - _LAYER_TYPES.keys()):
        raise InputError(f"{source}: layer_types has {', '.join(unknown)}; known are {', '.join(_LAYER_TYPES)}")
    layers = [_LAYER_TYPES[kind] for kind in types]
    if layers and len(layers) != num_layers:
        raise InputError(f"{source}: layer_types has {len(layers)} entries for num_hidden_layers={num_layers}")
    if family.windows in ("none", "all") and set(layers) - {bool(window)}:
        raise InputError(f"{source}: layer_types are not all alike, as {config['model_type']}'s layers are")
    if not window:
        return {"sliding_window": None}
    if family.windows == "all":
        return {"sliding_window": window}
    if not layers and family.windows == "optional":
        layers = [layer >= config.get("max_window_layers", 28) for layer in range(num_layers)]
    elif not layers:
        period = config.get("sliding_window_pattern") or (2 if config["model_type"] == "gemma2" else 6)
        layers = [(layer + 1) % period > 0 for layer in range(num_layers)]
    if not any(layers):
        return {"sliding_window": None}
    return {"sliding_window": window, "windowed_layers": () if all(layers) else tuple(layers)}


def _read_rope(config: Mapping[str, Any], family: _Family, source: str) -> dict[str, Any]:
    """Bases of the rotary embedding and how it is stretched, from the keys of transformers 4 or 5."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    local: Mapping[str, Any] = {}
    if "full_attention" in rope:  # one entry per kind of layer
        rope, local = rope["full_attention"] or {}, rope.get("sliding_attention") or {}
    local_key = family.keys.get("local_rope_theta")
    if local and not (local_key and _rope_kind(local, source) == "default"):
        raise InputError(f"{source}: positions stretched in layers with a window are not supported")
    kind, scaling = _rope_kind(rope, source), None
    if kind != "default":
        values: list[Any] = [float(rope[key]) for key in _ROPE_KEYS[kind]]
        scaling = RopeScaling(kind, *values[:3], *map(int, values[3:]))
    theta = rope.get("rope_theta") or config.get("rope_theta") or family.defaults.get("rope_theta", 10000.0)
    fields = {"rope_theta": float(theta), "rope_scaling": scaling}
    if local_key:
        local_theta = local.get("rope_theta") or config.get(local_key) or family.defaults["local_rope_theta"]
        fields["local_rope_theta"] = float(local_theta)
    return fields


def _rope_kind(rope: Mapping[str, Any], source: str) -> Any:
    """How positions are stretched: `default` for not at all, or the kind of a RopeScaling.

    Raises:
      InputError: The kind is not supported, or lacks a key or has another.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _ROPE_KEYS:
        raise InputError(f"{source}: rope scaling of type {kind!r} is not supported; linear and llama3 are")
    if missing := [key for key in _ROPE_KEYS[kind] if key not in rope]:
        raise InputError(f"{source}: rope scaling of type {kind!r} lacks {', '.join(missing)}")
    unknown = rope.keys() - {"rope_type", "type", "rope_theta", *_ROPE_KEYS[kind]}
    if unknown := sorted(key for key in unknown if rope[key] not in _REQUIRED.get(key, (None,))):
        raise InputError(
            f"{source}: {unknown[0]}={rope[unknown[0]]!r} is not supported in rope scaling of type {kind!r}"
        )
    return kind


def write_config(
    architecture: TransformerConfig, *, dtype: str, bos_id: int | None, eos_id: int | None
) -> dict[str, Any]:
    """The config.json of an architecture, with the keys that transformers 4 and 5 both read.

    `is_causal` states transformers' default; a key that is present can be overridden to load the bidirectional pass.

    Raises:
      InputError: The family cannot express the architecture.
    """
    config = _write(architecture) | {"bos_token_id": bos_id, "eos_token_id": eos_id, "torch_dtype": dtype}
    again = read_config(config, source="config.json")
    lost = [
        f"model.architecture.{field.name}={getattr(architecture, field.name)!r}"
        for field in dataclasses.fields(architecture)
        if getattr(architecture, field.name) != getattr(again, field.name)
    ]
    if lost:
        raise InputError(
            f"model.architecture.family={architecture.family!r} has no {', '.join(lost)}; "
            "choose a family that has it, or leave it out"
        )
    return config


def _write(architecture: TransformerConfig) -> dict[str, Any]:
    family = _FAMILIES[architecture.family]
    activations = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    config: dict[str, Any] = {
        "architectures": [family.model],
        "model_type": architecture.family,
        **{theirs: getattr(architecture, ours) for ours, theirs in {**_FIELDS, **family.keys}.items()},
        "num_key_value_heads": architecture.num_kv_heads,
        "head_dim": architecture.head_dim,
        "rope_theta": architecture.rope_theta,
        "tie_word_embeddings": architecture.tie_embeddings,
        family.activation[0]: activations[architecture.activation],
        "attention_dropout": 0.0,
        "is_causal": True,
        "use_cache": True,
    }
    config["hidden_act"] = config[family.activation[0]]
    if "attention_scale_dim" in family.keys:
        config["query_pre_attn_scalar"] = architecture.attention_scale_dim or architecture.head_dim
    if scaling := architecture.rope_scaling:
        config["rope_scaling"] = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            config["rope_scaling"] |= {
                "low_freq_factor": scaling.low_frequency_factor,
                "high_freq_factor": scaling.high_frequency_factor,
                "original_max_position_embeddings": scaling.original_length,
            }
    if family.windows in ("all", "optional", "layers"):
        config["sliding_window"] = architecture.sliding_window
    if family.windows == "layers" and not architecture.sliding_window:
        config["sliding_window"] = architecture.max_length  # transformers wants one, also where no layer has it
    if family.windows == "optional":
        full = architecture.layer_windows.index(True) if any(architecture.layer_windows) else architecture.num_layers
        config |= {"use_sliding_window": architecture.sliding_window is not None, "max_window_layers": full}
    if family.windows in ("optional", "layers"):
        names = {windowed: name for name, windowed in _LAYER_TYPES.items()}
        config["layer_types"] = [names[windowed] for windowed in architecture.layer_windows]
    if architecture.family in ("llama", "qwen3", "gemma2", "gemma3_text"):
        config["attention_bias"] = False
    return config
