"""The recipe of a run: what is trained. A ds_config says how it is computed (see `ds_config.py`)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, field_serializer, model_validator

from qatlaw.bit_widths import BIT_WIDTHS, BIT_WIDTHS_TEXT, EMBEDDING_BITS
from qatscale.config.amounts import PositiveTokens, Tokens
from qatscale.config.places import expand_user, without_credentials
from qatscale.config.schedule_section import ScheduleConfig
from qatscale.config.section import Allowed, Beta, ClashError, Fraction, NotBool, Positive, Section, one_length

Scheme = Literal["fp", "sequential", "fused", "scratch"]


def _bit_width(value: int | float) -> int | float:
    if value not in BIT_WIDTHS:
        raise ValueError("no quantizer has so many bits")
    return BIT_WIDTHS[BIT_WIDTHS.index(value)]  # 4.0 becomes 4, so that equal recipes read and hash alike


def _embedding_bits(value: int | Literal["auto"]) -> int | Literal["auto"]:
    if value != "auto" and value not in EMBEDDING_BITS:
        raise ValueError("an embedding cannot have so many bits")
    return value


# (Literals would say the same, but they hold no float and cannot be derived from the list.)
Bits = Annotated[int | float, NotBool, AfterValidator(_bit_width), Allowed(f"one of {BIT_WIDTHS_TEXT}")]
"""Bits per weight; 1.58 is ternary."""
EmbeddingBits = Annotated[
    int | Literal["auto"], NotBool, AfterValidator(_embedding_bits),
    Allowed(f"auto, {', '.join(map(str, EMBEDDING_BITS[:-1]))} or {EMBEDDING_BITS[-1]}"),
]  # fmt: skip


def _each_once(values: list[float]) -> list[float]:
    if len(set(values)) < len(values):
        raise ValueError("a value occurs twice")
    return values


ExpandedPath = Annotated[Path, AfterValidator(expand_user), Allowed("a path")]


RopeScaling = Annotated[
    tuple[Annotated[float, NotBool, Field(gt=0)], ...],
    Field(min_length=4, max_length=4),
    Allowed("a list of four numbers above 0"),
]


SHARE_UNITS = 10_000
"""Shares of a mixture are multiples of 1/SHARE_UNITS, so that they are exact."""


def _named(mix: Any) -> Any:
    for name in mix if isinstance(mix, dict) else ():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", str(name)):
            fix = "Write a blank after each colon: {web: 0.7, code: 0.3}." if ":" in str(name) else ""
            raise ClashError("", f"{str(name)!r} is not the name of a folder inside data.path", fix)
    return mix


def _complete(mix: dict[str, float]) -> dict[str, float]:
    """Shares have at most four decimals and sum to 1."""
    units = {name: round(share * SHARE_UNITS) for name, share in mix.items()}
    for name, share in mix.items():
        if abs(share * SHARE_UNITS - units[name]) > 1e-6:
            raise ClashError(name, "a share has at most four decimals", f"Write {units[name] / SHARE_UNITS:g}.")
    if (total := sum(units.values())) != SHARE_UNITS:
        inside = ", ".join(f"{name}: {unit / total:.4g}" for name, unit in units.items() if total)
        fix = f"In proportion they are {{{inside}}}." if total else ""
        raise ClashError("", f"the shares sum to {total / SHARE_UNITS:g}, and they must sum to 1", fix)
    return {name: unit / SHARE_UNITS for name, unit in units.items()}


Mix = Annotated[
    dict[str, Fraction],
    Field(min_length=1),
    BeforeValidator(_named),
    AfterValidator(_complete),
    Allowed("shares that sum to 1, each by the name of a folder: {web: 0.7, code: 0.3}"),
]


class ModelConfig(Section):
    """A Llama-style decoder: RMSNorm, RoPE, SwiGLU; with the differences of Llama 3, Mistral, Qwen2 and Qwen3."""

    vocab_size: Positive
    """Tokens that the embedding holds. A tokenizer may have fewer pieces, never more."""
    hidden_size: Positive
    """Channels of the residual stream."""
    layers: Positive
    """Decoder blocks, each of attention and MLP."""
    heads: Positive
    """Query heads of attention."""
    kv_heads: Positive | None = None
    """Key and value heads; fewer than `heads` is grouped-query attention, null is as many as `heads`."""
    head_dim: Positive | None = None
    """Channels of a head, an even number; null is hidden_size / heads."""
    attention_bias: bool = False
    """Whether q, k and v add a bias, as in Qwen2."""
    qk_norm: bool = False
    """Whether an RMSNorm over the channels of each head follows q and k, as in Qwen3."""
    intermediate_size: Positive
    """Channels between the projections of the SwiGLU MLP, by custom about 8/3 of hidden_size."""
    tied_embedding: bool = True
    """Whether the output head shares the embedding's weights."""
    rope_theta: Annotated[float, Field(gt=0)] = 10_000.0
    """Base of the wavelengths of the rotary position embedding; longer contexts take a larger one."""
    rope_scaling: RopeScaling | None = None
    """Llama 3.1's scaling of long wavelengths: [factor, low_freq_factor, high_freq_factor, original positions]."""
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    """Added to the mean square in RMSNorm, against division by zero."""
    init_std: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of the initial weights; `o` and `down` get it divided by sqrt(2 x layers)."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.head_dim is None and self.hidden_size % self.heads:
            raise ClashError("heads", f"does not divide model.hidden_size = {self.hidden_size}")
        if self.channels % 2:
            key = "head_dim" if self.head_dim else "heads"
            raise ClashError(key, f"gives heads of {self.channels} channels, and RoPE rotates pairs of channels")
        if self.qk_norm and self.attention_bias:
            raise ClashError(
                "qk_norm", "with model.attention_bias makes a model that others do not load", "Keep one of them."
            )
        if self.rope_scaling and self.rope_scaling[1] >= self.rope_scaling[2]:
            raise ClashError("rope_scaling", "has a low_freq_factor that is not below its high_freq_factor")
        if self.heads % (self.kv_heads or self.heads):
            raise ClashError("kv_heads", f"does not divide model.heads = {self.heads}")
        return self

    @property
    def channels(self) -> int:
        """Channels of a head."""
        return self.head_dim or self.hidden_size // self.heads

    @property
    def input_widths(self) -> dict[str, int]:
        """Key -> the input channels of matrices, which groups of scales divide."""
        widths = {"model.hidden_size": self.hidden_size, "model.intermediate_size": self.intermediate_size}
        return widths | ({"model.heads x model.head_dim": self.heads * self.head_dim} if self.head_dim else {})


