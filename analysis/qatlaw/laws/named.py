"""Laws with published coefficients, as their authors gave them: nothing is fitted here.

None of them contains the QAT fraction. They describe QAT from the first token, and runs that are quantized from early
on (`FROM_SCRATCH`) are taken for such. All share the full-precision part E + A/N^alpha + B/D^beta.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qatlaw.bit_widths import BIT_WIDTHS, UNQUANTIZED_BITS
from qatlaw.fraction import beyond
from qatlaw.laws.base import Floats

if TYPE_CHECKING:  # a plan does not wait for pandas
    import pandas as pd

FROM_SCRATCH = 0.85
"""Least QAT fraction at which a run is taken for QAT from scratch [ours]."""


@dataclass(frozen=True)
class Asked:
    """Runs that a law is asked about, arrays of one length."""

    N: Floats
    """Parameters without embedding and head where known: which N is meant is known of Kumar's and QuEST's alone."""
    D: Floats
    bits: Floats
    a_bits: Floats
    group: Floats
    """Weights that share a scale; NaN where unknown."""
    method: NDArray[Any]
    """Text as in `qatlaw.tables`."""
    ptq: NDArray[np.bool_]

    @classmethod
    def from_frame(cls, frame: pd.DataFrame) -> Asked:
        """Read the columns of `qatlaw.tables`. Full-precision runs have 16 bits."""
        bits = frame["bits"].where(frame["scheme"] != "fp", UNQUANTIZED_BITS)
        return cls(
            N=frame["n_non_embedding"].fillna(frame["n_params"]).to_numpy(np.float64),
            D=(frame["tokens_fp"] + frame["tokens_qat"]).to_numpy(np.float64),
            bits=bits.to_numpy(np.float64),
            a_bits=frame["a_bits"].to_numpy(np.float64),
            group=frame["group"].to_numpy(np.float64),
            method=frame["method"].to_numpy(str),
            ptq=(frame["scheme"] == "ptq").to_numpy(),
        )

    @property
    def in_full_precision(self) -> Asked:
        full, none = np.full_like(self.N, UNQUANTIZED_BITS), np.zeros(self.N.shape, bool)
        return replace(self, bits=full, a_bits=full, method=np.full(self.N.shape, ""), ptq=none)


@dataclass(frozen=True)
class NamedLaw:
    name: str
    source: str
    loss: Callable[[Asked], Floats]
    """Nats per token; NaN for runs that it does not speak of."""
    answers: str
    widths: tuple[float, ...]
    """Bits of the weights that a plan can ask it about."""
    range: Mapping[str, tuple[float, float]]
    """(low, high) of N, as the law counts it, and D in the law's own runs. A missing key is an unknown range."""
    a_bits: float = UNQUANTIZED_BITS
    method: str = ""
    """With `a_bits`: the activations that a plan asks it about."""
    second_hand: bool = False
    fitted_on: str = ""
    """The table of `qatlaw.tables` that it was fitted on."""
    needs_group: bool = False
    synthetic = False

    @property
    def label(self) -> str:
        return f"{self.name} (second-hand)" if self.second_hand else self.name

    def asked(self, N: float, D: float, widths: Sequence[float], group: float = np.nan) -> Asked:
        """QAT from scratch at each width, with the activations that it describes."""
        bits = np.array(widths, np.float64)
        same = np.ones_like(bits)
        method, ptq = np.full(bits.shape, self.method), np.zeros(bits.shape, bool)
        return Asked(N * same, D * same, bits, self.a_bits * same, group * same, method, ptq)

    def outside(self, asked: Asked) -> str | None:
        """Names what lies outside the range of its own runs."""
        outside = beyond({"N": asked.N, "D": asked.D}, self.range, "its runs:")
        return f"{self.name} is extrapolated: {', '.join(outside)}" if outside else None


def _base(E: float, A: float, alpha: float, B: float, beta: float) -> Callable[[Floats, Floats], Floats]:
    return lambda N, D: E + A / N**alpha + B / D**beta


def _integers(asked: Asked) -> NDArray[np.bool_]:
    return ~np.isin(asked.method, ("FP4", "FourEight"))


# --- Chen et al. ---

_CHEN = _base(1.9279, 237.7042, 0.3022, 596.2490, 0.3022)


def _chen(
    name: str, bits: float, a_bits: float, k: float, gamma_N: float, gamma_D: float, gamma_G: float, method: str = ""
) -> NamedLaw:
    def loss(asked: Asked) -> Floats:
        error = k * asked.D**gamma_D * np.log2(asked.group) ** gamma_G / asked.N**gamma_N
        mine = (asked.bits == bits) & (asked.a_bits == a_bits) & _integers(asked) & ~asked.ptq
        mine &= asked.method == method if method else asked.method != _FC2
        full = (asked.bits == UNQUANTIZED_BITS) & (asked.a_bits == UNQUANTIZED_BITS)
        return _CHEN(asked.N, asked.D) + np.where(full, 0.0, np.where(mine, error, np.nan))

    return NamedLaw(
        name=name,
        source="Chen et al. 2025, arXiv 2505.14302",
        loss=loss,
        answers=f"QAT from scratch with {bits:g}-bit weights, {a_bits:g}-bit activations{', ' * bool(method)}{method}",
        widths=(bits,),
        range={"N": (74e6, 973e6), "D": (10e9, 200e9)},
        needs_group=True,
        a_bits=a_bits,
        method=method,
    )


