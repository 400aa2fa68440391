"""A loss law is a sum of terms, each a coefficient times a shape, with an analytic gradient.

    L(N, D_fp, D_qat, B) = sum over terms of  coefficient * shape(exponents; run)

Given the exponents, the coefficients are a linear least-squares problem, which makes a law cheap to fit.

Units: N parameters, D tokens, B bits per quantized weight, L nats per token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qatlaw.errors import InputError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Points:
    """Runs, broadcast to one shape.

    A run without QAT tokens is a full-precision run: its bits are ignored and it has no quantization error.
    """

    log: Mapping[str, Floats]
    """Natural logarithms by feature: N parameters, D tokens of both phases, S_fp and S_qat tokens of a phase per byte
    of quantized weights, 1/D for a power law that rises with tokens, 2^B for one that falls with bits."""
    quantized: NDArray[np.bool_]
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
        for name, values, sound, allowed in (
            ("N", n, n > 0, "is not a positive finite number of parameters."),
            ("B", bits, bits > 0, "is not a positive finite number of bits."),
            ("D_fp", fp, fp >= 0, "is not a finite number of tokens, 0 or more."),
            ("D_qat", qat, qat >= 0, "is not a finite number of tokens, 0 or more."),
            ("D_fp + D_qat", fp + qat, fp + qat > 0, "leaves the run without tokens."),
        ):
            wrong = ~(np.isfinite(values) & sound)
            if np.any(wrong):
                raise InputError(name, float(values[wrong][0]), allowed)
        log_n, log_d, log_bytes = np.log(n), np.log(fp + qat), np.log(n * bits / 8)
        # A phase without tokens has no logarithm: the 0 in its place is never read (`LawForm.describes`).
        log_fp, log_qat = np.log(np.where(fp > 0, fp, 1.0)), np.log(np.where(qat > 0, qat, 1.0))
        return cls(
            log={
                "N": log_n,
                "D": log_d,
                "1/D": -log_d,
                "S_fp": np.where(fp > 0, log_fp - log_bytes, 0.0),
                "S_qat": np.where(qat > 0, log_qat - log_bytes, 0.0),
                "2^B": bits * np.log(2.0),
            },
            quantized=qat > 0,
            from_scratch=(qat > 0) & (fp == 0),
            bits=bits,
        )


@dataclass(frozen=True)
class Parameter:
    """A coefficient or an exponent of a law."""

    name: str
    low: float
    high: float
    log: bool
    """Whether it is a coefficient, which is fitted by its logarithm."""
    meaning: str
    start: tuple[float, float] = (0.0, 0.0)
    """Exponents only: the range of the cold starts. Coefficients follow from the exponents."""


def coefficient(name: str, meaning: str) -> Parameter:
    """The factor of a term: positive, and away from the smallest and largest doubles."""
    return Parameter(name, 1e-300, 1e300, log=True, meaning=meaning)


def exponent(name: str, low: float, high: float, start: tuple[float, float], meaning: str) -> Parameter:
    return Parameter(name, low, high, log=False, meaning=meaning, start=start)


@dataclass(frozen=True)
class Term:
    """coefficient * product of feature^(-exponent)."""

    coefficient: str
    powers: tuple[tuple[str, str], ...] = ()
    """(exponent, feature) pairs; features as in `Points.log`."""
    quantized_only: bool = False
    """Whether full-precision runs lack the term."""

    @property
    def exponents(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.powers)

    @property
    def features(self) -> tuple[str, ...]:
        return tuple(feature for _, feature in self.powers)

    def log_shape(self, values: Mapping[str, float], points: Points) -> Floats:
        """Logarithm of the term without its coefficient; `values` by parameter name."""
        total = np.zeros(points.shape)
        for name, feature in self.powers:
            total -= values[name] * points.log[feature]
        return total

    def slopes(self, values: Mapping[str, float], points: Points) -> dict[str, Floats]:  # noqa: ARG002 - see rivals
        """d log_shape / d exponent, by the exponent's name."""
        return {name: -points.log[feature] for name, feature in self.powers}