class DataConfig(Section):
    path: ExpandedPath | None = None
    """The folder that `qatscale prepare` wrote; a relative path starts in the working folder. With `data.mix`: the
    folder that holds those of the sources."""
    mix: Mix | None = None
    """Shares of the training sequences by source, a prepared folder inside data.path: `data.mix={web: 0.7, code: 0.3}`.
    They sum to 1, with four decimals at most. null = data.path is the only source."""
    cooldown_mix: Mix | None = None
    """Shares from the first cooldown or the switch to QAT on, whichever is first, to the end; null = data.mix."""
    sequence_length: Positive
    """Tokens that the model sees at once; prepared data serve any length."""
    document_mask: bool = False
    """Whether attention and positions keep to one document of a sequence, as if each had a forward pass of its own."""
    seed: int = 0
    """Decides the order of the training data: a random permutation of its sequences, a new one in every epoch."""
    cooldown_seed: Annotated[int, NotBool, Field(ge=0)] = 0
    """Order of the last cooldown's data: 0 continues `seed`'s, another number shuffles what the epoch has left."""

    @model_validator(mode="after")
    def _mix_comes_first(self) -> Self:
        if self.cooldown_mix and not self.mix:
            raise ClashError("cooldown_mix", "needs data.mix, the mixture before it")
        return self

    @property
    def sources(self) -> dict[str, Path]:
        """The prepared folders by their names in the mixtures; without one data.path, as the only source ""."""
        if self.path is None:
            return {}
        return {name: self.path / name for name in sorted({*(self.mix or {"": 1}), *(self.cooldown_mix or {})})}

    @property
    def folder(self) -> Path | None:
        """A prepared folder, which holds the tokenizer: all sources have the same."""
        return next(iter(self.sources.values()), None)


class BatchConfig(Section):
    sequences: Positive
    """Sequences of one optimizer step, over all processes."""
    micro_batch: Positive
    """Sequences of one forward pass in a process: sequences = micro_batch x accumulation x data-parallel processes."""

    def micro_batches(self, data_parallel: int) -> int:
        """Micro-batches of an optimizer step on each of so many data-parallel processes."""
        return self.sequences // (self.micro_batch * data_parallel)


