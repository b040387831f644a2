"""What a user decides before training starts: frozen dataclasses by composition, checked at construction.

What depends on the model (which layouts divide it) is `check_layout`'s, and needs its spec but no weights. Knows no
file (`rayllm.train.config_file` reads TOML) and no torch.
"""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from rayllm.core.errors import ConfigError
from rayllm.models.spec import DecoderSpec
from rayllm.parallel import plan

ScheduleKind = Literal["constant", "cosine", "wsd"]
DType = Literal["float32", "bfloat16"]
KlEstimator = Literal["k1", "k3"]
LoraTarget = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PreferenceLoss = Literal["sigmoid", "robust", "hinge", "ipo_sum", "ipo_mean", "simpo"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """`start`: a checkpoint (directory, hub name, embedded model) whose weights training starts from; with `random`
    only its config.json and tokenizer are taken, and the weights are drawn from `seed`.

    Weights, their optimizer state and the sum of gradients are float32 always. `compute_dtype` is that of the forward
    and backward pass; `save_dtype` that of the Hugging Face weights in a checkpoint. `recompute`: a block's activations
    are computed again in the backward pass instead of being kept.
    """

    start: str
    random: bool = False
    seed: int = 0
    compute_dtype: DType = "float32"
    save_dtype: DType = "float32"
    recompute: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Adapters of `rank` beside the matrices called `targets`, and `alpha` / `rank` of what they give is added; the
    start model's weights stay what they are. Rank 0: none, and all weights learn. A reward model's or a value head,
    which begins from nothing, learns whole."""

    rank: int = 0
    alpha: float = 32.0
    targets: tuple[LoraTarget, ...] = get_args(LoraTarget)

    def __post_init__(self) -> None:
        _not_negative(self, "lora", "rank")
        _positive(self, "lora", "alpha")
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ConfigError(f"lora.targets: {list(self.targets)} must name at least one matrix, and each once")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """`path`: a file or folder that the recipe reads. `seed` says in which order; each epoch has one of its own."""

    path: str
    seed: int = 0

    def __post_init__(self) -> None:
        _not_negative(self, "data", "seed")


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchConfig:
    """`tokens` of one optimizer step over all ranks, padding included, in rows of `sequence_length`; a rank takes
    `rows` of them at a time. How often it does (gradient accumulation) follows from the layout.

    Of preference pairs a row is a pair, whose prompt with either answer is of at most `sequence_length` tokens: a step
    takes `tokens / sequence_length` pairs, however long they are and however much of them both answers share. Of
    prompts a row is a prompt with its answer."""

    sequence_length: int
    tokens: int
    rows: int = 1

    def __post_init__(self) -> None:
        _positive(self, "batch", "sequence_length", "tokens", "rows")
        if self.sequence_length < 2:
            raise ConfigError("batch.sequence_length: 1 token has no token before it to predict it")
        if self.tokens % self.sequence_length:
            raise ConfigError(
                f"batch.tokens: {self.tokens} is not a multiple of batch.sequence_length {self.sequence_length}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019). Matrices decay; norms, biases and embeddings (a tied head is one) do not.

    `max_grad_norm`: gradients are scaled down to this norm over the whole model; 0: never.
    """

    learning_rate: float
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        _positive(self, "optimizer", "learning_rate", "eps")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optimizer.{name}: {getattr(self, name)} is not in [0, 1)")
        _not_negative(self, "optimizer", "weight_decay", "max_grad_norm")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """The learning rate over `steps` optimizer steps: up from 0 in `warmup_steps`, then as `kind` says.

    cosine: half a cosine down to `final` of the peak. wsd ("warmup, stable, decay"): constant, and in the last
    `decay_steps` down to `final` of the peak by 1 - sqrt (Hägele et al. 2024). constant: no decay.
    """

    steps: int
    kind: ScheduleKind = "cosine"
    warmup_steps: int = 0
    decay_steps: int = 0
    final: float = 0.0

    def __post_init__(self) -> None:
        _positive(self, "schedule", "steps")
        if not 0 <= self.final <= 1:
            raise ConfigError(f"schedule.final: {self.final} is not in [0, 1]")
        if self.kind == "constant" and self.final:
            raise ConfigError("schedule.final: constant does not decay; only cosine and wsd do")
        if self.warmup_steps < 0 or self.decay_steps < 0:
            raise ConfigError("schedule: warmup_steps and decay_steps must not be negative")
        if self.kind == "wsd" and self.decay_steps == 0:
            raise ConfigError("schedule.decay_steps: wsd needs to know in how many steps it decays")
        if self.kind != "wsd" and self.decay_steps:
            raise ConfigError(f"schedule.decay_steps: {self.kind} has none; only wsd has")
        if self.warmup_steps + self.decay_steps > self.steps:
            raise ConfigError(
                f"schedule: {self.warmup_steps} warmup and {self.decay_steps} decay steps"
                f" are more than the {self.steps} steps there are"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class LayoutConfig:
    """How many ranks share the work, and how; their product is the number of workers.

    The data is split over `replicate` x `shard`. `replicate` groups hold the whole model each, and inside a group
    `shard` ranks hold a part of every weight: (n, 1) is DDP, (1, n) FSDP, and both above 1 HSDP. `tensor` ranks hold a
    slice of every matrix, `pipeline` stages some of the layers, by the plan that serving uses.

    `min_replicate`: where there is no room for all groups, the run starts, or goes on after a failure, with as many as
    there is room for, this many at least; 0: with all of them or not at all.
    """

    replicate: int = 1
    min_replicate: int = 0
    shard: int = 1
    tensor: int = 1
    pipeline: int = 1

    def __post_init__(self) -> None:
        _positive(self, "layout", "replicate", "shard", "tensor", "pipeline")
        if not 0 <= self.min_replicate <= self.replicate:
            raise ConfigError(f"layout.min_replicate: {self.min_replicate} is not in 0 to replicate, {self.replicate}")

    @property
    def data(self) -> int:
        """Ranks that see data of their own."""
        return self.replicate * self.shard

    @property
    def world(self) -> int:
        return self.data * self.tensor * self.pipeline


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """One at the end, and one after each `every_steps` steps; 0: none but the last.

    The newest `keep_last` are kept, and beside them the `keep_best` with the lowest loss, of PPO with the highest
    reward, in the mean of the steps since the checkpoint before.
    """

    every_steps: int = 0
    keep_last: int = 2
    keep_best: int = 0

    def __post_init__(self) -> None:
        _positive(self, "checkpoint", "keep_last")
        if self.every_steps < 0 or self.keep_best < 0:
            raise ConfigError("checkpoint: every_steps and keep_best must not be negative")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """`tasks` of `rayllm eval` on the model under training: before the first step, after each `every_steps` (0: none
    between) and after the last. `data`: a folder of documents; "": the hub. `limit`: the first documents of each
    subject."""

    tasks: tuple[str, ...] = ()
    data: str = ""
    every_steps: int = 0
    num_fewshot: int | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        _not_negative(self, "evaluation", "every_steps")
        if self.num_fewshot is not None:
            _not_negative(self, "evaluation", "num_fewshot")
        if self.limit is not None:
            _positive(self, "evaluation", "limit")
        if not self.tasks and any((self.data, self.every_steps, self.num_fewshot, self.limit)):
            raise ConfigError("evaluation.tasks: names no task")


@dataclass(frozen=True, kw_only=True, slots=True)
class DpoConfig:
    """What preference pairs are learnt by; `rayllm.train.losses.dpo` says what each of these means and which go
    together."""

    loss: PreferenceLoss = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    gamma: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class PpoConfig:
    """How a policy learns from the rewards of its own answers.

    A rollout: `minibatches` x as many prompts as a step has rows are answered, in at most `answer_tokens` each, by the
    policy itself (temperature 1, nothing cut off). All answers are learnt from in `epochs` passes of `minibatches`
    steps; then comes the next rollout. `reward_model`: what `rayllm train rm` made, scores a whole answer; one that is
    cut off before its end gets `unfinished_penalty` less. `rayllm.train.losses.ppo` says what the others mean.
    """

    reward_model: str = ""
    answer_tokens: int = 64
    minibatches: int = 4
    epochs: int = 2
    unfinished_penalty: float = 0.0
    kl_coef: float = 0.05
    kl_estimator: KlEstimator = "k1"
    gamma: float = 1.0
    lam: float = 0.95
    clip_low: float = 0.2
    clip_high: float = 0.2
    value_clip: float = 0.2
    value_coef: float = 0.1

    def __post_init__(self) -> None:
        _positive(self, "ppo", "answer_tokens", "minibatches", "epochs", "clip_low", "clip_high", "value_clip")
        if self.clip_low > 1:
            raise ConfigError(f"ppo.clip_low: {self.clip_low} is more than 1, and no ratio is below 0")
        _not_negative(self, "ppo", "unfinished_penalty", "kl_coef", "value_coef")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"ppo.{name}: {getattr(self, name)} is not in [0, 1]")

    @property
    def steps_per_rollout(self) -> int:
        return self.epochs * self.minibatches


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplesConfig:
    """`prompts` that the model answers before the run and after it, with at most `max_tokens` each; `chat`: each is
    what a user says, by the tokenizer's template, and not the beginning of a text."""

    prompts: tuple[str, ...] = ()
    chat: bool = False
    max_tokens: int = 64

    def __post_init__(self) -> None:
        _positive(self, "samples", "max_tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class MlflowConfig:
    """`tracking_uri`: of the MLflow server that is told of the run, or whatever else MLflow takes for one; "": none.
    `experiment`: made where there is none of that name."""

    tracking_uri: str = ""
    experiment: str = "Default"

    def __post_init__(self) -> None:
        if not self.tracking_uri and self.experiment != "Default":
            raise ConfigError("mlflow.tracking_uri: names no server")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """`run`: the folder that takes checkpoints and metrics; on a cluster one that all nodes share. A run that is
    started again goes on from its last checkpoint. `restarts`: how often it does so by itself where a worker is lost.
    """

    run: str
    model: ModelConfig
    data: DataConfig
    batch: BatchConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    lora: LoraConfig = field(default_factory=LoraConfig)
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    dpo: DpoConfig = field(default_factory=DpoConfig)
    ppo: PpoConfig = field(default_factory=PpoConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    mlflow: MlflowConfig = field(default_factory=MlflowConfig)
    restarts: int = 3

    def __post_init__(self) -> None:
        if self.restarts < 0:
            raise ConfigError(f"restarts: {self.restarts} is negative")
        rows = self.batch.tokens // self.batch.sequence_length
        if rows % (self.batch.rows * self.layout.data):
            raise ConfigError(
                f"batch.tokens: {rows} rows of {self.batch.sequence_length} tokens do not divide into"
                f" batch.rows {self.batch.rows} x {self.layout.data} ranks with data of their own"
            )

    @property
    def replicates(self) -> list[int]:
        """How many groups the run may have: those numbers that divide the rows of a step among them."""
        least = self.layout.min_replicate or self.layout.replicate
        rows = self.batch.tokens // (self.batch.sequence_length * self.batch.rows * self.layout.shard)
        return [number for number in range(least, self.layout.replicate + 1) if rows % number == 0]

    @property
    def micro_steps(self) -> int:
        """Micro-batches of a rank in one optimizer step."""
        return self.batch.tokens // (self.batch.sequence_length * self.batch.rows * self.layout.data)


def check_layout(spec: DecoderSpec, layout: LayoutConfig) -> None:
    """Raises ConfigError where the model cannot be trained so.

    Training splits less than serving does: a key/value head that several ranks held, or a vocabulary padded to divide,
    would have copies and rows that the optimizer must not see.
    """
    plan.check_layout(spec, layout.tensor, layout.pipeline)
    if spec.num_kv_heads % layout.tensor:
        raise ConfigError(
            f"layout.tensor: {layout.tensor} does not divide the model's {spec.num_kv_heads} key/value heads"
        )
    if spec.vocab_size % layout.tensor:
        raise ConfigError(f"layout.tensor: {layout.tensor} does not divide the vocabulary of {spec.vocab_size} tokens")


def _positive(config: object, table: str, *names: str) -> None:
    for name in names:
        if not 0 < (value := getattr(config, name)) < math.inf:
            raise ConfigError(f"{table}.{name}: {value} is not {'finite' if value == math.inf else 'positive'}")


def _not_negative(config: object, table: str, *names: str) -> None:
    for name in names:
        if not 0 <= (value := getattr(config, name)) < math.inf:
            raise ConfigError(f"{table}.{name}: {value} is {'not finite' if value == math.inf else 'negative'}")


NO_ADAPTERS = LoraConfig()
