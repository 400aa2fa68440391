"""Loss laws: `FORMS` by name; `LawForm` is a family, `Law` one with its coefficients."""

from qatlaw.laws.base import Law, LawForm, Points
from qatlaw.laws.forms import CHEN_2025, CHINCHILLA, FORMS, KUMAR_2024, QAT_PER_BITS, QAT_UNIFIED

__all__ = [
    "CHEN_2025", "CHINCHILLA", "FORMS", "KUMAR_2024", "QAT_PER_BITS", "QAT_UNIFIED", "Law", "LawForm", "Points",
]  # fmt: skip
