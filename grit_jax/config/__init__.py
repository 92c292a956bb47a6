"""The model's shape and every setting of a run: dataclasses, read from YAML and `--section.key=value`."""

from __future__ import annotations

from grit_jax.config.architecture import (
    Attention,
    EmbeddingConfig,
    Pooling,
    RopeScaling,
    TransformerConfig,
    field_differences,
)
from grit_jax.config.parsing import (
    config_differences,
    dump_config,
    flat_values,
    from_mapping,
    load_config,
    parse_config,
    parse_mapping,
)
from grit_jax.config.settings import (
    ALL_LINEAR,
    COPIES,
    TRAIN_ALL,
    AttentionKernel,
    CheckpointConfig,
    CompilerOption,
    Config,
    DataConfig,
    DistributedConfig,
    ExpertKernel,
    LoggingConfig,
    LoRAConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    Negatives,
    OptimizerConfig,
    Remat,
    ScorecardConfig,
    StageConfig,
    TrainConfig,
)
