"""A made-up law and runs drawn from it: for tests and demonstrations, never to plan a run by.

The coefficients are ours, chosen so that the optimal fraction follows the closed form of arXiv 2509.22935 (to 0.031
over the paper's range). They were fitted on no runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from qatlaw.laws.base import Floats, Law
from qatlaw.laws.forms import QAT_UNIFIED

if TYPE_CHECKING:  # a plan by the law alone does not wait for pandas
    import pandas as pd

    from qatlaw.table import RunTable

COEFFICIENTS = {
    "alpha": 1.8172, "beta": 2085.43, "gamma": 0.3658, "zeta": 482.01, "eta": 0.3478,
    "theta": 0.12, "kappa": 0.9,
    "phi": 1.9924, "chi": 1.0, "psi": 0.05, "omega": 0.1354,
    "lambda": 14.0, "mu": 1.0, "nu": 0.05, "xi": 0.4025, "rho": 0.0469,
}  # fmt: skip
NOISE = 0.002
"""Standard deviation of a run's log loss: 0.2 %, about the effect of another seed in pre-training [ours]."""

SIZES = (86e6, 194e6, 396e6, 759e6, 2.2e9)
"""The ends are the paper's; the sizes between are ours."""
TOKENS_PER_PARAMETER = 2.3e9 / 86e6
"""Tokens per parameter of the shortest run of each size, so that S starts at 36 tokens per byte (6 bits)."""
LONGEST = 1.4e12
BITS = (1.0, 2.0, 4.0, 6.0)
FRACTIONS = (0.05, 0.1, 0.2, 0.35, 0.55, 0.8)
TOKEN_COUNTS = 6
REPEATS = 7


def law() -> Law:
    return QAT_UNIFIED.bind(COEFFICIENTS)


def settings() -> pd.DataFrame:
    """757 runs over the paper's ranges; the paper gives the ranges and the count, the grid is ours.

    5 sizes x 6 token counts x 4 widths x 6 fractions = 720 QAT runs; the 30 full-precision runs of the same sizes and
    tokens; 7 of those again with a second seed, as one repeats runs to learn their noise.
    """
    import pandas as pd

    rows = []
    for N in SIZES:
        for D in np.geomspace(TOKENS_PER_PARAMETER * N, LONGEST, TOKEN_COUNTS).round():
            splits = [round(D * f) for f in FRACTIONS]
            rows += [(N, B, D - D_qat, D_qat, "sequential", 0) for B in BITS for D_qat in splits]
            rows += [(N, 16.0, D, 0.0, "fp", 0)]
    full = [row for row in rows if row[4] == "fp"]
    rows += [(*row[:5], 1) for row in full[:: len(full) // REPEATS][:REPEATS]]
    return pd.DataFrame(rows, columns=["n_params", "bits", "tokens_fp", "tokens_qat", "scheme", "seed"])


def table(seed: int, noise: float = NOISE, drawn_from: Law | None = None) -> RunTable:
    """The grid's runs with losses of the synthetic law (or `drawn_from`), times exp(noise * normal)."""
    frame = settings()
    errors = noise * np.random.default_rng(seed).standard_normal(len(frame))
    return drawn(frame, errors, f"synthetic runs, seed {seed}", drawn_from)


def drawn(frame: pd.DataFrame, noise: Floats, source: str, truth: Law | None = None) -> RunTable:
    """The runs of `frame` with losses of the synthetic law (or `truth`) times exp(noise)."""
    from qatlaw.table import RunTable

    exact = (truth or law()).loss(*(frame[name] for name in ("n_params", "tokens_fp", "tokens_qat", "bits")))
    return RunTable.from_frame(frame.assign(loss=exact * np.exp(noise), synthetic=True), source)
