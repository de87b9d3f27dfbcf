"""The configuration of a run: one tree of frozen pydantic sections, each field with its meaning.

What one field allows is said here. What several fields, the DeepSpeed file, the number of ranks or the machine demand
of each other is in `checks.py` and `deepspeed_file.py`.
"""

import itertools
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, PrivateAttr

from mmrec_train.config.marked_yaml import Mark, Marked
from mmrec_train.errors import UserError

if TYPE_CHECKING:
    from mmrec_train.model.configuration import MMRecConfig

VOCABULARY_MULTIPLE = 64  # a vocabulary taken from the data set is rounded up to it: whole GEMM tiles, equal shards

Count = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=1e-9, le=1e9)]  # as in a manifest
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
PathText = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]
# A strict tuple would refuse the lists that YAML gives; its elements stay strict.
HalfLives = Annotated[tuple[Positive, Positive], Field(strict=False)]
Betas = Annotated[tuple[Beta, Beta], Field(strict=False)]


def _every_kth_layer(value: Any) -> Any:
    if value in ("none", "full") or (type(value) is int and value >= 1):
        return value
    raise ValueError("must be 'none', 'full' or a number k ≥ 1 (every k-th layer)")


def _set_names(value: dict[str, Any] | None) -> dict[str, Any] | None:
    """A validation set's name is a part of the names of its metrics, between slashes."""
    for name in value or ():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            raise ValueError(f"a set's name is made of letters, digits, _ . and -, unlike {name!r}")
    return value


def _sequence_len(value: Any) -> Any:
    """`data.sequence_len` with its curriculum checked and every stage named: {step, tokens}."""
    if value is None or _is_count(value):
        return value
    stages = value if isinstance(value, list | tuple) else []
    right = [
        isinstance(stage, dict)
        and stage.keys() == {"step", "tokens"}
        and type(stage["step"]) is int
        and (stage["tokens"] is None or _is_count(stage["tokens"]))
        for stage in stages
    ]
    if not right or not all(right):
        raise ValueError(
            "must be null, a number of tokens ≥ 1, or a list of stages {step: STEP, tokens: TOKENS or null}"
        )
    steps = [stage["step"] for stage in stages]
    if steps[0] != 0 or any(later <= earlier for earlier, later in itertools.pairwise(steps)):
        raise ValueError("the first stage must be that of step 0, and steps must rise")
    return [dict(stage) for stage in stages]


def _not_empty(value: dict[str, Any] | None) -> dict[str, Any] | None:
    if value == {}:
        raise ValueError("must name a source, or be null for all of them")
    return value


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelSection(Section):
    """Shape of the model: a preset, and what differs from it."""

    preset: Literal["tiny", "125m", "350m", "1b", "7b"] = Field(description="named size that the other keys override")
    vocab_size: Count | None = Field(
        None, description="entries of the vocabulary; null: the data set's, rounded up to 64"
    )
    hidden_dim: Count | None = Field(None, description="width of the residual stream, D; divisible by num_heads")
    num_layers: Count | None = Field(None, description="blocks, L")
    num_heads: Count | None = Field(None, description="heads of the memory read, H; divisible by num_memories")
    num_memories: Count | None = Field(None, description="long-term memory banks, R")
    memory_slots: Count | None = Field(None, description="slots of each bank, M")
    segment_len: Count | None = Field(None, description="tokens that are pooled into one slot, S")
    short_window: Index | None = Field(None, description="tokens of the short-term bank, W; 0 turns it off")
    ffn_dim: Count | None = Field(None, description="inner width of the feed-forward")
    gate: Literal["dense", "headwise", "none"] | None = Field(None, description="the recurrence's gate matrix W_g")
    decay_half_life: HalfLives | None = Field(
        None, description="[shortest, longest] half-life of a channel at initialisation, in tokens"
    )
    decay_init: float | None = Field(None, description="one decay γ for all channels instead of half-lives")
    dropout: float | None = Field(None, description="dropout of the mixer's and the feed-forward's output")
    read: Literal["dense", "topk"] | None = Field(None, description="slots a token attends: all, or the best pages")
    topk_blocks: Count | None = Field(None, description="read topk: nodes a head descends into, and pages it reads")
    memory_across_documents: bool | None = Field(None, description="keep slots visible beyond a document's end")
    tie_word_embeddings: bool | None = Field(None, description="share the embedding with the output head")
    solver_tolerance: float | None = Field(None, description="relative change at which the recurrence's solver stops")
    solver_max_iterations: Count | None = Field(None, description="solver iterations before the sequential fallback")

    def to_model_config(self, vocab_size: int | None) -> "MMRecConfig":
        """The model's configuration.

        `vocab_size` is the data set's number of token ids. It sizes the vocabulary (rounded up to a multiple of 64)
        unless `model.vocab_size` does; where both are None, the preset's vocabulary stays.
        Raises UserError on a vocabulary smaller than the data set's and on impossible shapes.
        """
        # Imported here because transformers takes seconds, which a misspelt key should not.
        from mmrec_train.model.configuration import MMRecConfig

        values = {name: value for name, value in self if name != "preset" and value is not None}
        if vocab_size is not None:
            values.setdefault("vocab_size", -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE)
            if values["vocab_size"] < vocab_size:
                raise UserError(
                    f"model.vocab_size is {self.vocab_size}, but the data set has {vocab_size} token ids; "
                    "raise it, or leave it out to take the data set's"
                )
        try:
            return MMRecConfig.from_preset(self.preset, **values)
        except ValueError as error:
            raise UserError(f"model: {error}") from error