@dataclass(frozen=True)
class LawForm:
    """A family of laws: the names of its parameters and how they make a loss. `Law` binds their values."""

    name: str
    source: str
    formula: str
    parameters: tuple[Parameter, ...]
    terms: tuple[Term, ...]
    quantized: bool = True
    """Whether it describes runs with QAT tokens."""
    one_width: bool = False
    """Whether it has no term in B, and is fitted once per bit width."""
    has_fraction: bool = False
    """Whether its loss depends on how the tokens are split, so that an optimal fraction exists."""

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(parameter.name for parameter in self.parameters)

    @cached_property
    def index(self) -> Mapping[str, int]:
        return {name: i for i, name in enumerate(self.names)}

    @cached_property
    def level_parameters(self) -> tuple[str, ...]:
        """Parameters of the terms that are equal for all runs of one size: differences within a size ignore them."""
        constant = [term for term in self.terms if not term.quantized_only and set(term.features) <= {"N"}]
        return tuple(name for term in constant for name in (term.coefficient, *term.exponents))

    def loss(self, theta: ArrayLike, N: ArrayLike, D_fp: ArrayLike, D_qat: ArrayLike, B: ArrayLike) -> Floats:
        """Loss in nats per token; the last four broadcast. D_qat = 0 is a full-precision run, whatever B.

        InputError where the law is not defined: see `Points.of` and `describes`.
        """
        return self.loss_at(theta, Points.of(N, D_fp, D_qat, B))

    def describes(self, points: Points) -> NDArray[np.bool_]:
        """Which runs the law is defined for.

        A law without quantization describes full-precision runs only. A term in S_fp diverges for QAT from scratch.
        """
        if not self.quantized:
            return ~points.quantized
        if any("S_fp" in term.features for term in self.terms):
            return ~points.from_scratch
        return np.ones(points.shape, dtype=bool)

    def loss_at(self, theta: ArrayLike, points: Points) -> Floats:
        """`loss` of points that exist already: a fit evaluates the same ones many times."""
        self._refuse_undescribed(points)
        values = self.values(theta)
        total = np.zeros(points.shape)
        for term in self.terms:
            total += values[term.coefficient] * self.shape_of(term, values, points)
        return total

    def loss_and_gradient_at(self, theta: ArrayLike, points: Points) -> tuple[Floats, Floats]:
        """loss [...], d loss / d theta [..., parameters]."""
        self._refuse_undescribed(points)
        values = self.values(theta)
        total, gradient = np.zeros(points.shape), np.zeros((*points.shape, len(self.parameters)))
        for term in self.terms:
            shape = self.shape_of(term, values, points)
            part = values[term.coefficient] * shape
            total += part
            gradient[..., self.index[term.coefficient]] += shape
            for name, slope in term.slopes(values, points).items():
                gradient[..., self.index[name]] += part * slope
        return total, gradient

    def shape_of(self, term: Term, values: Mapping[str, float], points: Points) -> Floats:
        """The term with coefficient 1."""
        shape = np.exp(term.log_shape(values, points))
        return np.where(points.quantized, shape, 0.0) if term.quantized_only else shape

    def optimal_fraction(self, theta: ArrayLike, N: ArrayLike, D_total: ArrayLike, B: ArrayLike) -> Floats:  # noqa: ARG002
        """The fraction of QAT tokens with the lowest loss. InputError for laws that do not depend on the split."""
        fix = "Choose qat_unified or qat_per_bits."
        raise InputError("form", self.name, "does not depend on how the tokens are split.", fix)

    def values(self, theta: ArrayLike) -> dict[str, float]:
        numbers = np.asarray(theta, np.float64)
        if numbers.shape != (len(self.parameters),):
            raise InputError("theta", numbers.shape, f"is the wrong shape: {self.name} has {', '.join(self.names)}.")
        return dict(zip(self.names, numbers.tolist(), strict=True))

    def bind(self, coefficients: Mapping[str, float]) -> Law:
        """The law with these coefficients, by name. InputError for unknown, missing or unsound ones."""
        for name, value in coefficients.items():
            if name not in self.names:
                known = f"Its parameters are {', '.join(self.names)}."
                raise InputError(f"coefficients.{name}", value, f"does not belong to {self.name}.", known)
        missing = [name for name in self.names if name not in coefficients]
        if missing:
            raise InputError("coefficients", None, f"{self.name} also needs {', '.join(missing)}.")
        return Law(self, tuple(float(coefficients[name]) for name in self.names))

    def _refuse_undescribed(self, points: Points) -> None:
        if np.all(self.describes(points)):
            return
        if not self.quantized:
            raise InputError("D_qat", None, f"{self.name} describes full-precision runs only.", "Set D_qat to 0.")
        problem = f"{self.name} has no finite loss without full-precision tokens: its interaction term diverges there."
        raise InputError("D_fp", 0.0, problem, "Ask for a fraction below 1.")


@dataclass(frozen=True)
class Law:
    """A form with its coefficients."""

    form: LawForm
    theta: tuple[float, ...]

    def __post_init__(self) -> None:
        for parameter, value in zip(self.form.parameters, self.theta, strict=True):
            if not (math.isfinite(value) and parameter.low <= value <= parameter.high):
                allowed = f"is outside {parameter.low:g} to {parameter.high:g} ({parameter.meaning})."
                raise InputError(f"coefficients.{parameter.name}", value, allowed)

    def loss(self, N: ArrayLike, D_fp: ArrayLike, D_qat: ArrayLike, B: ArrayLike) -> Floats:
        return self.form.loss(self.theta, N, D_fp, D_qat, B)

    def optimal_fraction(self, N: ArrayLike, D_total: ArrayLike, B: ArrayLike) -> Floats:
        return self.form.optimal_fraction(self.theta, N, D_total, B)

    @property
    def coefficients(self) -> dict[str, float]:
        return self.form.values(self.theta)
