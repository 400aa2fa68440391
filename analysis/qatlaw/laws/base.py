"""What a loss law is: a sum of terms, each a coefficient times a shape, with an analytic gradient.

    L(N, D_fp, D_qat, B) = sum over terms of  coefficient * shape(exponents; run)

All laws here have that form, which is what makes them cheap to fit: with the exponents given, the coefficients are a
linear least-squares problem.

Units: N parameters, D tokens, B bits per quantized weight, L nats per token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from qatlaw.errors import InputError
from qatlaw.laws.points import Floats, Points


@dataclass(frozen=True)
class Parameter:
    """One coefficient or exponent of a law, in its natural unit."""

    name: str
    low: float
    high: float
    log: bool
    """Whether it is a scale: fitted by its logarithm."""
    meaning: str
    start: tuple[float, float] = (0.0, 0.0)
    """Exponents only: the range cold starts are drawn from. Coefficients need none: they follow from the exponents."""


def coefficient(name: str, meaning: str) -> Parameter:
    """A term's factor: positive, and away from the ends of doubles, where terms turn into 0 and infinity."""
    return Parameter(name, 1e-300, 1e300, log=True, meaning=meaning)


def exponent(name: str, low: float, high: float, start: tuple[float, float], meaning: str) -> Parameter:
    return Parameter(name, low, high, log=False, meaning=meaning, start=start)


class Term(Protocol):
    """One summand of a law. `values` maps parameter names to their values."""

    @property
    def coefficient(self) -> str: ...
    @property
    def exponents(self) -> tuple[str, ...]: ...
    @property
    def features(self) -> tuple[str, ...]: ...
    @property
    def quantized_only(self) -> bool: ...
    def log_shape(self, values: Mapping[str, float], points: Points) -> Floats: ...
    def slopes(self, values: Mapping[str, float], points: Points) -> dict[str, Floats]:
        """d log_shape / d exponent, by the exponent's name."""
        ...


@dataclass(frozen=True)
class PowerTerm:
    """coefficient * product of feature^(-exponent); 0 for full-precision runs where `quantized_only`."""

    coefficient: str
    powers: tuple[tuple[str, str], ...] = ()
    """(exponent, feature) pairs; features as in `qatlaw.laws.points.FEATURES`."""
    quantized_only: bool = False

    @property
    def exponents(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.powers)

    @property
    def features(self) -> tuple[str, ...]:
        return tuple(feature for _, feature in self.powers)

    def log_shape(self, values: Mapping[str, float], points: Points) -> Floats:
        total = np.zeros(points.shape)
        for name, feature in self.powers:
            total -= values[name] * points.log[feature]
        return total

    def slopes(self, values: Mapping[str, float], points: Points) -> dict[str, Floats]:  # noqa: ARG002 - Term
        return {name: -points.log[feature] for name, feature in self.powers}


