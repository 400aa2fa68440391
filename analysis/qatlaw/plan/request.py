"""What is asked on a command line: which options make which question, and what is missing or too much."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from qatlaw.default import PlannerLaw
from qatlaw.errors import LawError
from qatlaw.plan.budget import FLOPS_PER_PARAMETER, Budget
from qatlaw.plan.run import Scheme
from qatlaw.plan.run_folder import Trained

WIDTHS: tuple[float, ...] = (1, 1.58, 2, 3, 4, 5, 6, 8)
"""That quantizers of qatscale have; shown where no width is asked for."""

Question = Literal["run", "memory", "compare", "budget", "checkpoint", "fusion"]


@dataclass(frozen=True)
class Request:
    """The options, in plain counts; None is not given. Each field is named as its option, if that is not said here."""

    params: float | None = None
    tokens: float | None = None
    bits: float | None = None
    fraction: float | None = None
    compare: str | None = None
    """`fp`."""
    tolerance: float | None = None
    """Nats per token."""
    memory: float | None = None
    """Bytes."""
    vocab_size: float | None = None
    from_checkpoint: Trained | None = None
    trained_tokens: float | None = None
    flops: float | None = None
    gpu_hours: float | None = None
    gpus: float | None = None
    peak_flops: float | None = None
    """Of one GPU, per second."""
    mfu: float | None = None
    qat_mfu: float | None = None
    qat_overhead: float | None = None
    tokens_per_second_fp: float | None = None
    tokens_per_second_qat: float | None = None
    fused_loss: float | None = None
    sequential_loss: float | None = None
    batch_tokens: float | None = None
    """Tokens of an optimizer step."""
    recipe: str | None = None
    """A recipe that params and batch_tokens were taken from."""
    flops_per_token: float | None = None
    """Of the recipe's model; None: 6 N. No option."""
    scheme: Scheme | None = None
    """That of the recipe; None: sequential. No option."""
    law: PlannerLaw | None = None

    def given(self) -> list[str]:
        return [field.name for field in fields(self) if getattr(self, field.name) is not None]

    @property
    def widths(self) -> tuple[float, ...]:
        """The width asked for, or all that the law speaks of."""
        if self.bits is not None:
            return (self.bits,)
        if self.law is not None and self.law.law.form.one_width:
            low, high = self.law.range["bits"]
            return tuple(width for width in WIDTHS if low <= width <= high)
        return WIDTHS


_ALWAYS = {"law", "bits", "recipe", "flops_per_token", "scheme"}
_TRIGGERS: dict[str, Question] = {
    "memory": "memory",
    "compare": "compare",
    "flops": "budget",
    "gpu_hours": "budget",
    "from_checkpoint": "checkpoint",
    "trained_tokens": "checkpoint",
    "fused_loss": "fusion",
    "sequential_loss": "fusion",
}
_NEEDS: dict[Question, dict[str, str]] = {
    "run": {"params": "Add --params 396M.", "tokens": "Add --tokens 100B.",
            "bits": "Add --bits 4, or --compare fp for all widths."},
    "memory": {"tokens": "Add --tokens 100B."},
    "compare": {"params": "Add --params 396M.", "tokens": "Add --tokens 100B."},
    "budget": {},
    "checkpoint": {"params": "Add --params 396M."},
    "fusion": {"params": "Add --params 396M.", "tokens": "Add --tokens 100B.", "bits": "Add --bits 4.",
               "fused_loss": "Add --fused-loss 2.31.", "sequential_loss": "Add --sequential-loss 2.32.",
               "law": "Add --law fit.json: what a difference of losses is worth in tokens is for a law to say."},
}  # fmt: skip
_TAKES: dict[Question, set[str]] = {
    "run": {"params", "tokens", "fraction", "batch_tokens"},
    "memory": {"memory", "tokens", "vocab_size"},
    "compare": {"compare", "params", "tokens", "tolerance", "batch_tokens"},
    "budget": {"params", "flops", "gpu_hours", "gpus", "peak_flops", "mfu", "qat_mfu", "qat_overhead",
               "tokens_per_second_fp", "tokens_per_second_qat"},
    "checkpoint": {"params", "from_checkpoint", "trained_tokens", "batch_tokens"},
    "fusion": {"params", "tokens", "fused_loss", "sequential_loss"},
}  # fmt: skip
_WHY: dict[tuple[Question, str], str] = {
    ("memory", "params"): "--memory asks for the size.",
    ("memory", "recipe"): "--memory asks for the size; a recipe has one.",
    ("budget", "tokens"): "the budget says how many tokens there are.",
    ("checkpoint", "tokens"): "the checkpoint's tokens and the fraction say how many there are.",
}
EXAMPLES = "--params 396M --tokens 100B --bits 4"


def option(name: str) -> str:
    return "--" + name.replace("_", "-")


