"""Reads and writes config.json by the tables of the families."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from grit_jax.config import RopeScaling, TransformerConfig
from grit_jax.config.jsonfile import SIZE, Section, shown
from grit_jax.config.ranges import Range
from grit_jax.errors import InputError
from grit_jax.families import FAMILIES, Family

# Fields that every family stores under the same key.
_FIELDS = {
    "vocab_size": "vocab_size", "embed_dim": "hidden_size", "mlp_dim": "intermediate_size",
    "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads", "max_length": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
}  # fmt: skip

# Keys that change the mathematics, with the only supported values; an absent key has the first one.
_REQUIRED: Mapping[str, tuple[Any, ...]] = {
    "attention_bias": (False, None), "mlp_bias": (False, None), "use_bidirectional_attention": (False, None),
    "use_qk_norm": (False, None), "qk_layernorm": (False, None),
    "is_causal": (True, None), "norm_topk_prob": (True, None),
    "attention_dropout": (0.0, None), "router_jitter_noise": (0.0, None),
    "partial_rotary_factor": (1.0, None), "logit_scale": (1.0, None), "logits_scaling": (1.0, None),
    "embedding_multiplier": (1.0, None), "residual_multiplier": (1.0, None), "pretraining_tp": (1, None),
    "attention_multiplier": (None,), "clip_qkv": (None,), "quantization_config": (None,), "per_layer_config": (None,),
}  # fmt: skip

# The ranges of fields; any other size may be as large as an array's. They lie far beyond any model, and keep a damaged
# file from occupying this package forever.
_MANY = Range("must be from 1 to 10000", lambda value: 1 <= value <= 10_000)
_FIRST_LAYER = Range("must be from 0 to 2147483647", lambda value: 0 <= value < 1 << 31)
_EPSILON = Range("must be positive and at most 1", lambda value: 1e-30 < value <= 1)
_BASE = Range("must be positive and at most 1e30", lambda value: 1e-30 < value <= 1e30)  # float32 ends soon after
_INTEGERS = dict.fromkeys(("num_layers", "num_experts", "experts_per_token"), _MANY)
_SOFT_CAPS = dict.fromkeys(("attention_soft_cap", "logit_soft_cap"), _BASE)  # may be null
_FLOATS = {"norm_epsilon": _EPSILON, "local_rope_theta": _BASE} | _SOFT_CAPS

_DEFAULTS = {field.name: field.default for field in dataclasses.fields(TransformerConfig)}
_FEATURES = set[str]().union(*(family.feature_keys for family in FAMILIES.values()))
_ACTIVATIONS: Mapping[str, Any] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_LAYER_TYPES = {"sliding_attention": True, "full_attention": False}

# The keys that each type of rotary embedding must have.
_ROPE_LENGTH = "original_max_position_embeddings"
_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _ROPE_LENGTH),
}


def read_config(config: Mapping[str, Any], *, source: str) -> TransformerConfig:
    """The architecture that a config.json describes.

    Raises:
      InputError: It names an unsupported family or feature, lacks a key, has a value of the wrong type or out of range,
        or contradicts itself.
    """
    section = Section(config, source=source)
    name: Any = section.choice("model_type", FAMILIES)
    family = FAMILIES[name]
    for key, allowed in _REQUIRED.items():
        if key in section and not _is_one_of(config[key], allowed):
            raise section.error(key, f"is not supported for {name}; only {allowed[0]!r} is")
    if foreign := sorted(key for key in _FEATURES - family.feature_keys if config.get(key)):
        raise section.error(foreign[0], f"is a feature that {name} does not have")
    if missing := [key for key in _FIELDS.values() if key not in section]:
        raise InputError(f"{source}: {', '.join(missing)} missing; the file does not describe a {name} model")

    fields = {ours: _read_field(section, ours, theirs) for ours, theirs in _FIELDS.items()} | dict(family.fixed)
    for ours, theirs in family.keys.items():
        fields[ours] = _read_field(section, ours, theirs, default=family.defaults.get(ours, _DEFAULTS[ours]))
    fields |= _read_windows(section, family, fields["num_layers"]) | _read_rope(section, family)
    fields |= _read_heads(section, family, fields["embed_dim"], fields["num_heads"])
    if fields.get("attention_scale_dim") == fields["head_dim"]:
        fields["attention_scale_dim"] = None
    for ours, alias in family.aliases.items():
        if config.get(alias, fields[ours]) != fields[ours]:
            raise section.error(alias, f"contradicts {family.keys[ours]}={fields[ours]}; remove one of them")
    try:
        return TransformerConfig(
            family=name,
            tie_embeddings=section.flag("tie_word_embeddings", default=family.defaults.get("tie_embeddings", False)),
            activation=_ACTIVATIONS[section.choice(family.activation[0], _ACTIVATIONS, default=family.activation[1])],
            **fields,
        )
    except InputError as error:
        raise error if str(error).startswith(source) else InputError(f"{source}: {error}") from error


def _is_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    """`value in allowed`, except that 0 is not False and 1 is not True."""
    return any(isinstance(value, bool) == isinstance(other, bool) and value == other for other in allowed)


def _read_field(section: Section, field: str, key: str, **default: Any) -> Any:
    if field in _FLOATS:
        return section.number(key, _FLOATS[field], null=field in _SOFT_CAPS, **default)
    return section.integer(key, _INTEGERS.get(field, SIZE), **default)


def _read_heads(section: Section, family: Family, embed_dim: int, num_heads: int) -> dict[str, int]:
    """`num_kv_heads` and `head_dim`."""
    num_kv_heads = section.integer("num_key_value_heads", default=family.defaults.get("num_kv_heads"), null=True)
    default = family.defaults.get("head_dim")
    head_dim = section.integer("head_dim", default=default, null=default is None)
    if head_dim is None and embed_dim % num_heads:
        raise section.error("hidden_size", f"is not a multiple of num_attention_heads={num_heads}; set head_dim")
    return {"num_kv_heads": num_kv_heads or num_heads, "head_dim": head_dim or embed_dim // num_heads}


def _read_windows(section: Section, family: Family, num_layers: int) -> dict[str, Any]:
    """`sliding_window` and, if layers differ, `windowed_layers`."""
    window = section.integer("sliding_window", default=family.defaults.get("sliding_window"), null=True)
    uses = section.flag("use_sliding_window", default=False)
    if family.windows == "none" or (family.windows == "optional" and not uses):
        window = None
    types = section.texts("layer_types", default=None, null=True)
    if unknown := sorted(set(types or ()) - _LAYER_TYPES.keys()):
        raise InputError(
            f"{section.source}: layer_types has {shown(unknown[0])}; supported are {', '.join(_LAYER_TYPES)}"
        )
    if types is not None and len(types) != num_layers:
        raise InputError(
            f"{section.source}: layer_types has {len(types)} entries for num_hidden_layers={num_layers}; give one each"
        )
    layers = [_LAYER_TYPES[layer] for layer in types or ()]
    if family.windows in ("none", "all") and set(layers) - {bool(window)}:
        name = section.values["model_type"]
        raise InputError(f"{section.source}: layer_types are not all alike, as {name}'s layers are")
    if not window:
        if any(layers):
            raise section.error("layer_types", "has sliding_attention, but no sliding_window is set; set it")
        return {"sliding_window": None}
    if family.windows == "all":
        return {"sliding_window": window}
    if types is None and family.windows == "optional":
        first = section.integer("max_window_layers", _FIRST_LAYER, default=28)
        layers = [layer >= first for layer in range(num_layers)]
    elif types is None:
        period = family.window_period
        if isinstance(period, tuple):
            period = section.integer(period[0], default=period[1])
        layers = [(layer + 1) % period > 0 for layer in range(num_layers)]
    if not any(layers):
        return {"sliding_window": None}
    return {"sliding_window": window, "windowed_layers": () if all(layers) else tuple(layers)}


def _read_rope(section: Section, family: Family) -> dict[str, Any]:
    """Bases and scaling of the rotary embedding, from the keys of transformers 4 or 5, or both if they agree."""
    keys = ("rope_scaling", "rope_parameters")
    found = [key for key in keys if (given := section.section(key, default=None, null=True)) and given.values]
    readings = [_read_rope_key(section, key, family) for key in found or keys[:1]]
    if readings[0] != readings[-1]:
        raise section.error(found[0], f"contradicts {found[1]}={shown(section.values[found[1]])}; remove one of them")
    return readings[0]


def _read_rope_key(section: Section, key: str, family: Family) -> dict[str, Any]:
    rope = section.section(key, default=None, null=True) or Section({}, source=section.source)
    local = Section({}, source=section.source)
    local_key = family.keys.get("local_rope_theta")
    if _LAYER_TYPES.keys() & rope.values.keys():  # one entry per type of layer
        if not local_key or key != "rope_parameters" or rope.values.keys() - _LAYER_TYPES.keys():
            raise section.error(key, "has entries for types of layers, which are not supported there")
        local = rope.section("sliding_attention", default=None, null=True) or local
        rope = rope.section("full_attention", default=None, null=True) or Section({}, source=section.source)
        if _rope_type(local) != "default":
            raise InputError(f"{section.source}: positions stretched in layers with a window are not supported")
    elif local_key and key == "rope_parameters" and rope.values:
        raise section.error(key, f"has no entries for {' and '.join(_LAYER_TYPES)}; give one each")
    fields: dict[str, Any] = {
        "rope_theta": _read_theta(section, "rope_theta", rope, family.defaults.get("rope_theta", 10000.0)),
        "rope_scaling": _read_scaling(section, rope),
    }
    if local_key:
        default = family.defaults["local_rope_theta"]
        fields["local_rope_theta"] = _read_theta(section, local_key, local, default)
    return fields


def _read_theta(section: Section, key: str, rope: Section, default: float) -> float:
    """A base, found among the rope parameters, beside them, or in both if they agree."""
    outer = section.number(key, _BASE, default=None)
    inner = rope.number("rope_theta", _BASE, default=None)
    if None not in (outer, inner) and outer != inner:
        raise section.error(key, f"contradicts rope_theta={inner} of the rope parameters; remove one of them")
    return next((theta for theta in (inner, outer) if theta is not None), default)


def _read_scaling(section: Section, rope: Section) -> RopeScaling | None:
    rope_type = _rope_type(rope)
    if rope_type == "default":
        return None
    values: list[Any] = [rope.number(key, _BASE) for key in _ROPE_KEYS[rope_type] if key != _ROPE_LENGTH]
    if _ROPE_LENGTH in _ROPE_KEYS[rope_type]:
        values.append(rope.integer(_ROPE_LENGTH))
        if _ROPE_LENGTH in section and section.integer(_ROPE_LENGTH) != values[-1]:
            raise section.error(_ROPE_LENGTH, f"contradicts {values[-1]} of the rope parameters; remove one of them")
    try:
        return RopeScaling(rope_type, *values)
    except InputError as error:
        raise InputError(f"{section.source}: {error}") from error


def _rope_type(rope: Section) -> Any:
    """`default`, which scales nothing, or the `kind` of a RopeScaling; checks that it has exactly its keys."""
    older = rope.text("type", default="default")
    rope_type = rope.text("rope_type", default=older)
    if "type" in rope and older != rope_type:
        raise rope.error("rope_type", f"contradicts type={shown(older)}; remove one of them")
    if rope_type not in _ROPE_KEYS:
        raise InputError(
            f"{rope.source}: rope scaling of type {shown(rope_type)} is not supported; linear and llama3 are"
        )
    keys = _ROPE_KEYS[rope_type]
    if missing := [key for key in keys if key not in rope]:
        raise InputError(f"{rope.source}: rope scaling of type {rope_type!r} lacks {', '.join(missing)}")
    unknown = rope.values.keys() - {"rope_type", "type", "rope_theta", *keys}
    if unknown := sorted(key for key in unknown if not _is_one_of(rope.values[key], _REQUIRED.get(key, (None,)))):
        raise rope.error(unknown[0], f"is not supported in rope scaling of type {rope_type!r}")
    return rope_type


def write_config(
    architecture: TransformerConfig, *, dtype: str, bos_id: int | None, eos_id: int | None
) -> dict[str, Any]:
    """The config.json of an architecture, for transformers 4 and 5.

    It states `is_causal`, so that loading can override it for the bidirectional pass.

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
    family = FAMILIES[architecture.family]
    activations = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    config: dict[str, Any] = {
        "architectures": [family.model_class],
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
        config[family.keys["attention_scale_dim"]] = architecture.attention_scale_dim or architecture.head_dim
    if scaling := architecture.rope_scaling:
        config["rope_scaling"] = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            config["rope_scaling"] |= {
                "low_freq_factor": scaling.low_frequency_factor,
                "high_freq_factor": scaling.high_frequency_factor,
                "original_max_position_embeddings": scaling.original_length,
            }
    if family.windows != "none":
        config["sliding_window"] = architecture.sliding_window
    if family.windows == "layers" and not architecture.sliding_window:
        config["sliding_window"] = architecture.max_length  # transformers needs one even if no layer uses it
    if family.windows == "optional":
        full = architecture.layer_windows.index(True) if any(architecture.layer_windows) else architecture.num_layers
        config |= {"use_sliding_window": architecture.sliding_window is not None, "max_window_layers": full}
    if family.windows in ("optional", "layers"):
        names = {windowed: name for name, windowed in _LAYER_TYPES.items()}
        config["layer_types"] = [names[windowed] for windowed in architecture.layer_windows]
    return config | dict(family.constants)