class SourceSection(Section):
    """How much is read of one source of the data set."""

    weight: Weight | None = Field(None, description="relative share of the tokens; null: the data set's own weight")
    epochs: Count | None = Field(None, description="passes over the source, which then is exhausted; null: without end")


class DataSection(Section):
    """What is trained on, and in which order."""

    path: PathText = Field(description="folder made by launch/prepare_data.py, or the URL of one")
    chunk_len: Count = Field(8192, description="tokens of a lane at a time; memory is carried to the next ones")
    seed: Index = Field(0, description="seed of the order of the documents")
    order: Literal["shuffled", "by_length"] = Field(
        "shuffled",
        description="order of the documents: shuffled, a new permutation each epoch; by_length, the same with "
        "documents longer than a chunk spread evenly over the lanes",
    )
    sources: Annotated[dict[str, SourceSection] | None, AfterValidator(_not_empty)] = Field(
        None, description="sources to train on, and no others; null: all, with the data set's weights"
    )
    shuffle_shards: Count | None = Field(
        None, description="shards of a source whose documents are shuffled together; null: all of them"
    )
    window_chunks: Count = Field(
        1, description="chunks of a lane in one optimizer step, each with a backward pass of its own"
    )
    sequence_len: Annotated[int | list[dict[str, int | None]] | None, PlainValidator(_sequence_len)] = Field(
        None,
        description="a lane forgets after so many of its tokens; null: only at a document's end; "
        "[{step: 0, tokens: N}, …]: a curriculum",
    )
    allow_change: bool = Field(
        False, description="resume although data, seed, order or mixing are not the checkpoint's"
    )
    validation: Annotated[dict[str, PathText] | None, AfterValidator(_set_names)] = Field(
        None,
        description="validation sets: names and data sets; null: the validation split of data.path, source by source",
    )
    cache_dir: PathText | None = Field(
        None, description="folder for the shards of remote data sets; null: ~/.cache/mmrec_train/shards"
    )
    cache_gb: Positive = Field(64.0, description="largest size of that cache, in GB (10⁹ bytes)")


class ClipSection(Section):
    """Largest gradient norms. Components are clipped first, then all of it."""

    global_: Positive = Field(1.0, alias="global", description="norm of the whole gradient")
    memory: Positive = Field(1.0, description="norm of the gradient of the memory's parameters")
    decay: Positive = Field(0.1, description="norm of the gradient of the decays' parameters (W_γ, b_γ, W_c, b_c)")
    gate: Positive = Field(0.5, description="norm of the gradient of the recurrence's gate W_g")


class OptimizerSection(Section):
    """AdamW. Norms, biases and gains have no weight decay."""

    learning_rate: Positive = Field(description="peak learning rate, reached at the end of warm-up")
    betas: Betas = Field((0.9, 0.95), description="decay rates of the two moments, in [0, 1)")
    eps: Positive = Field(1e-8, description="added to the root of the second moment")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.1, description="decoupled weight decay of the matrices")
    clip: ClipSection = Field(ClipSection(), description="largest gradient norms")


