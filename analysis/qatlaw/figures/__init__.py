"""The figures of a report: one subject a module, each a pure function from `Evidence` to `Drawn`. No pyplot."""

from collections.abc import Callable

from qatlaw.figures import fraction, full_precision, fusion, law_fit, memory, u_curves, waste
from qatlaw.figures.evidence import Drawn, Evidence, Laws

SUBJECTS: tuple[Callable[[Evidence], Drawn], ...] = (
    fraction.draw,
    u_curves.draw,
    law_fit.draw_agreement,
    law_fit.draw_residuals,
    memory.draw,
    full_precision.draw,
    waste.draw,
    fusion.draw,
)
"""In the order of the report."""

__all__ = ["SUBJECTS", "Drawn", "Evidence", "Laws"]
