"""The loss law that a plan stands on, with the range of its runs.

A command line names a law: `synthetic`, or the path of a `fit.json`. Without one, or with one of `FRACTION_LAWS`, plans
stand on a closed form of the optimal fraction (`FractionLaw`), which predicts no losses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qatlaw import synthetic
from qatlaw.amounts import amount
from qatlaw.bit_widths import BIT_WIDTHS, bits_label
from qatlaw.errors import InputError
from qatlaw.fraction import MEASURED, ROUNDING, beyond, tokens_per_parameter_byte
from qatlaw.fraction_laws import FRACTION_LAWS, PAPER, FractionLaw
from qatlaw.laws.base import Law
from qatlaw.laws.named import NAMED
from qatlaw.laws.nominal import EffectiveBits, NominalForm
from qatlaw.text import plural

if TYPE_CHECKING:  # a plan by no fit.json does not wait for pydantic
    from qatlaw.fit_file import Bootstrap

_RANGES = {"N": "n_params", "D": "tokens", "B": "bits", "S": "s_total"}
"""Symbol to key of a fit.json's ranges."""
SYNTHETIC = "synthetic"
SYNTHETIC_WARNING = "every prediction here comes from a made-up law, for demonstration: plan nothing by it"


@dataclass(frozen=True)
class PlannerLaw:
    """A law with its source and the range of its runs."""

    law: Law
    source: str
    """Where it comes from, in words."""
    range: Mapping[str, tuple[float, float]]
    """(low, high) of n_params, tokens, bits and s_total in the runs behind it; a missing key is an unknown range."""
    synthetic: bool = False
    """Whether the law, or the runs behind it, are made up."""
    bootstrap: Bootstrap | None = None
    sizes: tuple[float, ...] = ()
    """N of the runs behind it; empty where unknown."""
    effective: EffectiveBits | None = None
    """Gives a model's effective bits where the law was fitted on them. `law` and the methods here take nominal ones."""

    def optimal_fraction(self, N: float, D: float, B: float) -> float:
        return float(self.law.optimal_fraction(N, D, B))

    @property
    def widths(self) -> tuple[float, ...]:
        """Bit widths that it describes."""
        low, high = self.range["bits"] if self.law.form.one_width else (0, float("inf"))
        return tuple(width for width in BIT_WIDTHS if low <= width <= high)

    def warning(self, N: float, D: float, B: float) -> str | None:
        """Names each number that lies outside the range of the law's runs; None where all lie inside."""
        B = B if self.effective is None else float(self.effective(N, B))
        values = {"N": N, "D": D, "B": B, "S": tokens_per_parameter_byte(N, D, B)}
        ranges = {symbol: self.range[key] for symbol, key in _RANGES.items() if key in self.range}
        outside = beyond(values, ranges, "its runs:")
        sentences = [f"the loss law is extrapolated: {', '.join(outside)}"] if outside else []
        if len(self.sizes) == 2 and all(abs(N / size - 1) > ROUNDING for size in self.sizes):
            known = " and ".join(map(amount, self.sizes))
            sentences.append(f"runs of two sizes ({known}) determine fractions at another size, but no losses")
        return "; ".join(sentences) or None

    def check_bits(self, bits: float) -> None:
        """InputError where a law of one bit width is asked about another."""
        low, high = self.range.get("bits", (0.0, float("inf")))
        if self.law.form.one_width and not low <= bits <= high:
            problem = f"{self.source} is a law of {bits_label(low)} alone."
            raise InputError("--bits", bits, problem, f"Ask for {bits_label(low)}, or give another law.")


def load_law(name: str, effective: EffectiveBits | None = None) -> PlannerLaw:
    """`synthetic`, or else the law of the `fit.json` at this path.

    effective: of the models that it will be asked about, for a law that was fitted on effective bits.

    InputError for anything else, and for laws without an optimal fraction.
    """
    if name == SYNTHETIC:
        return synthetic_law()
    if name in FRACTION_LAWS:
        problem = "has optimal fractions alone, and this command needs losses."
        raise InputError("--law", name, problem, "`plan`, `plan bit-widths` and `plan checkpoint` use it.")
    if name in NAMED:
        problem = f"contains no QAT fraction: it describes {NAMED[name].answers}."
        raise InputError("--law", name, problem, "`plan bit-widths` has its losses and gaps, `judge` its errors.")
    from qatlaw.fit_file import read_fit

    path = Path(name)
    try:
        path.stat()
    except OSError as error:
        known = ", ".join([SYNTHETIC, *FRACTION_LAWS])
        problem = f"is neither the name of a law ({known}) nor a file ({error.strerror})."
        raise InputError("--law", name, problem, "Fit one with `qatscale fit`.") from None
    file = read_fit(path)
    form, data = file.law.form, file.data
    if not form.has_fraction:
        problem = f"{form.name} does not depend on how the tokens are split, so it plans no switch."
        raise InputError("--law", name, problem, "Fit qat_unified or qat_per_bits.")
    law, bootstrap = file.law, file.bootstrap
    if data.bits == "nominal":
        effective = None
    elif effective is None:
        problem = "was fitted on effective bits, and this command knows nominal ones alone."
        raise InputError("--law", name, problem, "Fit it with --bits nominal.")
    else:
        form = NominalForm.of(form, effective)
        law = replace(law, form=form)
        bootstrap = None if bootstrap is None else replace(bootstrap, form=form)
    return PlannerLaw(
        law=law,
        source=f"{form.name} fitted on {plural(data.runs, 'run')} of {data.source}"
        + ", on effective bits" * (effective is not None),
        range=file.range,
        synthetic=data.synthetic,
        bootstrap=bootstrap,
        sizes=tuple(data.sizes),
        effective=effective,
    )


PlanLaw = PlannerLaw | FractionLaw
"""What a plan can stand on. `law` is None where it has no losses."""


def plan_law(name: str | None, effective: EffectiveBits, *, losses: bool = False) -> PlanLaw:
    """`load_law`, or the closed form without a name. losses: whether a named law must have them."""
    if name is None:
        return PAPER
    return load_law(name, effective) if losses or name not in FRACTION_LAWS else FRACTION_LAWS[name]


def synthetic_law() -> PlannerLaw:
    ranges = {key: MEASURED[symbol] for symbol, key in _RANGES.items()}
    return PlannerLaw(synthetic.law(), "synthetic, fitted on no runs", ranges, synthetic=True)