def question_of(request: Request) -> Question:
    """Which question the options ask. LawError where they ask two, lack something, or hold what has no effect."""
    given = request.given()
    triggers = {_TRIGGERS[name]: name for name in given if name in _TRIGGERS}
    if len(triggers) > 1:
        names = " and ".join(option(name) for name in triggers.values())
        raise LawError(names, None, "ask different questions.", "Leave one of them out.")
    if not triggers and not set(given) & {"params", "tokens", "bits"}:
        raise LawError("plan", None, "nothing was asked.", f"Try {EXAMPLES}; `--help` lists the other questions.")
    question: Question = next(iter(triggers), "run")
    if question == "memory" and request.recipe is not None:
        raise LawError("--recipe", request.recipe, _WHY["memory", "recipe"], "Leave it out.")
    told_by_recipe = {"batch_tokens"} if request.recipe is not None else set()
    for name in given:
        if name not in _TAKES[question] | _ALWAYS | told_by_recipe:
            if not triggers:
                raise LawError(option(name), None, f"belongs to {_owner(name)}.", "Add that, or leave this out.")
            why = _WHY.get((question, name), f"has no effect with {option(triggers[question])}.")
            raise LawError(option(name), None, why, "Leave it out.")
    for name, do in _NEEDS[question].items():
        if getattr(request, name) is None:
            raise LawError(option(name), None, "is needed.", do)
    for name, what in (("fraction", "to judge a fraction"), ("tolerance", "to know what a width loses")):
        if getattr(request, name) is not None and request.law is None:
            raise LawError(option(name), None, f"takes a loss law {what}.", "Add --law fit.json, or leave this out.")
    _check_values(request)
    return question


def _owner(name: str) -> str:
    """The option that gives another one its meaning."""
    owners = {"tolerance": "--compare fp", "vocab_size": "--memory"}
    return owners.get(name, "--gpu-hours or --flops")


def _check_values(request: Request) -> None:
    for name in ("mfu", "qat_mfu"):
        value = getattr(request, name)
        if value is not None and not 0 < value <= 1:
            raise LawError(option(name), value, "a share of the peak, above 0 and at most 1: 0.4.")
    if request.fraction is not None and not 0 < request.fraction < 1:
        raise LawError("--fraction", request.fraction, "a share of the tokens between 0 and 1: 0.25.")
    if request.bits is not None and not 1 <= request.bits <= 16:
        raise LawError("--bits", request.bits, "bits per quantized weight, 1 or more: 4.")
    if request.compare not in (None, "fp"):
        raise LawError("--compare", request.compare, "fp: QAT at each bit width against full precision.")
    for name in ("qat_overhead", "tokens_per_second_fp", "tokens_per_second_qat", "fused_loss", "sequential_loss",
                 "tolerance"):  # fmt: skip
        value = getattr(request, name)
        if value is not None and not value > 0:
            raise LawError(option(name), value, "a number above 0.")
    if request.from_checkpoint is not None and request.trained_tokens is not None:
        raise LawError("--trained-tokens", request.trained_tokens, "is told by the checkpoint.", "Leave it out.")
    if request.batch_tokens is not None and request.tokens is not None and request.batch_tokens > request.tokens:
        raise LawError("--batch-tokens", request.batch_tokens, f"is more than all {request.tokens:g} tokens.")


def cost_rule(request: Request) -> tuple[float, str, float, float, bool]:
    """(amount, unit, cost of a full-precision token, of a QAT token, whether they scale with the parameters).

    Costs that scale are per parameter. LawError where the speed is not said, or said twice.
    """
    speeds = (request.tokens_per_second_fp, request.tokens_per_second_qat)
    if request.flops is not None:
        if request.gpu_hours is not None:
            raise LawError("--flops and --gpu-hours", None, "are two budgets.", "Leave one of them out.")
        for name in ("gpus", "peak_flops", "mfu", "qat_mfu", "tokens_per_second_fp", "tokens_per_second_qat"):
            if getattr(request, name) is not None:
                raise LawError(option(name), None, "has no effect with --flops.", "Give --gpu-hours instead.")
        return request.flops, "FLOPs", FLOPS_PER_PARAMETER, FLOPS_PER_PARAMETER * (request.qat_overhead or 1.0), True
    assert request.gpu_hours is not None
    if any(speeds):
        if not all(speeds):
            missing = option("tokens_per_second_qat" if speeds[0] else "tokens_per_second_fp")
            raise LawError(missing, None, "is needed too: both phases were measured, or neither.", f"Add {missing}.")
        for name in ("peak_flops", "mfu", "qat_mfu", "qat_overhead"):
            if getattr(request, name) is not None:
                raise LawError(option(name), None, "is told by the measured tokens per second.", "Leave it out.")
        costs = [(request.gpus or 1.0) / speed / 3600 for speed in speeds if speed]
        return request.gpu_hours, "GPU-hours", costs[0], costs[1], False
    if request.peak_flops is None or request.mfu is None:
        do = "Add --gpu H200 --mfu 0.4, or the measured --tokens-per-second-fp and --tokens-per-second-qat."
        raise LawError("--gpu-hours", request.gpu_hours, "says nothing without a speed.", do)
    if request.gpus is not None:
        do = "Leave it out: hours of all GPUs together are asked for."
        raise LawError("--gpus", request.gpus, "belongs to measured tokens per second.", do)
    if request.qat_mfu is not None and request.qat_overhead is not None:
        raise LawError("--qat-mfu and --qat-overhead", None, "say the same thing twice.", "Leave one of them out.")
    overhead = request.qat_overhead or (request.mfu / request.qat_mfu if request.qat_mfu else 1.0)
    cost = FLOPS_PER_PARAMETER / (request.peak_flops * request.mfu) / 3600
    return request.gpu_hours, "GPU-hours", cost, cost * overhead, True


def budget_of(request: Request, params: float) -> Budget:
    """The budget, for a model of `params` parameters."""
    amount, unit, fp, qat, scales = cost_rule(request)
    factor = 1.0
    if scales:
        factor = params if request.flops_per_token is None else request.flops_per_token / FLOPS_PER_PARAMETER
    return Budget(amount, unit, fp * factor, qat * factor)


def overhead_known(request: Request) -> bool:
    """Whether it was said what a QAT token costs."""
    return any(value is not None for value in (request.qat_overhead, request.qat_mfu, request.tokens_per_second_qat))
