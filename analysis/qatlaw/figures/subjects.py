"""All figures of a report, in its order."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from qatlaw.figures import by_law, cooldown, differences, optima
from qatlaw.figures.evidence import COOLDOWNS, QAT, Drawn, Evidence


class Subject(NamedTuple):
    """A figure of the report; called, it is drawn."""

    name: str
    title: str
    draw: Callable[[Evidence], Drawn]
    paper: str = ""
    """What the papers' figure shows that it corresponds to, if any, and in which paper."""

    def __call__(self, evidence: Evidence) -> Drawn:
        return replace(self.draw(evidence), name=self.name, title=self.title, paper=self.paper)


# fmt: off
SUBJECTS = (
    Subject("optimal_fraction", "Optimal QAT fraction", optima.draw_fractions,
            f"the optimal QAT fraction over tokens per parameter byte in {QAT}"),
    Subject("u_curves", "Loss over the QAT fraction", optima.draw_u_curves, f"the loss over the QAT fraction in {QAT}"),
    Subject("law_against_measurement", "Law against measurement", by_law.draw_agreement,
            f"the loss law's prediction over the measured loss in {QAT}"),
    Subject("residuals", "Residuals", by_law.draw_residuals),
    Subject("equal_memory", "Loss over bit width at equal memory", by_law.draw_memory,
            f"the optimal bit width under a memory constraint in {QAT}"),
    Subject("against_full_precision", "QAT against full precision", differences.draw_full_precision,
            f"QAT at several bit widths against full precision in {QAT}"),
    Subject("wasted_tokens", "Tokens wasted by the 10 % rule", by_law.draw_waste,
            f"tokens wasted by a sub-optimal fraction in {QAT}"),
    Subject("fusion", "Fused against sequential", differences.draw_fusion, f"cooldown and QAT fusion in {QAT}"),
    Subject("cooldown_shapes", "Cooldown shapes", cooldown.draw_shapes,
            f"the loss by cooldown shape in {COOLDOWNS}"),
)
"""In the order of the report."""
LABORATORY = (
    Subject("bias_and_variance", "Bias against variance", cooldown.draw_bias_variance,
            f"bias against variance of cooldown shapes in {COOLDOWNS}"),
    Subject("cooldown_adamw", "AdamW in the cooldown", cooldown.draw_adamw,
            f"AdamW's settings in the cooldown in {COOLDOWNS}"),
    Subject("cooldown_length", "Length of the cooldown", cooldown.draw_lengths),
    Subject("averaging", "Averaging in place of a cooldown", cooldown.draw_averages),
)
"""Further subjects where runs differ in the order of the cooldown's data."""
# fmt: on


def draw_all(evidence: Evidence) -> tuple[Drawn, ...]:
    """The figures of the report about these runs, those that lack something included."""
    repeated = len(evidence.branches) and evidence.branches["order"].nunique() > 1
    return tuple(subject(evidence) for subject in (*SUBJECTS, *(LABORATORY if repeated else ())))