@dataclass(frozen=True)
class LawForm:
    """A family of laws: what its coefficients are called and how they make a loss. `Law` binds their values."""

    name: str
    source: str
    formula: str
    parameters: tuple[Parameter, ...]
    terms: tuple[Term, ...]
    quantized: bool = True
    """Whether it says anything of runs with QAT tokens."""
    one_width: bool = False
    """Whether it describes one bit width at a time: it has no term in B, and is fitted once per width."""
    has_fraction: bool = False
    """Whether its loss depends on how the tokens are split, so that there is an optimal fraction."""

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(parameter.name for parameter in self.parameters)

    @cached_property
    def index(self) -> Mapping[str, int]:
        return {name: i for i, name in enumerate(self.names)}

    @cached_property
    def level_parameters(self) -> tuple[str, ...]:
        """Of the terms that are the same for all runs of one size: no difference between these runs depends on them."""
        constant = [term for term in self.terms if not term.quantized_only and set(term.features) <= {"N"}]
        return tuple(name for term in constant for name in (term.coefficient, *term.exponents))

    def loss(self, theta: ArrayLike, N: ArrayLike, D_fp: ArrayLike, D_qat: ArrayLike, B: ArrayLike) -> Floats:
        """Loss in nats per token; the four broadcast. D_qat = 0 is a full-precision run, whatever B.

        InputError where the law is not defined: see `Points.of` and `describes`.
        """
        return self.loss_at(theta, Points.of(N, D_fp, D_qat, B))

    def gradient(self, theta: ArrayLike, N: ArrayLike, D_fp: ArrayLike, D_qat: ArrayLike, B: ArrayLike) -> Floats:
        """d loss / d theta, [..., parameters]."""
        return self.loss_and_gradient_at(theta, Points.of(N, D_fp, D_qat, B))[1]

    def describes(self, points: Points) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which runs the law is defined for.

        A law without quantization describes full-precision runs only. A term in S_fp diverges where no token was
        trained in full precision, so that QAT from scratch lies outside of such a law (its limit is infinite).
        """
        if not self.quantized:
            return ~points.quantized
        if any("S_fp" in term.features for term in self.terms):
            return ~points.from_scratch
        return np.ones(points.shape, dtype=bool)

    def loss_at(self, theta: ArrayLike, points: Points) -> Floats:
        """`loss` of points that were made before; for the fit, which asks again and again."""
        self._refuse_undescribed(points)
        values = self.values(theta)
        total = np.zeros(points.shape)
        for term in self.terms:
            part = values[term.coefficient] * np.exp(term.log_shape(values, points))
            total += np.where(points.quantized, part, 0.0) if term.quantized_only else part
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
        """A term with coefficient 1; 0 for full-precision runs where the term is one of quantization."""
        shape = np.exp(term.log_shape(values, points))
        return np.where(points.quantized, shape, 0.0) if term.quantized_only else shape

    def optimal_fraction(self, theta: ArrayLike, N: ArrayLike, D_total: ArrayLike, B: ArrayLike) -> Floats:  # noqa: ARG002
        """The fraction of QAT tokens with the lowest loss; InputError for laws that do not depend on the split."""
        raise InputError(
            "form",
            self.name,
            "its loss does not depend on how the tokens are split.",
            "Choose a form of qatlaw.laws.qat.",
        )

    def values(self, theta: ArrayLike) -> dict[str, float]:
        numbers = np.asarray(theta, np.float64)
        if numbers.shape != (len(self.parameters),):
            raise InputError("theta", numbers.shape, f"{self.name} has {len(self.parameters)} numbers: {self.names}.")
        return dict(zip(self.names, numbers.tolist(), strict=True))

    def bind(self, coefficients: Mapping[str, float]) -> Law:
        """The law with these coefficients, by name. InputError for unknown, missing or unsound ones."""
        for name in coefficients:
            if name not in self.names:
                raise InputError(
                    f"coefficients.{name}", coefficients[name], f"{self.name} has {', '.join(self.names)}."
                )
        missing = [name for name in self.names if name not in coefficients]
        if missing:
            raise InputError("coefficients", None, f"{self.name} also needs {', '.join(missing)}.")
        return Law(self, tuple(float(coefficients[name]) for name in self.names))

    def _refuse_undescribed(self, points: Points) -> None:
        if np.all(self.describes(points)):
            return
        if not self.quantized:
            raise InputError("D_qat", None, f"{self.name} describes full-precision runs only: D_qat = 0.")
        raise InputError(
            "D_fp",
            0.0,
            f"{self.name} has no finite loss without full-precision tokens: its interaction term diverges there.",
            "Ask for a fraction below 1.",
        )


@dataclass(frozen=True)
class Law:
    """A form with its coefficients."""

    form: LawForm
    theta: tuple[float, ...]

    def __post_init__(self) -> None:
        for parameter, value in zip(self.form.parameters, self.theta, strict=True):
            if not (math.isfinite(value) and parameter.low <= value <= parameter.high):
                raise InputError(
                    f"coefficients.{parameter.name}",
                    value,
                    f"{parameter.meaning}: {parameter.low:g} to {parameter.high:g}, where the law is sound.",
                )

    def loss(self, N: ArrayLike, D_fp: ArrayLike, D_qat: ArrayLike, B: ArrayLike) -> Floats:
        return self.form.loss(self.theta, N, D_fp, D_qat, B)

    def gradient(self, N: ArrayLike, D_fp: ArrayLike, D_qat: ArrayLike, B: ArrayLike) -> Floats:
        return self.form.gradient(self.theta, N, D_fp, D_qat, B)

    def optimal_fraction(self, N: ArrayLike, D_total: ArrayLike, B: ArrayLike) -> Floats:
        return self.form.optimal_fraction(self.theta, N, D_total, B)

    @property
    def coefficients(self) -> dict[str, float]:
        return self.form.values(self.theta)

    def to_dict(self) -> dict[str, Any]:
        return {"form": self.form.name, "coefficients": self.coefficients}
