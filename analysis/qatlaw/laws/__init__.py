"""Loss laws: `FORMS` by name; `LawForm` is a family, `Law` one with its coefficients."""

from qatlaw.laws.base import Law, LawForm, Parameter
from qatlaw.laws.chinchilla import CHINCHILLA
from qatlaw.laws.points import Points
from qatlaw.laws.qat import QAT_PER_BITS, QAT_UNIFIED
from qatlaw.laws.rivals import CHEN_2025, KUMAR_2024

FORMS: dict[str, LawForm] = {form.name: form for form in (CHINCHILLA, QAT_UNIFIED, QAT_PER_BITS, CHEN_2025, KUMAR_2024)}

__all__ = [
    "CHEN_2025",
    "CHINCHILLA",
    "FORMS",
    "KUMAR_2024",
    "QAT_PER_BITS",
    "QAT_UNIFIED",
    "Law",
    "LawForm",
    "Parameter",
    "Points",
]
