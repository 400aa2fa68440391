"""The table of `quant/bit_widths.py` again, one Python float at a time: the tests' float64 reference."""

from __future__ import annotations

import math

from qatlaw.bit_widths import BIT_WIDTHS as BITS


def value_and_slopes(w: float, alpha: float, bits: float) -> tuple[float, float, float]:
    """(quantized weight, dŵ/dw, dŵ/dα) of one weight. Python's round is half to even, as torch's."""
    a = max(alpha, 1e-5)
    v = w / a
    if bits == 1:
        sign = 1.0 if w >= 0 else -1.0
        return sign * a, 1.0, sign
    if bits in (1.58, 2):
        clipped = min(max(v, -0.99), 0.99)
        q = round(1.5 * clipped) / 1.5 if bits == 1.58 else (round(2 * clipped - 0.5) + 0.5) / 2
        outside = 1.0 if bits == 1.58 else 0.75
        inside = abs(v) <= 0.99
        return q * a, float(inside), q - v if inside else math.copysign(outside, v)
    qn, qp = 2 ** (int(bits) - 1), 2 ** (int(bits) - 1) - 1
    q = min(max(round(v), -qn), qp)
    if v < -qn:
        return q * a, 0.0, -qn
    if v > qp:
        return q * a, 0.0, qp
    return q * a, 1.0, q - v


def qp_of(bits: float) -> int:
    return 1 if bits <= 2 else 2 ** (int(bits) - 1) - 1


def initial_alpha(row: list[float], bits: float) -> float:
    sizes = [abs(w) for w in row]
    return sum(sizes) / len(sizes) if bits == 1 else max(sizes) / qp_of(bits)


LEVELS = {
    1: [-1, 1],
    1.58: [-2 / 3, 0, 2 / 3],
    2: [-0.75, -0.25, 0.25, 0.75],
    **{b: list(range(-(2 ** (int(b) - 1)), 2 ** (int(b) - 1))) for b in BITS[3:]},
}
"""In units of α."""
CODES = {**LEVELS, 1.58: [-1, 0, 1], 2: [-2, -1, 0, 1]}
"""Ascending. For LSQ and 1 bit, codes are levels."""