_FC2 = "FC2 input at 8 bits"

# --- Kumar et al. ---


def _kumar(asked: Asked) -> Floats:
    # Both parts of the paper's law; the key-value cache stays at 16 bits.
    share = np.ones_like(asked.N)
    trained = np.where(asked.ptq, UNQUANTIZED_BITS, asked.bits)
    for bits, gamma in ((trained, 2.6745), (asked.a_bits, 2.2102), (np.full_like(asked.N, 16.0), 0.9578)):
        share = share * -np.expm1(-bits / gamma)
    after = 0.0598 * asked.D**0.5068 / asked.N**0.3439 * np.exp(-asked.bits / 0.5907)
    loss = _base(2.7648, 4.299e3, 0.4965, 1.806e4, 0.4965)(asked.N * share, asked.D) + np.where(asked.ptq, after, 0.0)
    return np.where(_integers(asked), loss, np.nan)


# --- QuEST ---

_QUEST = {
    "weights": {1: 0.138, 2: 0.414, 3: 0.653, 4: 0.840},
    "both": {1: 0.0205, 2: 0.152, 3: 0.433, 4: 0.692, 8: 1.016},
    "unrotated": {1: 0.0156, 2: 0.0784, 3: 0.322, 4: 0.603, 8: 0.938},
    "FP4": {4: 0.630},
}
"""Share of the parameters that count, by bits."""


def _quest(asked: Asked) -> Floats:
    both = np.where(asked.method == "", "both", asked.method)
    kind = np.where(asked.a_bits == UNQUANTIZED_BITS, "weights", np.where(asked.a_bits == asked.bits, both, "other"))
    share = np.array([_QUEST.get(key, {}).get(bits, np.nan) for key, bits in zip(kind, asked.bits, strict=True)])
    full = (asked.bits == UNQUANTIZED_BITS) & (asked.a_bits == UNQUANTIZED_BITS)
    share = np.where(full, 1.0, np.where(asked.ptq, np.nan, share))
    return _base(0.0014, 8.134, 0.0627, 86.41, 0.2413)(asked.N * share, asked.D)


# --- Spectra ---


def _spectra(asked: Asked) -> Floats:
    ternary = (asked.bits == 1.58) & (asked.a_bits == UNQUANTIZED_BITS) & ~asked.ptq
    return np.where(ternary, _base(2.19, 4.73, 0.32, 5.18, 0.81)(asked.N / 1e6, asked.D / 1e9), np.nan)


NAMED: dict[str, NamedLaw] = {
    law.name: law
    for law in (
        _chen("chen-w4a16", 4, 16, 0.2522, 0.3589, 0.1610, 0.3533),
        _chen("chen-w4a4", 4, 4, 0.1582, 0.2186, 0.0745, 0.7779),
        _chen("chen-w16a4", 16, 4, 0.1004, 0.1816, 0.0331, 0.9812),
        _chen("chen-w4a4-fc2", 4, 4, 0.3519, 0.2637, 0.0964, 0.3407, _FC2),
        _chen("chen-w16a4-fc2", 16, 4, 0.1273, 0.2347, 0.0827, 0.4491, _FC2),
        NamedLaw(
            name="kumar",
            source="Kumar et al. 2024, arXiv 2411.04330, table 2; range of its runs second-hand",
            loss=_kumar,
            answers="training with weights and activations of any width, and post-training quantization of weights",
            widths=BIT_WIDTHS,
            range={"N": (30e6, 220e6), "D": (1.5e9, 26e9)},
        ),
        NamedLaw(
            name="quest",
            source="IST-DASLab/QuEST, notebook of its scaling law",
            loss=_quest,
            answers="QAT from scratch at 1 to 4 bits, weights alone; 1 to 4 and 8 bits, weights and activations",
            widths=(1, 2, 3, 4),
            range={"N": (30e6, 823e6), "D": (750e6, 80e9)},
            fitted_on="quest-runs",
        ),
        NamedLaw(
            name="spectra",
            source="Spectra 1.1, arXiv 2506.23025, second-hand; N in millions and D in billions are our deduction, "
            "since plain counts would leave both terms below .01",
            loss=_spectra,
            answers="ternary QAT from scratch; no full precision, so no gap",
            widths=(1.58,),
            range={},
            second_hand=True,
        ),
    )
}
