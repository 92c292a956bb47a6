"""Every setting of a run: frozen dataclasses, one per section of a config file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from grit_jax.config.architecture import EmbeddingConfig, TransformerConfig
from grit_jax.config.ranges import (
    BELOW_ONE,
    NOT_NEGATIVE,
    POSITIVE,
    SECONDS,
    SEED,
    SHARE,
    require,
    require_fields,
)
from grit_jax.errors import InputError

AttentionKernel = Literal["dense", "blockwise", "splash", "cudnn"]
ExpertKernel = Literal["ragged_dot", "megablox"]
Remat = Literal["none", "full", "dots", "offload"]
Negatives = Literal["auto", "dense", "gathered", "ring"]


@dataclass(frozen=True)
class ModelConfig:
    """What is trained and in which precision.

    Attributes:
      init: Run folder, checkpoint or Hugging Face folder to start from; null trains from scratch.
      tokenizer: Folder, `tokenizer.json` or `bytes`; null takes the tokenizer of `init`, or bytes from scratch.
      architecture: Shape of a model trained from scratch; with `init` the shape comes from there.
      embedding: Embedding pass and pooling.
      compute_dtype: Type of activations; `auto` is float32 on CPU and bfloat16 elsewhere. Weights stay float32.
      attention_kernel: `dense`, `blockwise` (CPU), `splash` (TPU), `cudnn` (GPU), or `auto` for the device's own.
      expert_kernel: What multiplies tokens sorted by expert: `ragged_dot`, `megablox` (TPU), or `auto` for the device's
        own.
      remat: What a layer recomputes in the backward pass: `none`; `full`, all but its input; `dots`, all but matrix
        products and attention; `offload`, like `full` with the inputs kept in the host's memory.
      layer_rows: Most rows of a device that go through a layer at once; null takes all. What lives inside a layer
        follows it; weights are gathered and gradients reduced once per layer all the same.
    """

    init: str | None = None
    tokenizer: str | None = None
    architecture: TransformerConfig = field(default_factory=TransformerConfig)
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    attention_kernel: Literal["auto"] | AttentionKernel = "auto"
    expert_kernel: Literal["auto"] | ExpertKernel = "auto"
    remat: Remat = "full"
    layer_rows: int | None = None

    def __post_init__(self):
        require_fields("model", self, layer_rows=POSITIVE)


@dataclass(frozen=True)
class StageConfig:
    """A stage of a curriculum: a range of steps with its own choice of files.

    Inside a stage no record is used twice before all of its file are used once; the next stage starts anew.

    Attributes:
      steps: Its length; null for the last stage, which goes on to the end.
      files: Names of the files it takes, such as `a.jsonl` or `easy-*`; empty for all of `data.train`.
      num_samples: Samples an epoch takes from a file, on top of `data.num_samples`.
    """

    steps: int | None = None
    files: list[str] = field(default_factory=list)
    num_samples: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class DataConfig:
    """Training data and how it is cut into batches.

    Attributes:
      train: File or folder, or a list of them, on a disk or in a bucket; folders are searched for .jsonl, .jsonl.gz,
        .jsonl.zst, .array_record and .arrayrecord.
      validation: The same, for evaluation losses.
      held_out: Share of the records of `train` that are never trained on and are evaluated with `validation`. Chosen by
        the query or the conversation, so that records that ask the same stay together.
      skip_bad: Whether malformed records are left out, counted and reported; without, the first one stops the run.
      num_samples: Samples an epoch takes from a file, by file name; files not named are used whole.
      curriculum: Stages with their own files, one after the other; empty for all files all the time.
      query_max_length: Limit of a query with its instruction, in tokens.
      passage_max_length: Limit of a passage with its instruction, in tokens.
      generative_max_length: Limit of a conversation, in tokens.
      group_size: Passages per query: one positive and `group_size - 1` hard negatives.
      embedding_batch: Queries per step, over all devices.
      generative_batch: Conversations per step, over all devices.
      packing: Whether a row holds many texts (true) or one.
      row_buckets: Most row counts per stream that steps are rounded up to; each one is a compile.
      exclude_duplicates: Whether passages equal to the query's own positive, and positives of equal queries, are left
        out of its negatives.
    """

    train: str | list[str] = field(default_factory=list)
    validation: str | list[str] = field(default_factory=list)
    held_out: float = 0.0
    skip_bad: bool = False
    num_samples: dict[str, int] = field(default_factory=dict)
    curriculum: list[StageConfig] = field(default_factory=list)
    query_max_length: int = 256
    passage_max_length: int = 2048
    generative_max_length: int = 2048
    group_size: int = 2
    embedding_batch: int = 32
    generative_batch: int = 32
    packing: bool = True
    row_buckets: int = 4
    exclude_duplicates: bool = False

    def __post_init__(self):
        require_fields(
            "data",
            self,
            query_max_length=POSITIVE,
            passage_max_length=POSITIVE,
            generative_max_length=POSITIVE,
            group_size=POSITIVE,
            embedding_batch=POSITIVE,
            generative_batch=POSITIVE,
            row_buckets=POSITIVE,
            held_out=BELOW_ONE,
        )
        _require_counts("data.num_samples", self.num_samples)
        for number, stage in enumerate(self.curriculum):
            last = number == len(self.curriculum) - 1
            if (stage.steps is None) != last:
                what = (
                    "goes on to the end: leave its steps out" if last else "has no steps; only the last stage goes on"
                )
                raise InputError(f"data.curriculum[{number}] {what}")
            require(f"data.curriculum[{number}].steps", stage.steps, POSITIVE)
            _require_counts(f"data.curriculum[{number}].num_samples", stage.num_samples)

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
        with a share of every device's passages), `ring` (each device's passages sent round) or `auto`, by size. The
        numbers do not depend on it, memory does.
      embedding_weight: Factor of the contrastive loss.
      generative_weight: Factor of the LM loss.
      router_weight: Factor of the experts' balance loss in the generative pass.
      embedding_router_weight: The same in the embedding pass; 0 reports it only.
    """

    type: Literal["mixed", "token", "token_mean"] = "mixed"
    sub_batch_samples: int | None = 32
    temperature: float = 0.02
    negatives: Negatives = "auto"
    embedding_weight: float = 1.0
    generative_weight: float = 1.0
    router_weight: float = 0.02
    embedding_router_weight: float = 0.0

    def __post_init__(self):
        require_fields(
            "loss",
            self,
            temperature=POSITIVE,
            sub_batch_samples=POSITIVE,
            embedding_weight=NOT_NEGATIVE,
            generative_weight=NOT_NEGATIVE,
            router_weight=NOT_NEGATIVE,
            embedding_router_weight=NOT_NEGATIVE,
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer and learning-rate schedule.

    Attributes:
      name: `adamw` or plain `sgd`.
      learning_rate: Peak rate.
      schedule: Decay after warm-up: `linear` or `cosine`, to zero at the last step; or `constant`.
      warmup_ratio: Share of the steps spent warming up from 0, rounded up.
      warmup_steps: The same as a number of steps; wins over `warmup_ratio`.
      b1: Adam's first decay rate.
      b2: Adam's second decay rate.
      epsilon: Adam's epsilon; with 0 an update may be infinite, and is skipped then.
      weight_decay: Decoupled decay of matrices; biases and norm scales are never decayed.
      clip_norm: Largest global gradient norm; null for no clipping.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 2e-5
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: float = 0.03
    warmup_steps: int | None = None
    b1: float = 0.9
    b2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0

    def __post_init__(self):
        require_fields(
            "optimizer",
            self,
            learning_rate=NOT_NEGATIVE,
            warmup_ratio=SHARE,
            warmup_steps=NOT_NEGATIVE,
            b1=BELOW_ONE,
            b2=BELOW_ONE,
            epsilon=NOT_NEGATIVE,
            weight_decay=NOT_NEGATIVE,
            clip_norm=POSITIVE,
        )


@dataclass(frozen=True)
class TrainConfig:
    """The loop.

    Attributes:
      output: Run folder.
      steps: Optimizer steps.
      seed: Seed of weights and data order; from 0 to 4294967295.
      mode: Streams that are trained: `unified`, `embedding` or `generative`.
      trainable: Parameters that are trained, by patterns for their paths in which `*` stands for anything, such as
        `layers.mlp.*`; the others are frozen, and need neither gradient nor optimizer state.
      frozen_dtype: Type that frozen parameters are kept in, in memory and in checkpoints.
      embedding_chunks: Pieces the embedding rows are processed in; the numbers do not depend on it, memory does.
      generative_chunks: The same for the generative rows.
      eval_every: Steps between evaluation losses on `data.validation`; null evaluates after the last step only.
      max_skipped: Updates in a row that may be skipped because loss, gradient or update is not finite; then the run
        stops.
      watchdog_seconds: Longest time of a step, compiling and evaluation left out; beyond, the process says where every
        thread is and ends. null waits for ever.
      preemption_notices: Whether, on Google Cloud, the machine's metadata server is listened to: what it says of the
        machine's end saves and stops the run, as SIGTERM does.
    """

    output: str = "run"
    steps: int = 1000
    seed: int = 0
    mode: Literal["unified", "embedding", "generative"] = "unified"
    trainable: list[str] = field(default_factory=lambda: ["*"])
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"
    embedding_chunks: int = 1
    generative_chunks: int = 1
    eval_every: int | None = None
    max_skipped: int = 5
    watchdog_seconds: float | None = 1800.0
    preemption_notices: bool = True

    def __post_init__(self):
        require_fields(
            "train",
            self,
            steps=POSITIVE,
            seed=SEED,
            embedding_chunks=POSITIVE,
            generative_chunks=POSITIVE,
            eval_every=POSITIVE,
            max_skipped=POSITIVE,
            watchdog_seconds=SECONDS,
        )
        if not self.trainable:
            raise InputError(
                "train.trainable=[]: every parameter would be frozen; name those that are trained, or remove the key"
            )

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of the streams that are trained."""
        return ("embedding", "generative") if self.mode == "unified" else (self.mode,)


@dataclass(frozen=True)
class ScorecardConfig:
    """A small suite of both skills that is measured while a run goes on.

    Attributes:
      suite: Suite file, such as `grit-jax evaluate` takes; null for none.
      data: Folder that the suite's paths are relative to; null for the suite's own.
      every: Steps between measurements; the last step is measured too.
      embedding_weight: Share of the embedding tasks in `scorecard/both`, from 0 to 1.
    """

    suite: str | None = None
    data: str | None = None
    every: int = 500
    embedding_weight: float = 0.5

    def __post_init__(self):
        require_fields("scorecard", self, every=POSITIVE, embedding_weight=SHARE)


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving. A checkpoint is kept while any of the `keep` settings asks for it.

    Attributes:
      every: Steps between checkpoints; the last step is always saved.
      keep: Newest checkpoints that are kept.
      keep_every: Checkpoints of steps that are multiples of it are kept for ever; null keeps none for that.
      keep_best: Best checkpoints that are kept, by `best_metric`.
      best_metric: A metric of metrics.jsonl, for example `validation/loss/generative` or `scorecard/both`; a checkpoint
        whose step was not evaluated has none, and is not among the best.
      best_is: Whether the best is the smallest or the largest value.
      params_every: Steps between checkpoints of the parameters alone, all kept, in `params/` of the run folder; they
        take a third of the space, open like any other and cannot be resumed from. Null writes none.
      timeout_seconds: How long hosts wait for each other to save: one whose disk is full, or slow, ends the run then.
    """

    every: int = 500
    keep: int = 2
    keep_every: int | None = None
    keep_best: int = 0
    best_metric: str | None = None
    best_is: Literal["smallest", "largest"] = "smallest"
    params_every: int | None = None
    timeout_seconds: int = 1200

    def __post_init__(self):
        require_fields(
            "checkpoint",
            self,
            every=POSITIVE,
            keep=POSITIVE,
            keep_every=POSITIVE,
            keep_best=NOT_NEGATIVE,
            params_every=POSITIVE,
            timeout_seconds=SECONDS,
        )
        if bool(self.keep_best) != bool(self.best_metric):
            raise InputError(
                f"checkpoint.keep_best={self.keep_best} and checkpoint.best_metric={self.best_metric}: give both or "
                "neither"
            )


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one of them may be -1 to take what is left.

    Attributes:
      data: Replicas of the weights.
      fsdp: Shards of every weight, batch split too.
      tensor: Shards of heads, MLP and vocabulary.
      expert: Groups that share out the experts of each layer, batch split too.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    expert: int = 1


COPIES = MeshConfig(data=-1, fsdp=1)  # the weights whole on each device, or on each group of `tensor` or `expert` ones


@dataclass(frozen=True)
class LoggingConfig:
    """What is measured beside the losses, and where metrics go beside metrics.jsonl.

    Attributes:
      tensorboard: Write TensorBoard events into the run folder (needs the `tensorboard` extra).
      wandb: Weights & Biases project; null for none (needs the `wandb` extra).
      trackio: trackio project; null for none (needs the `trackio` extra).
      every: Steps between lines on a plain (not terminal) output.
      details_every: Steps between measurements of the embeddings' health and of each generative file's loss; null for
        none.
      gradient_ratio_every: Steps between measurements of each objective's own gradient norm, each of which costs about
        one more step; null for none.
      spike_threshold: Robust z-score from which on a loss is reported as a spike; null for no reports.
      profile: First and last step that the profiler traces into the run folder; null for none.
    """

    tensorboard: bool = False
    wandb: str | None = None
    trackio: str | None = None
    every: int = 10
    details_every: int | None = 10
    gradient_ratio_every: int | None = None
    spike_threshold: float | None = 6.0
    profile: list[int] | None = None

    def __post_init__(self):
        require_fields(
            "logging",
            self,
            every=POSITIVE,
            details_every=POSITIVE,
            gradient_ratio_every=POSITIVE,
            spike_threshold=POSITIVE,
        )
        if self.profile is not None and (len(self.profile) != 2 or not 1 <= self.profile[0] <= self.profile[1]):
            raise InputError(
                f"logging.profile={self.profile} is no window of steps; give the first and the last, such as [10, 12]"
            )


@dataclass(frozen=True)
class DistributedConfig:
    """The processes of a run. On TPU they find each other by themselves; elsewhere each is told here.

    Attributes:
      coordinator: `host:port` of the first process; null where there is one process, and on TPU.
      num_processes: How many there are.
      process_id: Number of this one, from 0.
      timeout_seconds: How long a process may be silent before the others give up.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    timeout_seconds: int = 30

    def __post_init__(self):
        require_fields("distributed", self, num_processes=POSITIVE, process_id=NOT_NEGATIVE, timeout_seconds=SECONDS)
        given = {"num_processes": self.num_processes, "process_id": self.process_id}
        for name, value in given.items():
            if (value is None) != (self.coordinator is None):
                raise InputError(
                    f"distributed.{name}={value} and distributed.coordinator={self.coordinator}: give coordinator, "
                    "num_processes and process_id together, or none of them"
                )
        if self.num_processes is not None and not 0 <= (self.process_id or 0) < self.num_processes:
            raise InputError(
                f"distributed.process_id={self.process_id} is not from 0 to {self.num_processes - 1}, below "
                "distributed.num_processes"
            )


@dataclass(frozen=True)
class Config:
    """One run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    scorecard: ScorecardConfig = field(default_factory=ScorecardConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    def __post_init__(self):
        if (self.optimizer.warmup_steps or 0) > self.train.steps:
            raise InputError(
                f"optimizer.warmup_steps={self.optimizer.warmup_steps} is over train.steps={self.train.steps}; "
                "lower it, the learning rate never reaches its peak otherwise"
            )
        weights = {f"{name}_weight": getattr(self.loss, f"{name}_weight") for name in self.train.streams}
        if not any(weights.values()):
            given = " and ".join(f"loss.{name}={value}" for name, value in weights.items())
            raise InputError(f"{given} with train.mode={self.train.mode}: nothing would be trained; raise one of them")


def _require_counts(key: str, counts: dict[str, int]) -> None:
    for name, count in counts.items():
        require(f"{key}.{name}", count, NOT_NEGATIVE, "use 0 to leave the file out")
