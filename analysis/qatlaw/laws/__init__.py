"""Loss laws: `FORMS` by name; `LawForm` is a family, `Law` one with its coefficients."""

from collections.abc import Mapping
from typing import Any

from qatlaw.errors import InputError
from qatlaw.laws.base import Law, LawForm, Parameter
from qatlaw.laws.chinchilla import CHINCHILLA
from qatlaw.laws.points import Points
from qatlaw.laws.qat import QAT_PER_BITS, QAT_UNIFIED
from qatlaw.laws.rivals import CHEN_2025, KUMAR_2024

FORMS: dict[str, LawForm] = {form.name: form for form in (CHINCHILLA, QAT_UNIFIED, QAT_PER_BITS, CHEN_2025, KUMAR_2024)}


def law_from_dict(data: Mapping[str, Any]) -> Law:
    """The inverse of `Law.to_dict`. InputError for an unknown form or coefficients that are not its own."""
    name = data.get("form")
    if name not in FORMS:
        raise InputError("form", name, f"one of {', '.join(sorted(FORMS))}.")
    return FORMS[name].bind(data["coefficients"])


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
    "law_from_dict",
]
