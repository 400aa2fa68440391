"""All figures of a report, in its order."""

from collections.abc import Callable

from qatlaw.figures import by_law, cooldown, differences, optima
from qatlaw.figures.evidence import Drawn, Evidence

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
LABORATORY: tuple[Callable[[Evidence], Drawn], ...] = (
    cooldown.draw_orders,
    cooldown.draw_bias_variance,
    cooldown.draw_adamw,
    cooldown.draw_lengths,
    cooldown.draw_averages,
)
"""In place of `draw_shapes` where runs differ in the order of the cooldown's data."""


def draw_all(evidence: Evidence) -> tuple[Drawn, ...]:
    """The figures of the report about these runs, those that lack something included."""
    drawn = (*SUBJECTS[:-1], *LABORATORY) if len(evidence.branches) else SUBJECTS
    return tuple(draw(evidence) for draw in drawn)
