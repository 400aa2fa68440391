"""One RunConfig describes one run: the science. System knobs live in a ds_config (see `ds_config.py`)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from qatlaw.bit_widths import BIT_WIDTHS, BIT_WIDTHS_TEXT, EMBEDDING_BITS
from qatscale.config.amounts import PositiveTokens, Tokens, format_amount
from qatscale.config.describe import Allowed

Scheme = Literal["fp", "sequential", "fused", "scratch"]
Phase = Literal["warmup", "stable", "cooldown", "qat_warmup", "qat_stable", "qat_cooldown"]
Shape = Literal[
    "linear", "cosine", "mirror_cosine", "1-sqrt", "sqrt", "minus_sqrt", "1-square", "lowered_linear", "exponential",
    "piecewise",
]  # fmt: skip


def _bit_width(value: int | float) -> int | float:
    if value not in BIT_WIDTHS:
        raise ValueError(f"no quantizer has {value:g} bits")
    return BIT_WIDTHS[BIT_WIDTHS.index(value)]  # 4.0 becomes 4, so that equal recipes read and hash alike


def _embedding_bits(value: int | Literal["auto"]) -> int | Literal["auto"]:
    if value != "auto" and value not in EMBEDDING_BITS:
        raise ValueError(f"an embedding cannot have {value:g} bits")
    return value


# (Literals would say the same, but they hold no float and cannot be derived from the list.)
Bits = Annotated[int | float, AfterValidator(_bit_width), Allowed(f"one of {BIT_WIDTHS_TEXT}")]
"""Bits per weight; 1.58 is ternary."""
EmbeddingBits = Annotated[
    int | Literal["auto"], AfterValidator(_embedding_bits),
    Allowed(f"auto, {', '.join(map(str, EMBEDDING_BITS[:-1]))} or {EMBEDDING_BITS[-1]}"),
]  # fmt: skip


def _expand_user(path: Path) -> Path:
    """No shell expands the ~ in `data.path=~/corpus`, and a folder called ~ is nobody's wish."""
    try:
        return path.expanduser()
    except RuntimeError:  # no such user, so a name that happens to begin with ~
        return path


ExpandedPath = Annotated[Path, AfterValidator(_expand_user), Allowed("a path")]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(gt=0)]


class ClashError(ValueError):
    """Keys that are fine each by itself and wrong together. `key` is the one to name, relative to its section."""

    def __init__(self, key: str, message: str) -> None:
        self.key = key
        super().__init__(message)


def _said_once(section: Section, name: str, fraction: str, tokens: str) -> None:
    """A length is a fraction or a number of tokens, never both. `name` is the section's own key."""
    if getattr(section, fraction) is not None and getattr(section, tokens) is not None:
        raise ClashError(
            tokens,
            f"says the same thing as {name}.{fraction} = {getattr(section, fraction):g}; keep one and set the other to "
            f"null: {name}.{fraction}=null or {name}.{tokens}=null",
        )


class Section(BaseModel):
    """Unknown keys are errors; a validated section does not change."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Python takes True for 1, and `layers: true` for a model of one layer."""
        assert info.field_name is not None
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError(f"{value} is neither a number nor a text")
        return value


