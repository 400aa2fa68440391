"""What a fixed fraction of 10 % costs in tokens."""

from __future__ import annotations

import numpy as np

from qatlaw.figures.evidence import Drawn, Evidence, amounts_told
from qatlaw.figures.law_fit import LACKING
from qatlaw.figures.style import (
    INK,
    bits_label,
    draw_law,
    legend_below,
    log_axis,
    new_figure,
    tidy,
    width_dash,
    width_style,
)
from qatlaw.plan.waste import WASTED, wasted_tokens

NAME, TITLE = "wasted_tokens", "Tokens wasted by the 10 % rule"
RULE = 0.10
POINTS = 120


def draw(evidence: Evidence) -> Drawn:
    """Over total tokens, for the smallest and the largest size of the law's runs."""
    laws = evidence.laws
    if laws is None:
        return Drawn(NAME, TITLE, "", lacking=LACKING)
    widths = [bits for bits in evidence.widths if laws.of(bits) is not None]
    low, high = laws.ranges["n_params"]
    sizes = [low] if low == high else [low, high]
    figure = new_figure(3.3)
    panels = figure.subplots(1, len(sizes), squeeze=False, sharey=True)[0]
    D = np.geomspace(laws.ranges["tokens"][0], laws.ranges["tokens"][1] * 1.0001, POINTS)
    for axes, N in zip(panels, sizes, strict=True):
        for bits in widths:
            law = laws.of(bits)
            assert law is not None
            colour, _ = width_style(bits)
            share = 100 * wasted_tokens(law, N, D, RULE, bits)
            draw_law(
                axes, D, share, laws.inside(N, D, bits), bits_label(bits),
                color=colour, linewidth=1.5, linestyle=width_dash(bits, widths), zorder=4,
            )  # fmt: skip
        tidy(axes, title=f"{amounts_told(np.array([N]))} parameters", x="tokens D")
        log_axis(axes, "x", D)
        axes.set_ylim(0, None)
    panels[0].set_ylabel("wasted tokens, % of D", fontsize=8.5, color=INK)
    legend_below(figure, list(panels))
    caption = (
        f"By the law, not measured: what a QAT fraction of {RULE:.0%} wastes at the smallest and the largest size of "
        f"the law's runs ({WASTED}). {evidence.law_told}"
    )
    return Drawn(NAME, TITLE, caption, figure)