class ScheduleSection(Section):
    """How the learning rate moves: linear warm-up, then `cosine`, or `wsd` (stable, then linear decay)."""

    name: Literal["cosine", "wsd"] = Field("cosine", description="shape after warm-up")
    warmup_steps: Index = Field(0, description="steps of linear warm-up from 0")
    min_lr_ratio: Fraction = Field(0.1, description="learning rate at the last step, as a part of the peak")
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        0.2, description="wsd: the last part of all steps, which decays"
    )


class TrainSection(Section):
    """The loop."""

    steps: Count = Field(description="optimizer steps")
    global_batch_size: Count = Field(description="lanes (sequences) of one optimizer step, over all ranks")
    micro_batch_size: Count = Field(description="lanes that a rank processes at a time; the rest is accumulated")
    precision: Literal["bf16", "fp16", "fp32"] = Field("bf16", description="compute; master weights are fp32 always")
    activation_checkpointing: Annotated[Literal["none", "full"] | int, PlainValidator(_every_kth_layer)] = Field(
        "none", description="layers recomputed in the backward pass: none, full (all) or k (every k-th)"
    )
    seed: Index = Field(0, description="seed of initialisation and dropout")
    device: Literal["auto", "cpu", "gpu"] = Field("auto", description="auto takes GPUs where there are any")
    validate_every: Index = Field(0, description="steps between two validations; 0: never")
    validation_tokens: Count = Field(262144, description="tokens of each validation set, from its beginning")


class DeepSpeedSection(Section):
    """Where parameters, gradients and optimizer states live."""

    config: PathText = Field(
        description="DeepSpeed JSON file; looked up from the folder of the file that names it, then from the repository"
    )
    nvme_path: PathText | None = Field(None, description="writable folder for offload to NVMe")


class CheckpointSection(Section):
    """Checkpoints; the last step and a stop on request write one too."""

    every: Count = Field(1000, description="steps between two checkpoints")
    keep_last: Count = Field(3, description="newest complete checkpoints that are kept")


class WandbSection(Section):
    """Weights & Biases."""

    mode: Literal["offline", "online", "disabled"] = Field("offline", description="offline writes to RUN/wandb only")
    project: Annotated[str, Field(min_length=1)] = Field("mmrec", description="project the run belongs to")
    name: str | None = Field(None, description="name of the run; null: the run folder's")
    entity: str | None = Field(None, description="user or team; null: the account's default")


class LoggingSection(Section):
    """What is shown and written."""

    every: Count = Field(10, description="steps between two logged steps")
    wandb: WandbSection = Field(WandbSection(), description="Weights & Biases")
    tensorboard: bool = Field(True, description="write TensorBoard events too")
    sample_prompt: str = Field("def ", description="text that the sample at the end continues")
    sample_tokens: Index = Field(128, description="tokens of that sample; 0: none")


@dataclass(frozen=True)
class Origin:
    """Where a configuration was written. Never part of what it says: all origins are equal."""

    document: Marked | None = field(default=None, compare=False, repr=False)


class RunConfig(Section):
    """Everything that decides a run."""

    run_dir: PathText = Field(description="folder of the run: config.yaml, metrics.jsonl, checkpoints, report")
    model: ModelSection = Field(description="shape of the model")
    data: DataSection = Field(description="what is trained on")
    optimizer: OptimizerSection = Field(description="AdamW and clipping")
    schedule: ScheduleSection = Field(ScheduleSection(), description="learning rate over the steps")
    train: TrainSection = Field(description="batch, precision, device, validation")
    deepspeed: DeepSpeedSection = Field(description="ZeRO stage and offload")
    checkpoint: CheckpointSection = Field(CheckpointSection(), description="when to save, how many to keep")
    logging: LoggingSection = Field(LoggingSection(), description="console, wandb, TensorBoard, sample")

    _origin: Origin = PrivateAttr(default_factory=Origin)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step, over all ranks."""
        return self.train.global_batch_size * self.data.window_chunks * self.data.chunk_len

    def mark(self, key: str) -> Mark:
        """Where the value of a dotted key was written: a line of a file or a `--set` argument.

        The enclosing section's place for a value left at its default; the key itself for a configuration built in
        Python. Begin a message about the value with it.
        """
        if self._origin.document is None:
            return Mark(key, None, Path())
        return self._origin.document.mark_of(tuple(key.split(".")))