class ModelConfig(Section):
    """A Llama-2-style decoder: RMSNorm, RoPE, SwiGLU, no bias."""

    vocab_size: Positive
    """Rows of the embedding. A tokenizer may have fewer pieces, never more."""
    hidden_size: Positive
    """Width of the residual stream."""
    layers: Positive
    """Decoder blocks, each attention + MLP."""
    heads: Positive
    """Query heads; each has hidden_size / heads channels, an even number."""
    kv_heads: Positive | None = None
    """Fewer than `heads` = grouped-query attention; null = as many as `heads`."""
    intermediate_size: Positive
    """Width of the SwiGLU's gate and up projections; about 8/3 of hidden_size by custom."""
    tied_embedding: bool = True
    """The output head shares the embedding's weights."""
    rope_theta: Annotated[float, Field(gt=0)] = 10_000.0
    """Base of the rotary embedding's wavelengths."""
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    """Added to the mean square inside RMSNorm."""
    init_std: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of the normal initialisation; `o` and `down` get it divided by sqrt(2 * layers)."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        for key in ("vocab_size", "hidden_size", "layers", "heads", "intermediate_size"):
            if getattr(self, key) >= 2**63:
                raise ClashError(key, "is more than torch counts to, 2^63 - 1")
        if self.hidden_size % self.heads:
            raise ClashError("heads", f"hidden_size {self.hidden_size} does not divide into {self.heads} heads")
        if (self.hidden_size // self.heads) % 2:
            odd = self.hidden_size // self.heads
            raise ClashError(
                "heads", f"hidden_size {self.hidden_size} gives heads of {odd} channels; RoPE rotates pairs"
            )
        if self.heads % (self.kv_heads or self.heads):
            raise ClashError(
                "kv_heads", f"does not divide heads = {self.heads}; each serves the same number of query heads"
            )
        return self


class DataConfig(Section):
    path: ExpandedPath | None = None
    """The folder that `qatscale prepare` wrote; a relative one starts in the working folder."""
    sequence_length: Positive
    """Tokens the model sees at once; chosen here, not when the data is prepared."""
    seed: int = 0
    """Order of the training data: a random permutation of all its sequences, another one in every epoch. A branch with
    its parent's seed continues its parent's order, with another seed it sees its tail in another order."""


class BatchConfig(Section):
    sequences: Positive
    """Sequences per optimizer step over all processes."""
    micro_batch: Positive
    """Sequences per forward pass and process. sequences = micro_batch x accumulation x data-parallel processes."""


class OptimizerConfig(Section):
    """AdamW. Norms and quantizer scales get no weight decay."""

    learning_rate: Annotated[float, Field(gt=0)]
    """Peak rate of the full-precision phase."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay of the running means of the gradient and of its square."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled: each step multiplies the matrices by 1 - rate x weight_decay."""
    gradient_clipping: Annotated[float, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0 = no clipping."""


class PhaseOverride(Section):
    """AdamW settings that hold in one phase only; null = as in `optimizer`."""

    betas: tuple[Beta, Beta] | None = None
    """AdamW's betas in this phase."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """AdamW's weight decay in this phase."""


class ScheduleConfig(Section):
    """Warm-up, stable, cooldown. Each length in tokens or as a fraction of the schedule it belongs to, never both.

    `fp`, `fused` and `scratch` have one schedule, over all tokens. `sequential` has two: the full-precision phase
    and the QAT phase, each with its own warm-up and cooldown.
    """

    warmup_fraction: Fraction | None = None
    """Linear warm-up as a share of the schedule. Neither this nor warmup_tokens given = 1 % of the schedule."""
    warmup_tokens: Tokens | None = None
    """The warm-up's length in tokens."""
    cooldown_fraction: Fraction | None = None
    """Neither this nor cooldown_tokens given = 20 % of the schedule, less where less is left; 0 = none (a trunk)."""
    cooldown_tokens: Tokens | None = None
    """The cooldown's length in tokens."""
    shape: Shape = "1-sqrt"
    """Curve of the cooldown; `sqrt` and `minus_sqrt` are other names of 1-sqrt."""
    exponent: Annotated[float, Field(gt=0)] = 0.5
    """Of 1-sqrt only: the rate falls as 1 - x^exponent."""
    lowered_to: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Of lowered_linear only: the share of the rate it drops to at the start."""
    knots: list[Fraction] | None = None
    """Of piecewise only: factors at equally spaced points, from the cooldown's start to its end."""
    min_lr_ratio: Fraction = 0.0
    """The rate at the end of the cooldown, as a share of the peak."""
    phases: dict[Phase, PhaseOverride] = {}
    """AdamW betas and weight decay per phase, e.g. `schedule.phases.cooldown.betas=[0.9,0.99]`."""

    @model_validator(mode="after")
    def _one_length_each(self) -> Self:
        for what in ("warmup", "cooldown"):
            _said_once(self, "schedule", f"{what}_fraction", f"{what}_tokens")
        if self.shape == "exponential" and self.min_lr_ratio == 0:
            raise ClashError("min_lr_ratio", "shape 'exponential' never reaches 0; set it above 0, e.g. 0.01")
        if (self.shape == "piecewise") != (self.knots is not None):
            raise ClashError("knots", "belong to shape 'piecewise', and 'piecewise' needs them, e.g. knots=[1,0.5,0]")
        if self.knots is not None and len(self.knots) < 2:
            raise ClashError("knots", "a piecewise cooldown has at least a start and an end, e.g. knots=[1,0]")
        return self


class QatConfig(Section):
    """Weight quantization: which scheme, how many bits, from when."""

    scheme: Scheme = "fp"
    """`fp`: none. `sequential`: full precision with its own cooldown, then QAT with a second schedule.
    `fused`: QAT takes over at the stable rate and holds the one cooldown. `scratch`: QAT from step 0."""
    bits: Bits = 4
    """Per weight of q, k, v, o, gate, up and down; 1.58 is ternary."""
    fraction: Fraction | Literal["auto"] = "auto"
    """QAT's share of all tokens; `auto` = the planner's optimum, or the nearest share that holds the scheme's warm-ups
    and cooldowns. `fp` is always 0, `scratch` always 1."""
    group_size: Positive | None = None
    """Input channels that share a scale; null = one scale per output row."""
    embedding_bits: EmbeddingBits = "auto"
    """Bits of embedding and head, never below 4; `auto` = max(4, bits) when tied, else 16, which is full precision."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak rate of the QAT phase; null = lr_ratio x optimizer.learning_rate."""
    lr_ratio: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Peak rate of the QAT phase over optimizer.learning_rate, instead of learning_rate; `auto` = 1."""
    scale_lr_ratio: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Rate of the scales over that of the weights; `auto` = 1/Qp (a scale is a Qp-th of the largest
    weight), and 0.1 at 1 bit, where rows die at 1."""
    scale_gradient_factor: bool = True
    """Multiply the gradient of the scales by LSQ's g = 1/sqrt(numel(W) x Qp), as ParetoQ does. AdamW's update does not
    depend on it, but the global gradient norm, and so clipping, does."""
    warmup_fraction: Fraction | None = None
    """Re-warm-up after the switch as a share of the QAT phase. Neither given: `sequential` 2 %, `fused` none."""
    warmup_tokens: Tokens | None = None
    """The re-warm-up's length in tokens."""
    cooldown_fraction: Fraction | None = None
    """`sequential` only: the QAT phase's own cooldown; null = the schedule's."""
    optimizer_state: Literal["keep", "reset"] = "keep"
    """Adam's moments of the weights at the switch."""

    @model_validator(mode="after")
    def _fits_scheme(self) -> Self:
        _said_once(self, "qat", "warmup_fraction", "warmup_tokens")
        if self.learning_rate is not None and self.lr_ratio != "auto":
            raise ClashError(
                "lr_ratio",
                f"says the same thing as qat.learning_rate = {self.learning_rate:g}; keep one: qat.lr_ratio=auto or "
                "qat.learning_rate=null",
            )
        if self.scheme in ("sequential", "fused") and self.fraction in (0, 1):
            ends = "scratch" if self.fraction else "fp"
            raise ClashError("fraction", f"with scheme {self.scheme!r} is qat.scheme={ends}; say that instead")
        return self


class EngineConfig(Section):
    ds_config: str = "zero1_fp32"
    """A name in ds_configs/ or the path of a DeepSpeed JSON file: ZeRO stage, precision, offload."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more arithmetic."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the blocks, once for all of them and once more at the switch. `auto` = on GPUs under ZeRO-1 and
    2. On CPUs `on` pays in runs of hours: it takes a minute and a C++ compiler. Not with ZeRO-3."""
    stall_timeout: Annotated[float, Field(gt=0)] | None = 600.0
    """Seconds without a micro-batch after which the job ends and names the rank that hangs; start, saving and
    evaluation may take half an hour more. Longer than the slowest micro-batch; null = wait for ever (debuggers)."""
    tensor_parallel: Positive = 1
    """Processes that share every matrix, Megatron-style; they exchange activations twice a block."""
    sequence_parallel: bool = False
    """With tensor_parallel: norms and the residual stream are shared along the sequence, which saves memory."""
    pipeline_stages: Positive = 1
    """Groups of consecutive blocks, each on processes of its own. ZeRO-1 only."""


class CheckpointConfig(Section):
    interval: PositiveTokens | None = None
    """Tokens between checkpoints; null = phase boundaries and the end only."""
    keep: Positive = 2
    """How many of the interval checkpoints stay. Those at phase boundaries and in `keep_at` always stay."""
    keep_at: list[PositiveTokens] = []
    """Further points to branch from, in tokens from the start."""
    background: bool = True
    """Write them beside the steps from a copy in host memory: 12 bytes per parameter, over all processes. A job that is
    killed goes on from the newest complete one: it loses what it did since, one interval and the time of a write at
    most. false = no copy, and training stands still until a checkpoint is on disk."""


class EvaluationConfig(Section):
    interval: PositiveTokens | None = None
    """Tokens between validations while training; null = at the end only."""
    tokens: PositiveTokens = 1_000_000
    """Held-out tokens used, from the start of the held-out split; fewer if it has fewer."""
    ptq_bits: list[Bits] = []
    """Bit widths at which the final weights are also evaluated after post-training quantization."""


class TrackingConfig(Section):
    experiment: str = "qatscale"
    """MLflow experiment that the run is filed under."""
    uri: str | None = None
    """null = MLFLOW_TRACKING_URI, or else SQLite in the working folder. `none` = no tracking."""


class RunConfig(Section):
    name: Annotated[
        str,
        Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._=+-]*$"),
        Allowed("a name of letters, digits and . _ = + -, beginning with a letter or digit"),
    ]
    """Also the name of the run's folder."""
    output: ExpandedPath = Path("runs")
    """Folder of run folders."""
    seed: int = 0
    """Of the initial weights."""
    tokens: PositiveTokens
    """All tokens of the run, both phases; rounded to whole optimizer steps."""
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

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.tokens < self.tokens_per_step:
            step = f"{self.batch.sequences} sequences of {self.data.sequence_length} tokens"
            raise ClashError(
                "tokens", f"is less than one optimizer step, {format_amount(self.tokens_per_step)} ({step})"
            )
        group = self.qat.group_size
        for width in ("hidden_size", "intermediate_size"):
            if group and getattr(self.model, width) % group:
                raise ClashError("qat.group_size", f"does not divide model.{width} = {getattr(self.model, width)}")
        return self

    @property
    def tokens_per_step(self) -> int:
        return self.batch.sequences * self.data.sequence_length

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return max(1, round(self.tokens / self.tokens_per_step))

    @property
    def folder(self) -> Path:
        return self.output / self.name
