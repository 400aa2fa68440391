"""Training runs as a law sees them: the logarithms its power laws are linear in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qatlaw.errors import InputError

Floats = NDArray[np.float64]

FEATURES: Mapping[str, str] = {
    "N": "parameters",
    "D": "tokens, both phases together",
    "1/D": "one over the tokens: a power law that rises with them",
    "S_fp": "tokens of the full-precision phase per byte of quantized weights",
    "S_qat": "tokens of the QAT phase per byte of quantized weights",
    "2^B": "two to the bits per quantized weight",
}


@dataclass(frozen=True)
class Points:
    """Runs, broadcast to one shape; `log[name]` is the natural logarithm of the feature `name`.

    A run without QAT tokens is a full-precision run: its bits mean nothing and its quantization error is 0.
    """

    log: Mapping[str, Floats]
    quantized: NDArray[np.bool_]
    """Whether the run has QAT tokens."""
    from_scratch: NDArray[np.bool_]
    """Whether all its tokens are QAT tokens."""
    bits: Floats

    @property
    def shape(self) -> tuple[int, ...]:
        return self.quantized.shape

    @classmethod
    def of(cls, N: ArrayLike, D_fp: ArrayLike, D_qat: ArrayLike, B: ArrayLike) -> Points:
        """N parameters, D_fp and D_qat tokens, B bits per quantized weight, broadcast against each other.

        InputError where N or B is not positive, tokens are negative, both phases are empty or anything is not finite.
        """
        n, fp, qat, bits = np.broadcast_arrays(*(np.asarray(value, np.float64) for value in (N, D_fp, D_qat, B)))
        _refuse("N", n, ~(np.isfinite(n) & (n > 0)), "parameters: a positive finite number.")
        _refuse("B", bits, ~(np.isfinite(bits) & (bits > 0)), "bits per quantized weight: a positive finite number.")
        for name, tokens in (("D_fp", fp), ("D_qat", qat)):
            _refuse(name, tokens, ~(np.isfinite(tokens) & (tokens >= 0)), "tokens: a finite number, 0 or more.")
        _refuse("D_fp + D_qat", fp + qat, fp + qat == 0, "a run has tokens in at least one phase.")
        quantized = qat > 0
        log_n, log_d, log_bytes = np.log(n), np.log(fp + qat), np.log(n * bits / 8)
        # A phase without tokens has no logarithm; 0 stands there, and no law reads it (`LawForm` sees to that).
        log_fp, log_qat = np.log(np.where(fp > 0, fp, 1.0)), np.log(np.where(quantized, qat, 1.0))
        return cls(
            log={
                "N": log_n,
                "D": log_d,
                "1/D": -log_d,
                "S_fp": np.where(fp > 0, log_fp - log_bytes, 0.0),
                "S_qat": np.where(quantized, log_qat - log_bytes, 0.0),
                "2^B": bits * np.log(2.0),
            },
            quantized=quantized,
            from_scratch=quantized & (fp == 0),
            bits=bits,
        )


def _refuse(key: str, values: Floats, wrong: NDArray[np.bool_], allowed: str) -> None:
    if np.any(wrong):
        raise InputError(key, float(values[wrong][0]), allowed)
