"""The figures of a report: pure functions from `Evidence` to `Drawn`, grouped by subject. No pyplot."""

from collections.abc import Callable

from qatlaw.figures import by_law, differences, optima
from qatlaw.figures.evidence import Drawn, Evidence, Laws

SUBJECTS: tuple[Callable[[Evidence], Drawn], ...] = (
    optima.draw_fractions,
    optima.draw_u_curves,
    by_law.draw_agreement,
    by_law.draw_residuals,
    by_law.draw_memory,
    differences.draw_full_precision,
    by_law.draw_waste,
    differences.draw_fusion,
    differences.draw_shapes,
)
"""In the order of the report."""

__all__ = ["SUBJECTS", "Drawn", "Evidence", "Laws"]
