"""A model's configuration: the shape of its transformer, and how it makes vectors."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from grit_jax.config.ranges import NonNegativeInt, PositiveFloat, PositiveInt, require_fields
from grit_jax.errors import InputError
from grit_jax.families import FAMILIES

Attention = Literal["bidirectional", "causal"]
Pooling = Literal["mean", "weighted_mean", "cls", "last_token"]


@dataclass(frozen=True)
class RopeScaling:
    """Stretches rotary positions beyond the length that a model was first trained on.

    Attributes:
      kind: `linear` divides every frequency by `factor`; `llama3` divides the slow ones only, with a ramp between.
      factor: Divisor of the frequencies.
      low_frequency_factor: `llama3`: divide frequencies of waves longer than `original_length / low_frequency_factor`.
      high_frequency_factor: `llama3`: keep waves shorter than `original_length / high_frequency_factor`.
      original_length: `llama3`: length that the model was first trained on, in tokens.
    """

    kind: Literal["linear", "llama3"] = "linear"
    factor: PositiveFloat = 1.0
    low_frequency_factor: PositiveFloat = 1.0
    high_frequency_factor: PositiveFloat = 4.0
    original_length: PositiveInt = 8192

    def __post_init__(self):
        require_fields("model.architecture.rope_scaling", self)
        if self.kind == "llama3" and self.low_frequency_factor >= self.high_frequency_factor:
            raise InputError(
                f"model.architecture.rope_scaling.low_frequency_factor={self.low_frequency_factor} must be less than "
                f"high_frequency_factor={self.high_frequency_factor}"
            )


FamilyName = Literal[tuple(FAMILIES)]  # ty: ignore[invalid-type-form]  # computed


@dataclass(frozen=True)
class TransformerConfig:
    """Architecture of a decoder of one of the supported families.

    Attributes:
      family: Hugging Face `model_type` that the model is exported as.
      vocab_size: Rows of the embedding table; 0 takes the tokenizer's size.
      embed_dim: Width of the residual stream.
      mlp_dim: Width of the gated MLP, or of one expert.
      num_layers: Transformer blocks.
      num_heads: Query heads.
      num_kv_heads: Key and value heads; divides `num_heads`.
      head_dim: Width of one head; 0 means `embed_dim / num_heads`.
      max_length: Longest sequence, in tokens.
      rope_theta: Base of the rotary embedding's wavelengths.
      rope_scaling: How they are stretched; null for none.
      local_rope_theta: Base in layers with a window, never stretched; null for `rope_theta`.
      norm_epsilon: Epsilon of every RMSNorm.
      norm_offset: Added to every stored norm scale, such as 1 where scales are stored around 0.
      activation: Nonlinearity of the gated MLP.
      qkv_bias: Whether query, key and value have biases.
      qk_norm: Whether each head's queries and keys are normalised before the rotation.
      post_norms: Whether the outputs of attention and MLP are normalised.
      scale_embedding: Whether token embeddings are multiplied by `sqrt(embed_dim)`.
      attention_scale_dim: Query-key products are divided by its square root; null means `head_dim`.
      attention_soft_cap: Bound of attention scores, by tanh; null for none.
      logit_soft_cap: Bound of logits, by tanh; null for none.
      sliding_window: Number of keys that a causal query sees, itself included; null for all.
      windowed_layers: For each layer, whether it has the window; empty if all have it.
      window_bidirectional: Whether a bidirectional query sees only keys at most `sliding_window` away.
      tie_embeddings: Whether the output head is the embedding table.
      num_experts: Experts of every MLP; 0 for a dense MLP.
      experts_per_token: Experts that each token goes to.
    """

    family: FamilyName = "llama"
    vocab_size: NonNegativeInt = 0
    embed_dim: PositiveInt = 256
    mlp_dim: PositiveInt = 768
    num_layers: PositiveInt = 4
    num_heads: PositiveInt = 4
    num_kv_heads: PositiveInt = 2
    head_dim: NonNegativeInt = 0
    max_length: PositiveInt = 2048
    rope_theta: PositiveFloat = 10000.0
    rope_scaling: RopeScaling | None = None
    local_rope_theta: PositiveFloat | None = None
    norm_epsilon: PositiveFloat = 1e-5
    norm_offset: float = 0.0
    activation: Literal["silu", "gelu_tanh"] = "silu"
    qkv_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    scale_embedding: bool = False
    attention_scale_dim: PositiveInt | None = None
    attention_soft_cap: PositiveFloat | None = None
    logit_soft_cap: PositiveFloat | None = None
    sliding_window: PositiveInt | None = None
    windowed_layers: tuple[bool, ...] = ()
    window_bidirectional: bool = False
    tie_embeddings: bool = True
    num_experts: NonNegativeInt = 0
    experts_per_token: PositiveInt = 2

    def __post_init__(self):
        require_fields("model.architecture", self)
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"model.architecture.num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}; "
                "every key/value head serves the same number of query heads"
            )
        if not self.head_dim and self.embed_dim % self.num_heads:
            raise InputError(
                f"model.architecture.embed_dim={self.embed_dim} is not a multiple of num_heads={self.num_heads}; "
                "set model.architecture.head_dim"
            )
        if "num_experts" in FAMILIES[self.family].keys and not self.num_experts:
            raise InputError(f"model.architecture.family={self.family} needs model.architecture.num_experts")
        if self.num_experts and self.experts_per_token > self.num_experts:
            raise InputError(
                f"model.architecture.experts_per_token={self.experts_per_token} is not between 1 and "
                f"num_experts={self.num_experts}"
            )
        # JSON and YAML give lists and mappings back.
        object.__setattr__(self, "windowed_layers", tuple(self.windowed_layers))
        if isinstance(self.rope_scaling, dict):
            object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
        if self.windowed_layers and len(self.windowed_layers) != self.num_layers:
            raise InputError(
                f"model.architecture.windowed_layers has {len(self.windowed_layers)} entries for "
                f"num_layers={self.num_layers}; give one per layer, or none"
            )
        if any(self.windowed_layers) and not self.sliding_window:
            raise InputError("model.architecture.windowed_layers needs model.architecture.sliding_window")

    @property
    def layer_windows(self) -> tuple[bool, ...]:
        """For each layer, whether it has the sliding window."""
        return self.windowed_layers or (self.sliding_window is not None,) * self.num_layers

    def resolve(self, vocab_size: int) -> TransformerConfig:
        """The same architecture with `vocab_size` and `head_dim` filled in if they are 0.

        Raises:
          InputError: The embedding table has fewer rows than the tokenizer has tokens, or heads of odd width.
        """
        if 0 < self.vocab_size < vocab_size:
            raise InputError(
                f"model.architecture.vocab_size={self.vocab_size} is smaller than the tokenizer's {vocab_size} tokens; "
                "remove it or use the model's own tokenizer"
            )
        head_dim = self.head_dim or self.embed_dim // self.num_heads
        if head_dim % 2:
            raise InputError(f"model.architecture.head_dim={head_dim} is odd; rotary embeddings pair its values")
        return dataclasses.replace(self, vocab_size=self.vocab_size or vocab_size, head_dim=head_dim)


@dataclass(frozen=True)
class EmbeddingConfig:
    """How hidden states become vectors; stored with the weights.

    Attributes:
      attention: Attention of the embedding pass.
      pooling: `mean`, `weighted_mean` (later tokens weigh more) or `last_token` of the text, or `cls` (first token).
      normalized: Whether vectors have unit length.
      projection_dim: Width of a linear head; null for none.
    """

    attention: Attention = "bidirectional"
    pooling: Pooling = "mean"
    normalized: bool = True
    projection_dim: PositiveInt | None = None

    def __post_init__(self):
        require_fields("model.embedding", self)


def field_differences(
    here: TransformerConfig | EmbeddingConfig, there: TransformerConfig | EmbeddingConfig
) -> list[str]:
    """Each field that differs between two configs of one type, as `name=value, there value`."""
    names = [field.name for field in dataclasses.fields(here)]
    return [
        f"{name}={getattr(here, name)!r}, there {getattr(there, name)!r}"
        for name in names
        if getattr(here, name) != getattr(there, name)
    ]
