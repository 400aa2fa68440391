"""qatlaw: scaling laws of quantization-aware training, and how many of a run's tokens it should have. No torch.

`import qatlaw` loads no library; each name loads what it needs on first use.
analysis/guides/fit-in-python.md shows them.

Symbols, as in the literature: N parameters, D tokens, B bits per quantized weight, f = D_qat / D_total the QAT
fraction, S = D / (N B / 8) tokens per parameter byte.

Every number that is not ours carries its source: [paper] stated in arXiv 2509.22935 or by its author, [note] read in a
second-hand note of that paper, [ours] a definition or deduction of this project.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qatlaw.errors import InputError

if TYPE_CHECKING:
    from qatlaw.api import fit, read_runs, read_table, report
    from qatlaw.fit_file import read_fit
    from qatlaw.fraction import extrapolation_warning, optimal_fraction, tokens_per_parameter_byte
    from qatlaw.laws import Law

_ON_USE = {
    "fit": "api", "read_runs": "api", "read_table": "api", "report": "api", "read_fit": "fit_file", "Law": "laws",
    "extrapolation_warning": "fraction", "optimal_fraction": "fraction", "tokens_per_parameter_byte": "fraction",
}  # fmt: skip

__all__ = [
    "InputError", "Law", "extrapolation_warning", "fit", "optimal_fraction", "read_fit", "read_runs",
    "read_table", "report", "tokens_per_parameter_byte",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _ON_USE:
        raise AttributeError(f"module 'qatlaw' has no attribute {name!r}")
    return getattr(import_module(f"qatlaw.{_ON_USE[name]}"), name)


def __dir__() -> list[str]:
    return __all__