class OptimizerConfig(Section):
    """AdamW. Norms and quantizer scales get no weight decay."""

    learning_rate: Annotated[float, Field(gt=0)]
    """Peak rate of the full-precision phase."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay of the running means of the gradient and of its square, per step."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the second moment, against division by zero."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled decay: each step multiplies the matrices by 1 - rate x weight_decay."""
    gradient_clipping: Annotated[float, Field(ge=0)] = 1.0
    """Gradients with a larger global norm are scaled down to it; 0 = no clipping."""
    on_spike: Literal["stop", "skip", "rollback"] = "stop"
    """What happens to an update whose gradient is not finite, or a spike. `stop` ends the run, and `skip` leaves the
    update out. `rollback` takes the run back to its newest checkpoint, and it then passes over that step's batch."""
    spike_factor: Annotated[float, Field(gt=1)] | None = None
    """A gradient norm above so many times its running mean is a spike; null = only what is not finite."""
    spike_limit: Annotated[int, Field(ge=1)] = 10
    """Spikes that a run passes over; the next one ends it."""


class QatConfig(Section):
    """Quantization-aware training of the weights: which scheme, how many bits, from when."""

    scheme: Scheme = "fp"
    """`fp`: no QAT. `sequential`: full precision with its own cooldown, then QAT with a second schedule.
    `fused`: QAT takes over at the stable rate, and one cooldown ends both. `scratch`: QAT from step 0."""
    bits: Bits = 4
    """Bits per weight of the projections q, k, v, o, gate, up and down; 1.58 is ternary."""
    fraction: Fraction | Literal["auto"] = "auto"
    """QAT's share of all tokens; `auto` = the planner's optimum, or the nearest share that holds the scheme's warm-ups
    and cooldowns. It is 0 for scheme `fp` and 1 for `scratch`."""
    group_size: Positive | None = None
    """Neighbouring input channels that share a quantizer scale; null = one scale per output row."""
    embedding_bits: EmbeddingBits = "auto"
    """Bits of embedding and head, never below 4; `auto` = max(4, bits) when tied, else 16, which is full precision."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate of the QAT phase; null = lr_ratio x optimizer.learning_rate."""
    lr_ratio: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Peak rate of the QAT phase over that of full precision, instead of qat.learning_rate. `auto` = 1 for `fused` and
    `scratch`; for `sequential` it is a measured rule: the shorter the phase, the lower its rate."""
    scale_lr_ratio: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Learning rate of the scales over that of the weights. `auto` = 1/Qp, as a scale is a Qp-th of the largest weight;
    at 1 bit it is 0.1, since rows die at 1."""
    scale_gradient_factor: bool = True
    """Whether the gradient of the scales is multiplied by LSQ's g = 1/sqrt(numel(W) x Qp), as in ParetoQ. AdamW's
    update does not depend on it; the global gradient norm, and so clipping, does."""
    warmup_fraction: Fraction | None = None
    """Length of the second warm-up, after the switch, as a share of the QAT phase. Where neither this nor
    qat.warmup_tokens is given: 2 % for `sequential`, none for `fused`."""
    warmup_tokens: Tokens | None = None
    """Length of the second warm-up in tokens, instead of qat.warmup_fraction."""
    cooldown_fraction: Fraction | None = None
    """For scheme `sequential`: cooldown of the QAT phase as a share of it; null = as in full precision."""
    optimizer_state: Literal["keep", "reset"] = "keep"
    """Whether AdamW's moments of the weights are kept at the switch to QAT or start from zero."""

    @model_validator(mode="after")
    def _fits_scheme(self) -> Self:
        one_length(self, "qat", "warmup_fraction", "warmup_tokens")
        if self.learning_rate is not None and self.lr_ratio != "auto":
            raise ClashError(
                "lr_ratio",
                f"sets the same rate as qat.learning_rate = {self.learning_rate:g}",
                "Keep one: qat.lr_ratio=auto or qat.learning_rate=null.",
            )
        if self.scheme in ("sequential", "fused") and self.fraction in (0, 1):
            end = "scratch" if self.fraction else "fp"
            raise ClashError("fraction", f"scheme {self.scheme!r} has two phases", f"Set qat.scheme={end} instead.")
        return self


