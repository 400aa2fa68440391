"""qatlaw: how many of a run's tokens quantization-aware training should have. NumPy only, no torch.

Symbols, as in the literature: N parameters, D tokens, B bits per quantized weight, f = D_qat / D_total the QAT
fraction, S = D / (N B / 8) tokens per parameter byte.

Every number that is not ours carries its source: [paper] stated in arXiv 2509.22935 or by its author, [note] read in a
second-hand note of that paper, [ours] a definition or deduction of this project.
"""

from qatlaw.default import default_law
from qatlaw.errors import LawError
from qatlaw.fraction import (
    extrapolation_warning,
    is_extrapolated,
    optimal_fraction,
    tokens_per_parameter_byte,
)
from qatlaw.plan import RunPlan, plan_run

__all__ = [
    "LawError",
    "RunPlan",
    "default_law",
    "extrapolation_warning",
    "is_extrapolated",
    "optimal_fraction",
    "plan_run",
    "tokens_per_parameter_byte",
]
