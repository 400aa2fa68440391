"""One RunConfig describes one run: the science. System knobs live in a ds_config (see `ds_config.py`)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from qatscale.config.amounts import Tokens

Scheme = Literal["fp", "sequential", "fused", "scratch"]
Phase = Literal["warmup", "stable", "cooldown", "qat_warmup", "qat_stable", "qat_cooldown"]
Shape = Literal[
    "linear", "cosine", "mirror_cosine", "1-sqrt", "sqrt", "minus_sqrt", "1-square", "lowered_linear", "exponential",
    "piecewise",
]  # fmt: skip
Bits = Literal[1, 1.58, 2, 3, 4, 5, 6, 8]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(gt=0)]


class Section(BaseModel):
    """Unknown keys are errors; a validated section does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)


class ModelConfig(Section):
    """A Llama-2-style decoder: RMSNorm, RoPE, SwiGLU, no bias."""

    vocab_size: Positive
    """Rows of the embedding. A tokenizer may have fewer pieces, never more."""
    hidden_size: Positive
    layers: Positive
    heads: Positive
    kv_heads: Positive | None = None
    """Fewer than `heads` = grouped-query attention; null = as many as `heads`."""
    intermediate_size: Positive
    tied_embedding: bool = True
    rope_theta: Annotated[float, Field(gt=0)] = 10_000.0
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    init_std: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of the normal initialisation; `o` and `down` get it divided by sqrt(2 * layers)."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.hidden_size % self.heads:
            raise ValueError(f"hidden_size {self.hidden_size} does not divide into {self.heads} heads")
        if (self.hidden_size // self.heads) % 2:
            raise ValueError(f"a head of {self.hidden_size // self.heads} channels is odd; RoPE rotates pairs")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"heads {self.heads} is no multiple of kv_heads {self.kv_heads}")
        return self


class DataConfig(Section):
    path: Path | None = None
    """The folder that `qatscale prepare` wrote."""
    sequence_length: Positive
    """Tokens the model sees at once; chosen here, not when the data is prepared."""
    seed: int = 0
    """Order of the training data. A branch with another seed sees its tail in another order."""
    shuffle_block: Positive = 1024
    """Sequences shuffled together: large is a better shuffle, small reads the disk more in order."""


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
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    gradient_clipping: Annotated[float, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0 = no clipping."""


class PhaseOverride(Section):
    """AdamW settings that hold in one phase only; null = as in `optimizer`."""

    betas: tuple[Beta, Beta] | None = None
    weight_decay: Annotated[float, Field(ge=0)] | None = None


class ScheduleConfig(Section):
    """Warm-up, stable, cooldown. Each length in tokens or as a fraction of the schedule it belongs to, never both.

    `fp`, `fused` and `scratch` have one schedule, over all tokens. `sequential` has two: the full-precision phase
    and the QAT phase, each with its own warm-up and cooldown.
    """

    warmup_fraction: Fraction | None = None
    warmup_tokens: Tokens | None = None
    """Neither given = 1 % of the schedule."""
    cooldown_fraction: Fraction | None = None
    """Neither given = 20 % of the schedule; 0 = no cooldown (a stable trunk to branch from)."""
    cooldown_tokens: Tokens | None = None
    shape: Shape = "1-sqrt"
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
            if getattr(self, f"{what}_fraction") is not None and getattr(self, f"{what}_tokens") is not None:
                raise ValueError(f"{what}_fraction and {what}_tokens say the same thing twice; set one of them to null")
        if self.shape == "exponential" and self.min_lr_ratio == 0:
            raise ValueError("shape 'exponential' never reaches 0; set min_lr_ratio above 0, e.g. 0.01")
        if (self.shape == "piecewise") != (self.knots is not None):
            raise ValueError("knots belong to shape 'piecewise', and 'piecewise' needs them, e.g. knots=[1,0.5,0]")
        if self.knots is not None and len(self.knots) < 2:
            raise ValueError(f"knots {self.knots}: a piecewise cooldown has at least a start and an end")
        return self


class QatConfig(Section):
    """Weight quantization: which scheme, how many bits, from when."""

    scheme: Scheme = "fp"
    """`fp`: none. `sequential`: full precision with its own cooldown, then QAT with a second schedule.
    `fused`: QAT takes over at the stable rate and holds the one cooldown. `scratch`: QAT from step 0."""
    bits: Bits = 4
    fraction: Fraction | Literal["auto"] = "auto"
    """QAT's share of all tokens; `auto` = the planner's optimum. `fp` is always 0, `scratch` always 1."""
    group_size: Positive | None = None
    """Input channels that share a scale; null = one scale per output row."""
    embedding_bits: Literal["auto", 4, 5, 6, 8, 16] = "auto"
    """Embedding and head, never below 4; `auto` = max(4, bits) when tied, else 16."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak rate of the QAT phase; null = optimizer.learning_rate."""
    scale_lr_ratio: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Rate of the scales over that of the weights; `auto` = 1/Qp: a scale of b bits is a Qp-th of the largest weight."""
    scale_gradient_factor: bool = True
    """Multiply the gradient of the scales by LSQ's g = 1/sqrt(numel(W) x Qp), as ParetoQ does. AdamW's update does not
    depend on it, but the global gradient norm, and so clipping, does."""
    warmup_fraction: Fraction | None = None
    """Re-warm-up after the switch as a share of the QAT phase. Neither given: `sequential` 2 %, `fused` none."""
    warmup_tokens: Tokens | None = None
    cooldown_fraction: Fraction | None = None
    """`sequential` only: the QAT phase's own cooldown; null = the schedule's."""
    optimizer_state: Literal["keep", "reset"] = "keep"
    """Adam's moments of the weights at the switch."""

    @model_validator(mode="after")
    def _fits_scheme(self) -> Self:
        if self.warmup_fraction is not None and self.warmup_tokens is not None:
            raise ValueError("warmup_fraction and warmup_tokens say the same thing twice; set one of them to null")
        if self.scheme in ("sequential", "fused") and self.fraction in (0.0, 1.0):
            ends = {0.0: "fp", 1.0: "scratch"}[self.fraction]  # type: ignore[index]
            raise ValueError(f"fraction {self.fraction:g} with scheme {self.scheme!r} is scheme={ends}; say that instead")
        return self


class EngineConfig(Section):
    ds_config: str = "zero1_fp32"
    """A name in ds_configs/ or the path of a DeepSpeed JSON file: ZeRO stage, precision, offload."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more arithmetic."""


class CheckpointConfig(Section):
    interval: Tokens | None = None
    """Tokens between checkpoints; null = phase boundaries and the end only."""
    keep: Positive = 2
    """How many of the interval checkpoints stay. Those at phase boundaries and in `keep_at` always stay."""
    keep_at: list[Tokens] = []
    """Further points to branch from, in tokens from the start."""


class EvaluationConfig(Section):
    interval: Tokens | None = None
    """Tokens between validations while training; null = at the end only."""
    tokens: Tokens = 1_000_000
    """Held-out tokens used, from the start of the held-out split; fewer if it has fewer."""
    ptq_bits: list[Bits] = []
    """Bit widths at which the final weights are also evaluated after post-training quantization."""


class TrackingConfig(Section):
    experiment: str = "qatscale"
    uri: str | None = None
    """null = MLFLOW_TRACKING_URI, or else SQLite in the working folder. `none` = no tracking."""


class RunConfig(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._=+-]*$")
    """Also the name of the run's folder."""
    output: Path = Path("runs")
    """Folder of run folders."""
    seed: int = 0
    """Of the initial weights."""
    tokens: Tokens
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