class EngineConfig(Section):
    ds_config: str = "zero1_fp32"
    """A name in ds_configs/ or the path of a DeepSpeed JSON file: ZeRO stage, precision, offload."""
    activation_checkpointing: bool = False
    """Whether each block is recomputed in the backward pass: less memory, about a third more arithmetic."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the blocks, once for all of them and once more at the switch; under ZeRO-3 of what has no
    weights. `auto` = on GPUs. On CPUs `on` pays in runs of hours: it takes a minute and a C++ compiler."""
    stall_timeout: Annotated[float, Field(gt=0, le=1_000_000_000)] | None = 600.0
    """Seconds without a micro-batch after which the job ends and names the rank that hangs; start, saving and
    evaluation may take half an hour more. null = wait for ever, for debuggers."""
    tensor_parallel: Positive = 1
    """Processes that share every matrix, as in Megatron-LM; they exchange activations twice a block."""
    sequence_parallel: bool = False
    """With tensor_parallel: whether norms and residual stream are divided along the sequence, which saves memory."""
    pipeline_stages: Positive = 1
    """Groups of consecutive blocks, each on processes of its own; more than one takes a ZeRO-1 ds_config."""


class CheckpointConfig(Section):
    interval: PositiveTokens | None = None
    """Tokens between checkpoints; null = at phase boundaries and at the end only."""
    keep: Positive = 2
    """Interval checkpoints that stay on disk; those at phase boundaries and in `keep_at` always do."""
    keep_at: list[PositiveTokens] = Field([])
    """Further checkpoints to branch from, in tokens from the start: `checkpoint.keep_at=[1B, 2B]`."""
    background: bool = True
    """Whether checkpoints are written while training continues, from a copy in host memory of 12 bytes per parameter
    over all processes. A killed job then loses one interval and the time of a write at most. false = no copy; training
    waits until a checkpoint is on disk."""


class EvaluationConfig(Section):
    interval: PositiveTokens | None = None
    """Tokens between validations during training; null = at the end only."""
    tokens: PositiveTokens = 1_000_000
    """Held-out tokens of a validation, spread evenly over the held-out split; all of it where it has fewer."""
    ptq_bits: Annotated[
        list[Bits], AfterValidator(_each_once), Allowed(f"a list without repeats, each one of {BIT_WIDTHS_TEXT}")
    ] = Field([])
    """Bit widths at which the final weights are also evaluated after post-training quantization."""


class TrackingConfig(Section):
    experiment: str = "qatscale"
    """MLflow experiment that the run belongs to."""
    uri: str | None = None
    """Address of the MLflow store; null = MLFLOW_TRACKING_URI, else SQLite in the working folder; none = no MLflow.
    Credentials in it are used and never written."""

    @field_serializer("uri")
    def _without_credentials(self, uri: str | None) -> str | None:
        return uri and without_credentials(uri)


RunName = Annotated[
    str,
    Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._=+-]{0,199}$"),
    Allowed("a name of at most 200 letters, digits and . _ = + -, beginning with a letter or digit"),
]


class RunConfig(Section):
    name: RunName
    """Name of the run and of its folder."""
    output: ExpandedPath = Path("runs")
    """Folder in which the run's folder is made."""
    seed: int = 0
    """Decides the initial weights."""
    init: Literal["auto", 1, 2] = "auto"
    """Version of the generator that draws them from the seed; `auto` = 2 in a new run, and in a resumed run its own.
    Runs before version 2 existed have 1."""
    tokens: PositiveTokens
    """Training tokens of the run, both phases together, rounded to optimizer steps."""
    model: ModelConfig
    data: DataConfig
    batch: BatchConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    qat: QatConfig = QatConfig()
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()
    log_interval: Positive = 10
    """Optimizer steps between metrics lines."""
    _notes: tuple[str, ...] = ()  # about lengths of a shipped recipe that gave way; not recorded
    _given: list[str] | None = None  # keys that a person set, where the others come from a recipe of ours; not recorded

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        group = self.qat.group_size
        for key, size in self.model.input_widths.items():
            if group and size % group:
                raise ClashError("qat.group_size", f"does not divide {key} = {size}")
        return self

    def __eq__(self, other: object) -> bool:
        """By values: which of them a person set does not count."""
        return isinstance(other, RunConfig) and self.__dict__ == other.__dict__

    @property
    def tokens_per_step(self) -> int:
        return self.batch.sequences * self.data.sequence_length

    @property
    def steps(self) -> int:
        return max(1, round(self.tokens / self.tokens_per_step))

    @property
    def folder(self) -> Path:
        return self.output / self.name
