"""How often do a fit's 95 % intervals hold the truth where runs share their trunk's noise?

    python analysis/benchmarks/interval_coverage.py --draws 60 --resamples 100

The grid of the ladder's first stage (2 sizes x 4 token counts x 3 widths x 6 fractions, and full precision), losses of
the synthetic law times exp(own + trunk noise), with an own error for every run (0.2 %) and one for every trunk (size
and seed). Each draw is fitted and bootstrapped; coverage is the share of the grid's U-curves whose interval of f* holds
the law's, of its runs whose interval of the loss does, and of the parameters that the fit gives an interval for.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd

from qatlaw import synthetic
from qatlaw.fitting import fit
from qatlaw.laws import QAT_UNIFIED
from qatlaw.table import RunTable
from qatlaw.uncertainty import bootstrap

OWN = 0.002
SIZES = (86e6, 194e6)
THIRD = 396e6
TOKENS = (2.3e9, 4.6e9, 9.2e9, 18.4e9)
BITS = (1.0, 2.0, 4.0)
FRACTIONS = (0.02, 0.05, 0.15, 0.35, 0.65, 0.9)
TRUNK_NOISE = (0.0, 0.5, 2.0)
SEEDS = (1, 2, 3, 5)
COLUMNS = ("runs", "trunk noise", "f*", "width", "loss", "width", "parameters", "lowest of them")
HEAD = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


@dataclass(frozen=True)
class Draw:
    """Coverage and width (of the loss relative to it) in one draw; NaN where no interval is given."""

    fraction: float
    fraction_width: float
    loss: float
    loss_width: float
    parameters: dict[str, bool]


def grid(draw: int, seeds: int, trunk_noise: float, sizes: tuple[float, ...]) -> RunTable:
    """draw: the seed of the noise. trunk_noise: in units of a run's own, one error a size and seed."""
    rows = []
    for N, seed, D in itertools.product(sizes, range(seeds), TOKENS):
        rows.append((N, 16.0, D, 0.0, "fp", seed))
        rows += [(N, B, D * (1 - f), D * f, "sequential", seed) for B in BITS for f in FRACTIONS]
    frame = pd.DataFrame(rows, columns=["n_params", "bits", "tokens_fp", "tokens_qat", "scheme", "seed"])
    rng = np.random.default_rng([draw, seeds])
    trunks = frame.groupby(["n_params", "seed"]).ngroup().to_numpy()
    own = OWN * rng.standard_normal(len(frame))
    noise = own + trunk_noise * OWN * rng.standard_normal(trunks.max() + 1)[trunks]
    return synthetic.drawn(frame, noise, f"synthetic ladder {draw}")


def few_repeats(draw: int, trunk_noise: float) -> RunTable:
    """One seed everywhere, five at two cells."""
    frame = grid(draw, 5, trunk_noise, SIZES).frame
    cell = (frame["bits"] == 2) & ((frame["tokens_fp"] + frame["tokens_qat"]).round() == TOKENS[0])
    return RunTable.from_frame(frame[(frame["seed"] == 0) | cell])


def one(resamples: int, trunk_noise: float, seeds: int | None, sizes: tuple[float, ...], draw: int) -> Draw:
    table = few_repeats(draw, trunk_noise) if seeds is None else grid(draw, seeds, trunk_noise, sizes)
    law, result = synthetic.law(), fit(QAT_UNIFIED, table)
    drawn = bootstrap(result, resamples=resamples)
    cells = [axis.ravel() for axis in np.meshgrid(sizes, TOKENS, BITS)]
    low, high = drawn.fraction(*cells)
    truth = law.optimal_fraction(*cells)
    runs = [table.column(name) for name in ("n_params", "tokens_fp", "tokens_qat", "bits")]
    loss_low, loss_high = drawn.loss(*runs)
    loss = law.loss(*runs)
    known = np.isfinite(loss_low).all()
    return Draw(
        float(np.mean((low <= truth) & (truth <= high))),
        float(np.median(high - low)),
        float(np.mean((loss_low <= loss) & (loss <= loss_high))) if known else float("nan"),
        float(np.median((loss_high - loss_low) / loss)),
        {name: bool(ends[0] <= law.coefficients[name] <= ends[1]) for name, ends in drawn.coefficients.items()},
    )


def row(name: str, trunk_noise: float, draws: list[Draw]) -> str:
    means = {key: np.mean([getattr(draw, key) for draw in draws]) for key in ("fraction", "fraction_width")}
    losses = [(draw.loss, draw.loss_width) for draw in draws if np.isfinite(draw.loss)]
    loss, width = np.mean(losses, axis=0) if losses else (np.nan, np.nan)
    told = f"{loss:.1%} | {width:.2%}" if losses else "none given | –"
    names = {name for draw in draws for name in draw.parameters}
    held = {name: np.mean([draw.parameters[name] for draw in draws if name in draw.parameters]) for name in names}
    lowest = min(held, key=lambda name: held[name])
    return (
        f"| {name} | {trunk_noise:g} | {means['fraction']:.1%} | {means['fraction_width']:.3f} | {told} | "
        f"{np.mean(list(held.values())):.1%} | {lowest} {held[lowest]:.0%} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=60)
    parser.add_argument("--resamples", type=int, default=100)
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args()
    layouts = [(f"2 sizes, {seeds} {'seed' if seeds == 1 else 'seeds'}", seeds, SIZES) for seeds in SEEDS]
    layouts += [("2 sizes, 1 seed, 5 at two cells", None, SIZES), ("3 sizes, 2 seeds", 2, (*SIZES, THIRD))]
    print(HEAD)
    with ProcessPoolExecutor(given.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for name, seeds, sizes in layouts:
            for trunk_noise in TRUNK_NOISE:
                once = partial(one, given.resamples, trunk_noise, seeds, sizes)
                print(row(name, trunk_noise, list(pool.map(once, range(given.draws)))), flush=True)


if __name__ == "__main__":
    main()
