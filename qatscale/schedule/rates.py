"""The peak rate of the QAT phase: a given rate, a ratio to that of full precision, or the rule behind `auto`."""

from __future__ import annotations

from qatscale.config.schema import RunConfig, Scheme


def qat_lr_ratio(scheme: Scheme, bits: float, fraction: float) -> float:
    """Peak rate of the QAT phase over that of full precision, where the recipe says `qat.lr_ratio: auto`.

    `sequential`: a_B^(1 - f/0.7) up to f = 0.7 and 1 beyond, with a_B = 3/4 * 3^-min(B, 2): 1/4 at 1 bit, 1/12 from
    2 bits on. Measured at 1, 2 and 4 bits with 86k and 199k parameters: 0.004 nats above the best of up to six rates on
    average, 0.013 at most (analysis/studies/ladder-1to1000). `fused` continues at the stable rate: 1.

    fraction: QAT's share f of all tokens.
    """
    if scheme != "sequential":
        return 1.0
    shortest = 0.75 * 3 ** -min(bits, 2.0)
    return float(f"{shortest ** max(1 - fraction / 0.7, 0.0):.3g}")


def resolved_lr_ratio(config: RunConfig, fraction: float) -> float:
    """What `qat.learning_rate`, `qat.lr_ratio` or the rule of `auto` make of the ratio."""
    qat = config.qat
    if qat.learning_rate is not None:
        return qat.learning_rate / config.optimizer.learning_rate
    return qat_lr_ratio(qat.scheme, qat.bits, fraction) if qat.lr_ratio == "auto" else qat.lr_ratio


def qat_peak(config: RunConfig, fraction: float) -> float:
    """Peak learning rate of the QAT phase. fraction: QAT's share of all tokens."""
    return config.qat.learning_rate or config.optimizer.learning_rate * resolved_lr_ratio(config, fraction)
