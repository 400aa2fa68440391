"""The peak rate of the QAT phase: a given rate, a ratio to that of full precision, or the rule behind `auto`."""

from __future__ import annotations

from qatscale.config.schema import RunConfig, Scheme


def qat_lr_ratio(scheme: Scheme, bits: float, fraction: float) -> float:  # noqa: ARG001 - what a rule may depend on
    """Peak rate of the QAT phase over that of full precision, where the recipe says `qat.lr_ratio: auto`.

    fraction: QAT's share of all tokens. The rule is 1, the published set-up: QAT at the full-precision rate.
    """
    return 1.0


def resolved_lr_ratio(config: RunConfig, fraction: float) -> float:
    """What `qat.learning_rate`, `qat.lr_ratio` or the rule of `auto` make of the ratio."""
    qat = config.qat
    if qat.learning_rate is not None:
        return qat.learning_rate / config.optimizer.learning_rate
    return qat_lr_ratio(qat.scheme, qat.bits, fraction) if qat.lr_ratio == "auto" else qat.lr_ratio


def qat_peak(config: RunConfig, fraction: float) -> float:
    """Peak learning rate of the QAT phase. fraction: QAT's share of all tokens."""
    return config.qat.learning_rate or config.optimizer.learning_rate * resolved_lr_ratio(config, fraction)
