"""QAT's share of a run: the recipe's, or with `auto` the planner's optimum within what the scheme can hold."""

from __future__ import annotations

from qatlaw.fraction import extrapolation_warning, optimal_fraction, tokens_per_parameter_byte
from qatscale.config.schema import RunConfig
from qatscale.config.sizes import count_parameters
from qatscale.errors import UserError
from qatscale.schedule.lengths import Length, full_precision_lengths, qat_lengths, shortest_phase


def planned_fraction(config: RunConfig) -> tuple[float, tuple[str, ...]]:
    """QAT's share of all tokens before rounding to steps, and warnings about it.

    `auto` is the planner's optimum with N = all parameters (a tied embedding once), D = `tokens`, B = `qat.bits`: what
    `qatscale plan` answers. The scheme's warm-ups and cooldowns may need a longer or shorter QAT phase, and the closed
    form has no optimum at S <= 1. `auto` is then the nearest share that holds them.
    """
    qat = config.qat
    if qat.scheme in ("fp", "scratch"):
        return float(qat.scheme == "scratch"), ()
    if qat.fraction != "auto":
        return qat.fraction, ()
    params = count_parameters(config.model)
    S = tokens_per_parameter_byte(params, config.tokens, qat.bits)
    optimum, warning = 0.0, None
    said = f"the planner's closed form has no optimum at {S:.3g} tokens per parameter byte, only above 1"
    if S > 1:
        optimum = optimal_fraction(params, config.tokens, qat.bits)
        warning = extrapolation_warning(params, config.tokens, qat.bits)
        said = f"the planner's optimum is {optimum:.4f}"
    warnings = () if warning is None else (warning,)
    fraction = nearest_fraction(config, optimum)
    if fraction == optimum:
        return fraction, tuple(f"qat.fraction=auto is {fraction:.4f}, but {text}" for text in warnings)
    bound, phase = ("least", "QAT") if fraction > optimum else ("most", "full-precision")
    return fraction, (
        f"qat.fraction=auto is {fraction:.4f}, the {bound} at which the {phase} phase holds its warm-up and cooldown; "
        f"{said}",
        *warnings,
    )


def nearest_fraction(config: RunConfig, optimum: float) -> float:
    """`optimum`, or the nearest share in full steps whose two phases hold their warm-ups and cooldowns.

    UserError where a run has one step, too short for two phases.
    """
    check_two_phases(config)
    steps = config.steps
    asked = steps - round((1 - optimum) * steps)
    least, most = qat_bounds(config)
    held = min(max(asked, least), most)
    return optimum if held == asked else held / steps


def qat_bounds(config: RunConfig) -> tuple[int, int]:
    """Steps of the shortest and of the longest QAT phase whose run holds its lengths; crossed where none does.

    Defaults other than the cooldown of the QAT phase do not count: they take what is left.
    """
    steps = config.steps

    def qat(size: int) -> list[Length]:
        return [length for length in qat_lengths(config, size) if length.is_cooldown or not length.is_default]

    def full_precision(size: int) -> list[Length]:
        return [length for length in full_precision_lengths(config, size) if not length.is_default]

    return shortest_phase(qat, steps - 1), steps - shortest_phase(full_precision, steps - 1)


def check_two_phases(config: RunConfig) -> None:
    if config.steps < 2:
        problem = "one optimizer step is too short for two phases."
        raise UserError("tokens", config.tokens, problem, "Train on more tokens.")
