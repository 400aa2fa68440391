"""A made-up law and runs drawn from it: for tests and demonstrations, never to plan a run by.

The coefficients are ours, chosen so that the optimal fraction follows the closed form of arXiv 2509.22935 (to 0.031
over the paper's range). They were fitted on no runs and are no one's measurement.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from qatlaw.laws.base import Law
from qatlaw.laws.points import Floats
from qatlaw.laws.qat import QAT_UNIFIED

if TYPE_CHECKING:  # a plan by the law alone answers without waiting for pandas
    import pandas as pd

    from qatlaw.table import RunTable

COEFFICIENTS = {
    "alpha": 1.8172, "beta": 2085.43, "gamma": 0.3658, "zeta": 482.01, "eta": 0.3478,
    "theta": 0.12, "kappa": 0.9,
    "phi": 1.9924, "chi": 1.0, "psi": 0.05, "omega": 0.1354,
    "lambda": 14.0, "mu": 1.0, "nu": 0.05, "xi": 0.4025, "rho": 0.0469,
}  # fmt: skip
NOISE = 0.002
"""Standard deviation of a run's log loss: 0.2 %, about what another seed changes in pre-training [ours]."""

SIZES = (86e6, 194e6, 396e6, 759e6, 2.2e9)
"""The ends are the paper's; the sizes between are ours."""
TOKENS_PER_PARAMETER = 2.3e9 / 86e6
"""Of the shortest run of each size, so that S starts at 36 tokens per byte (6 bits)."""
LONGEST = 1.4e12
BITS = (1.0, 2.0, 4.0, 6.0)
FRACTIONS = (0.05, 0.1, 0.2, 0.35, 0.55, 0.8)
TOKEN_COUNTS = 6
REPEATS = 7


def law() -> Law:
    """The synthetic law."""
    return QAT_UNIFIED.bind(COEFFICIENTS)


def settings() -> pd.DataFrame:
    """757 runs over the paper's ranges, laid out by us: the paper tells the ranges and the count, not the grid.

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
    from qatlaw.table import RunTable

    frame = settings()
    exact = (drawn_from or law()).loss(*(frame[name] for name in ("n_params", "tokens_fp", "tokens_qat", "bits")))
    frame["loss"] = exact * np.exp(noise * np.random.default_rng(seed).standard_normal(len(frame)))
    frame["synthetic"] = True
    return RunTable.from_frame(frame, source=f"synthetic runs, seed {seed}")


def ladder(
    draw: int,
    sizes: Sequence[float],
    tokens: Sequence[float],
    bits: Sequence[float],
    fractions: Sequence[float],
    seeds: int,
    own: float,
    trunk: float,
) -> RunTable:
    """A study's grid with its full-precision runs, under the synthetic law: each run errs by `own`, and all runs of a
    size and seed by another error of standard deviation `trunk` (both in log loss). `draw`: of the noise."""
    import pandas as pd

    from qatlaw.table import RunTable

    rows = []
    for N, seed, D in itertools.product(sizes, range(seeds), tokens):
        rows.append((N, 16.0, D, 0.0, "fp", seed))
        rows += [(N, B, D * (1 - f), D * f, "sequential", seed) for B in bits for f in fractions]
    frame = pd.DataFrame(rows, columns=["n_params", "bits", "tokens_fp", "tokens_qat", "scheme", "seed"])
    rng = np.random.default_rng([draw, seeds])
    trunks = frame.groupby(["n_params", "seed"]).ngroup().to_numpy()
    noise = own * rng.standard_normal(len(frame)) + trunk * rng.standard_normal(trunks.max() + 1)[trunks]
    exact = law().loss(*(frame[name] for name in ("n_params", "tokens_fp", "tokens_qat", "bits")))
    return RunTable.from_frame(frame.assign(loss=exact * np.exp(noise), synthetic=True), f"synthetic ladder {draw}")


def held_out(seed: int, runs: int = 400) -> tuple[Floats, Floats, Floats, Floats]:
    """(N, D_fp, D_qat, B) of runs that are not in the grid, inside its ranges, at 1 to 6 bits."""
    rng = np.random.default_rng(10_000 + seed)
    N = np.exp(rng.uniform(np.log(SIZES[0]), np.log(SIZES[-1]), runs))
    D = np.exp(rng.uniform(np.log(TOKENS_PER_PARAMETER * N), np.log(LONGEST)))
    f = rng.uniform(FRACTIONS[0], FRACTIONS[-1], runs)
    return N, D * (1 - f), D * f, rng.integers(1, 7, runs).astype(np.float64)
