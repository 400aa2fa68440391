"""qatlaw: how many of a run's tokens quantization-aware training should have. No torch.

This module holds the closed form of the optimal fraction. Import `qatlaw.plan`, `qatlaw.fit`, `qatlaw.laws` and
`qatlaw.report` by themselves.

Symbols, as in the literature: N parameters, D tokens, B bits per quantized weight, f = D_qat / D_total the QAT
fraction, S = D / (N B / 8) tokens per parameter byte.

Every number that is not ours carries its source: [paper] stated in arXiv 2509.22935 or by its author, [note] read in a
second-hand note of that paper, [ours] a definition or deduction of this project.
"""

from qatlaw.errors import InputError
from qatlaw.fraction import extrapolation_warning, is_extrapolated, optimal_fraction, tokens_per_parameter_byte

__all__ = [
    "InputError", "extrapolation_warning", "is_extrapolated", "optimal_fraction", "tokens_per_parameter_byte",
]  # fmt: skip
