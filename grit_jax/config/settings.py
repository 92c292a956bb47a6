"""Every setting of a run: frozen dataclasses, one per section of a config file."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Annotated, Literal

from grit_jax.config.architecture import EmbeddingConfig, TransformerConfig
from grit_jax.config.ranges import (
    NOT_NEGATIVE,
    SECONDS,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    Share,
    require,
    require_fields,
)
from grit_jax.errors import InputError

AttentionKernel = Literal["dense", "blockwise", "splash", "cudnn", "cudnn_packed"]
ExpertKernel = Literal["ragged_dot", "megablox"]
Remat = Literal["none", "full", "dots", "offload"]
Negatives = Literal["auto", "dense", "gathered", "ring"]
TRAIN_ALL = ("*",)  # the default of `train.trainable`
ALL_LINEAR = "all-linear"  # every matrix of a layer that PEFT adapts under this name
CompilerOption = bool | int | str  # the compiler takes `true` of a flag, but not its text


@dataclass(frozen=True)
class ModelConfig:
    """The model to train, its precision and its kernels.

    Attributes:
      init: Run folder, checkpoint or Hugging Face folder to start from; null trains from scratch.
      tokenizer: Folder, `tokenizer.json` or `bytes`; null takes the tokenizer of `init`, or bytes without `init`.
      architecture: Shape of a model trained from scratch; `init` brings its own.
      embedding: Embedding pass and pooling.
      compute_dtype: Dtype of activations; `auto` is float32 on CPU and bfloat16 elsewhere. Weights stay float32.
      attention_kernel: `dense`, `blockwise` (CPU), `splash` (TPU), `cudnn` (GPU), `cudnn_packed` (GPU since Hopper), or
        `auto` for the device's own.
      expert_kernel: Multiplies tokens sorted by expert: `ragged_dot`, `megablox` (TPU), or `auto` for the device's own.
      remat: What a layer recomputes in the backward pass: `none`; `full`, all but its input; `dots`, all but matrix
        products and attention; `offload`, like `full`, with the inputs in host memory.
      layer_rows: Most rows that a device sends through a layer at once, which bounds the memory inside a layer; null
        for all. Weights are still gathered, and gradients reduced, once per layer.
      compiler_options: XLA's options for the training step, by name, such as `{xla_tpu_scoped_vmem_limit_kib: 98304}`;
        null for those of the device's kind, `{}` for the compiler's defaults.
    """

    init: str | None = None
    tokenizer: str | None = None
    architecture: TransformerConfig = field(default_factory=TransformerConfig)
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    attention_kernel: Literal["auto"] | AttentionKernel = "auto"
    expert_kernel: Literal["auto"] | ExpertKernel = "auto"
    remat: Remat = "full"
    layer_rows: PositiveInt | None = None
    compiler_options: dict[str, CompilerOption] | None = None

    def __post_init__(self):
        require_fields("model", self)


@dataclass(frozen=True)
class StageConfig:
    """A stage of a curriculum: a range of steps with its own choice of files.

    Within a stage no record repeats before all records of its file are used; the next stage starts over.

    Attributes:
      steps: Its length; null for the last stage, which runs to the end.
      files: Names of its files, such as `a.jsonl` or `easy-*`; empty for all of `data.train`.
      num_samples: Samples that an epoch takes from a file, on top of `data.num_samples`.
    """

    steps: PositiveInt | None = None
    files: list[str] = field(default_factory=list)
    num_samples: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class DataConfig:
    """Training data, and how to cut it into batches.

    Attributes:
      train: File or folder, or a list of them, on a disk or in a bucket; folders are searched for .jsonl, .jsonl.gz,
        .jsonl.zst, .array_record and .arrayrecord.
      validation: The same, for evaluation losses.
      held_out: Share of the records of `train` that are never trained on and are evaluated with `validation`. Chosen by
        query or conversation, so that records with the same question stay together.
      skip_bad: Whether to skip malformed records and count them; otherwise the first one stops the run.
      num_samples: Samples that an epoch takes from a file, by file name; files not named are used whole.
      curriculum: Successive stages with their own files; empty for all files all the time.
      query_max_length: Limit of a query with its instruction, in tokens.
      passage_max_length: Limit of a passage with its instruction, in tokens.
      generative_max_length: Limit of a conversation, in tokens.
      group_size: Passages per query: one positive and `group_size - 1` hard negatives.
      embedding_batch: Queries per step, over all devices.
      generative_batch: Conversations per step, over all devices.
      packing: Whether a row holds many texts (true) or one.
      row_buckets: Most buckets of row counts per stream; each is compiled once.
      exclude_duplicates: Whether to leave passages equal to a query's own positive, and positives of equal queries, out
        of its negatives.
    """

    train: str | list[str] = field(default_factory=list)
    validation: str | list[str] = field(default_factory=list)
    held_out: Fraction = 0.0
    skip_bad: bool = False
    num_samples: dict[str, int] = field(default_factory=dict)
    curriculum: list[StageConfig] = field(default_factory=list)
    query_max_length: PositiveInt = 256
    passage_max_length: PositiveInt = 2048
    generative_max_length: PositiveInt = 2048
    group_size: PositiveInt = 2
    embedding_batch: PositiveInt = 32
    generative_batch: PositiveInt = 32
    packing: bool = True
    row_buckets: PositiveInt = 4
    exclude_duplicates: bool = False

    def __post_init__(self):
        require_fields("data", self)
        _require_counts("data.num_samples", self.num_samples)
        for number, stage in enumerate(self.curriculum, start=1):
            key, last = f"data.curriculum[{number - 1}]", number == len(self.curriculum)
            if last and stage.steps is not None:
                raise InputError(f"{key} runs to the end: leave its steps out")
            if not last and stage.steps is None:
                raise InputError(f"{key} has no steps; only the last stage may leave them out")
            require_fields(key, stage)
            _require_counts(f"{key}.num_samples", stage.num_samples)

    @property
    def embedding_row_length(self) -> int:
        """Tokens of a packed embedding row: queries and passages share rows."""
        return max(self.query_max_length, self.passage_max_length)


@dataclass(frozen=True)
class LossConfig:
    """The joint objective: embedding_weight * L_rep + generative_weight * L_gen, plus the balance losses of experts.

    Attributes:
      type: Normalisation of the LM loss: `mixed` (mean over the tokens of each sub-batch of samples, then over
        sub-batches), `token` (sum over tokens / samples) or `token_mean` (mean over the batch's tokens).
      sub_batch_samples: Samples of one sub-batch of `mixed`; null takes the whole batch as one.
      temperature: Temperature of the contrastive softmax.
      negatives: How queries are scored against the passages of all devices: `dense` (all at once), `gathered` (tiles
        with a share of every device's passages), `ring` (each device's passages sent round) or `auto`, by size. This
        changes memory, not numbers.
      embedding_weight: Factor of the contrastive loss.
      generative_weight: Factor of the LM loss.
      router_weight: Factor of the experts' balance loss in the generative pass.
      embedding_router_weight: The same in the embedding pass; 0 only measures it.
    """

    type: Literal["mixed", "token", "token_mean"] = "mixed"
    sub_batch_samples: PositiveInt | None = 32
    temperature: PositiveFloat = 0.02
    negatives: Negatives = "auto"
    embedding_weight: NonNegativeFloat = 1.0
    generative_weight: NonNegativeFloat = 1.0
    router_weight: NonNegativeFloat = 0.02
    embedding_router_weight: NonNegativeFloat = 0.0

    def __post_init__(self):
        require_fields("loss", self)


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer and learning-rate schedule.

    Attributes:
      name: `adamw` or plain `sgd`.
      learning_rate: Peak rate.
      schedule: Decay after warm-up: `linear` or `cosine`, to zero at the last step; or `constant`.
      warmup_ratio: Share of the steps spent warming up from 0, rounded up.
      warmup_steps: The same as a number of steps; overrides `warmup_ratio`.
      b1: Adam's first decay rate.
      b2: Adam's second decay rate.
      epsilon: Adam's epsilon; with 0 an update may be infinite, and is then skipped.
      weight_decay: Decoupled decay of matrices; biases and norm scales are never decayed.
      clip_norm: Largest global gradient norm; null for no clipping.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    learning_rate: NonNegativeFloat = 2e-5
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: Share = 0.03
    warmup_steps: NonNegativeInt | None = None
    b1: Fraction = 0.9
    b2: Fraction = 0.999
    epsilon: NonNegativeFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    clip_norm: PositiveFloat | None = 1.0

    def __post_init__(self):
        require_fields("optimizer", self)


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters beside the frozen matrices of `model.init`, with the meanings of PEFT's `LoraConfig`.

    Attributes:
      r: Rank of the adapters; null trains without them.
      alpha: An adapter's output is multiplied by `alpha / r`.
      dropout: Share of an adapter's inputs that a training step drops.
      target_modules: Modules that get an adapter: `all-linear`, or a list such as `[q_proj, v_proj]`.
      use_rslora: Whether to multiply by `alpha / sqrt(r)` instead (rsLoRA, arXiv 2312.03732).
    """

    r: PositiveInt | None = None
    alpha: PositiveFloat = 8.0
    dropout: Fraction = 0.0
    target_modules: str | list[str] = ALL_LINEAR
    use_rslora: bool = False

    def __post_init__(self):
        require_fields("lora", self)
        if isinstance(self.target_modules, str) and self.target_modules != ALL_LINEAR:
            raise InputError(
                f"lora.target_modules={self.target_modules!r} is neither {ALL_LINEAR} nor a list; "
                f"write [{self.target_modules}]"
            )
        if not self.target_modules:
            raise InputError(f"lora.target_modules=[] adapts nothing; name modules, or use {ALL_LINEAR}")
        changed = [each.name for each in fields(self) if getattr(self, each.name) != each.default]
        if self.r is None and changed:
            key = changed[0]
            raise InputError(f"lora.{key}={getattr(self, key)} without lora.r; set lora.r, or remove the key")

    @property
    def scale(self) -> float:
        """The factor of the adapters' output."""
        assert self.r
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


@dataclass(frozen=True)
class TrainConfig:
    """The loop.

    Attributes:
      output: Run folder.
      steps: Optimizer steps.
      seed: Seed of weights and data order; from 0 to 4294967295.
      mode: Streams to train: `unified`, `embedding` or `generative`.
      trainable: Patterns of the paths of trained parameters, such as `layers.mlp.*`; the others are frozen, and need
        neither gradient nor optimizer state. With `lora.r` adapters are always trained, and these patterns name what
        else is, such as `*norm*`; the default names nothing then.
      frozen_dtype: Dtype of frozen parameters, in memory and in checkpoints; `auto` is float32, or with `lora.r` the
        dtype of activations (bfloat16, on CPU float32).
      embedding_chunks: Chunks in which a device processes its embedding rows; changes memory, not numbers.
      generative_chunks: The same for the generative rows.
      eval_every: Steps between evaluation losses on `data.validation`; null evaluates after the last step only.
      max_skipped: Number of updates skipped in a row (loss, gradient or update not finite) that stops the run.
      watchdog_seconds: Longest time of a step without compilation and evaluation; beyond it the process dumps the
        stacks of all threads and ends. Null waits forever.
      preemption_notices: Whether a notice of Google Cloud's metadata server saves and stops the run, as SIGTERM does.
    """

    output: str = "run"
    steps: PositiveInt = 1000
    seed: Seed = 0
    mode: Literal["unified", "embedding", "generative"] = "unified"
    trainable: list[str] = field(default_factory=lambda: list(TRAIN_ALL))
    frozen_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    embedding_chunks: PositiveInt = 1
    generative_chunks: PositiveInt = 1
    eval_every: PositiveInt | None = None
    max_skipped: PositiveInt = 5
    watchdog_seconds: Annotated[float, SECONDS] | None = 1800.0
    preemption_notices: bool = True

    def __post_init__(self):
        require_fields("train", self)
        if not self.trainable:
            raise InputError("train.trainable=[] freezes every parameter; name those to train, or remove the key")

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of the streams that are trained."""
        return ("embedding", "generative") if self.mode == "unified" else (self.mode,)


@dataclass(frozen=True)
class ScorecardConfig:
    """A small suite of both skills, measured during a run.

    Attributes:
      suite: Suite file, as for `grit-jax evaluate`; null for none.
      data: Folder to which the suite's paths are relative; null for the suite's own.
      every: Steps between measurements; the last step is always measured.
      embedding_weight: Share of the embedding tasks in `scorecard/both`, from 0 to 1.
    """

    suite: str | None = None
    data: str | None = None
    every: PositiveInt = 500
    embedding_weight: Share = 0.5

    def __post_init__(self):
        require_fields("scorecard", self)


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving. A checkpoint is kept while any of the `keep` settings asks for it.

    Attributes:
      every: Steps between checkpoints; the last step is always saved.
      keep: Number of newest checkpoints to keep.
      keep_every: Keep checkpoints at multiples of this step forever; null for none.
      keep_best: Number of best checkpoints to keep, by `best_metric`.
      best_metric: A metric of metrics.jsonl, such as `validation/loss/generative` or `scorecard/both`; a checkpoint
        whose step lacks it is not among the best.
      best_is: Whether the best is the smallest or the largest value.
      params_every: Steps between checkpoints of only the parameters, all kept, in `params/` of the run folder; they
        take a third of the space and open like any other, but a run cannot resume from them. Null writes none.
      timeout_seconds: How long hosts wait for each other to save before the run ends.
    """

    every: PositiveInt = 500
    keep: PositiveInt = 2
    keep_every: PositiveInt | None = None
    keep_best: NonNegativeInt = 0
    best_metric: str | None = None
    best_is: Literal["smallest", "largest"] = "smallest"
    params_every: PositiveInt | None = None
    timeout_seconds: Annotated[int, SECONDS] = 1200

    def __post_init__(self):
        require_fields("checkpoint", self)
        if bool(self.keep_best) != bool(self.best_metric):
            given = f"checkpoint.keep_best={self.keep_best} and checkpoint.best_metric={self.best_metric}"
            raise InputError(f"{given}: give both or neither")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one of them may be -1 to take the rest.

    Attributes:
      data: Replicas of the weights.
      fsdp: Shards of every weight, batch split too.
      tensor: Shards of heads, MLP and vocabulary.
      expert: Groups that split the experts of each layer, batch split too.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    expert: int = 1


COPIES = MeshConfig(data=-1, fsdp=1)  # whole weights on each device, or on each group along `tensor` or `expert`


@dataclass(frozen=True)
class LoggingConfig:
    """Measurements besides the losses, and where metrics go besides metrics.jsonl.

    Attributes:
      tensorboard: Write TensorBoard events into the run folder (needs the `tensorboard` extra).
      wandb: Weights & Biases project; null for none (needs the `wandb` extra).
      trackio: trackio project; null for none (needs the `trackio` extra).
      every: Steps between lines when the output is not a terminal.
      details_every: Steps between measurements of embedding health and of each generative file's loss; null for none.
      gradient_ratio_every: Steps between measurements of each objective's gradient norm, which cost about one step
        each; null for none.
      spike_threshold: Robust z-score at which a loss counts as a spike; null to detect none.
      profile: First and last step that the profiler traces into the run folder; null for none.
    """

    tensorboard: bool = False
    wandb: str | None = None
    trackio: str | None = None
    every: PositiveInt = 10
    details_every: PositiveInt | None = 10
    gradient_ratio_every: PositiveInt | None = None
    spike_threshold: PositiveFloat | None = 6.0
    profile: list[int] | None = None

    def __post_init__(self):
        require_fields("logging", self)
        if self.profile is not None and (len(self.profile) != 2 or not 1 <= self.profile[0] <= self.profile[1]):
            raise InputError(f"logging.profile={self.profile} must be the first and the last step, such as [10, 12]")


@dataclass(frozen=True)
class DistributedConfig:
    """The processes of a run. On TPU they find each other; elsewhere these settings tell them how.

    Attributes:
      coordinator: `host:port` of the first process; null for a single process, and on TPU.
      num_processes: Number of processes.
      process_id: Index of this process.
      timeout_seconds: Seconds of a process's silence after which the others give up.
    """

    coordinator: str | None = None
    num_processes: PositiveInt | None = None
    process_id: NonNegativeInt | None = None
    timeout_seconds: Annotated[int, SECONDS] = 30

    def __post_init__(self):
        require_fields("distributed", self)
        for name in ("num_processes", "process_id"):
            if (getattr(self, name) is None) != (self.coordinator is None):
                raise InputError(
                    f"distributed.{name}={getattr(self, name)} and distributed.coordinator={self.coordinator}: give "
                    "coordinator, num_processes and process_id together, or none of them"
                )
        if self.num_processes is not None and (self.process_id or 0) >= self.num_processes:
            raise InputError(
                f"distributed.process_id={self.process_id} must be from 0 to {self.num_processes - 1}, below "
                "distributed.num_processes"
            )


@dataclass(frozen=True)
class Config:
    """The settings of one run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    scorecard: ScorecardConfig = field(default_factory=ScorecardConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    def __post_init__(self):
        if (self.optimizer.warmup_steps or 0) > self.train.steps:
            raise InputError(
                f"optimizer.warmup_steps={self.optimizer.warmup_steps} is over train.steps={self.train.steps}; "
                "lower it, or the learning rate never reaches its peak"
            )
        weights = {f"loss.{name}_weight": getattr(self.loss, f"{name}_weight") for name in self.train.streams}
        if not any(weights.values()):
            given = " and ".join(f"{key}={weight}" for key, weight in weights.items())
            raise InputError(f"{given} with train.mode={self.train.mode}: nothing would be trained; raise one of them")
        if self.lora.r is not None and not self.model.init:
            raise InputError(
                f"lora.r={self.lora.r} without model.init: adapters need a base; name it, or remove lora.r"
            )


def _require_counts(key: str, counts: dict[str, int]) -> None:
    for name, count in counts.items():
        require(f"{key}.{name}", count, NOT_NEGATIVE, "use 0 to leave the file out")
