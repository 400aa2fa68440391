"""Which peak rate the QAT phase wants, by its share of the tokens: tables and rules from the rate study's results.

    python analysis/studies/ladder-1to1000/rates.py analysis/studies/ladder-1to1000/rates.csv

A cell is one model size, token count, bit width and QAT fraction f; its runs differ in `qat.lr_ratio` alone, the peak
rate of the QAT phase over that of full precision. Within a cell the loss is read as a parabola in log2(ratio) through
the best measured ratio and its neighbours. A rule is judged by its regret: the loss at the rule's ratio above the
lowest of the cell. The rules compared are constants and a^(1 - f/t) up to f = t, 1 beyond. Intervals are percentiles
over cells drawn with replacement.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qatlaw.names import VAL_LOSS
from qatlaw.results import read_results
from qatlaw.runs import RunRecord
from qatscale.schedule.rates import qat_lr_ratio

SHORTEST = np.geomspace(0.04, 0.4, 24)
"""a: the ratio of a phase of no length."""
FULL_RATE_FROM = np.arange(0.5, 0.91, 0.05)
"""t: the fraction from which on the ratio is 1."""
DRAWS = 1000

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Cell:
    N: float
    D: float
    B: float
    f: float
    ratios: Floats
    """Rising."""
    losses: Floats

    def loss(self, ratio: Floats) -> Floats:
        x, y = np.log2(self.ratios), self.losses
        at = int(np.clip(np.argmin(y), 1, len(y) - 2))
        parabola = np.polyfit(x[at - 1 : at + 2], y[at - 1 : at + 2], 2)
        wanted = np.log2(np.clip(ratio, self.ratios[0], self.ratios[-1]))
        inside = (x[at - 1] <= wanted) & (wanted <= x[at + 1]) & (parabola[0] > 0)
        return np.where(inside, np.polyval(parabola, wanted), np.interp(wanted, x, y))

    @property
    def fine(self) -> Floats:
        return np.geomspace(self.ratios[0], self.ratios[-1], 60)

    @property
    def best(self) -> float:
        """Ratio of the lowest loss; at an end of the measured ones where the loss falls towards it."""
        return float(self.fine[np.argmin(self.loss(self.fine))])

    def regret(self, ratio: Floats) -> Floats:
        return np.maximum(self.loss(ratio) - self.loss(self.fine).min(), 0.0)


def cells_of(records: list[RunRecord], scheme: str) -> list[Cell]:
    """The cells of seed 0 with Adam's moments kept and the default re-warm-up, and at least three ratios."""
    found: dict[tuple[float, ...], dict[float, float]] = {}
    for record in records:
        recipe, final = record.recipe, record.final
        plain = recipe["seed"] == "0" and recipe["qat.optimizer_state"] == "keep"
        plain &= recipe["qat.warmup_fraction"] == recipe["qat.warmup_tokens"] == "null"
        if final["scheme"] != scheme or not plain or recipe["qat.lr_ratio"] == "auto":
            continue
        key = (final["n_params"], final["tokens_total"], final["bits"], float(recipe["qat.fraction"]))
        found.setdefault(key, {})[float(recipe["qat.lr_ratio"])] = final[VAL_LOSS]
    return [
        Cell(*key, np.array(sorted(losses)), np.array([losses[ratio] for ratio in sorted(losses)]))
        for key, losses in sorted(found.items())
        if len(losses) >= 3
    ]


def regrets_of_rules(cells: list[Cell]) -> Floats:
    """[cells, a, t]."""
    return np.array([
        cell.regret(SHORTEST[:, None] ** np.maximum(1 - cell.f / FULL_RATE_FROM, 0.0)) for cell in cells
    ])  # fmt: skip


def best_rule(regrets: Floats) -> tuple[float, float]:
    a, t = np.unravel_index(np.argmin(regrets.mean(0)), regrets.shape[1:])
    return float(SHORTEST[a]), float(FULL_RATE_FROM[t])


def print_cells(cells: list[Cell]) -> None:
    ratios = sorted({ratio for cell in cells for ratio in cell.ratios.tolist()}, reverse=True)
    print("| N | D | bits | f |", " | ".join(f"{ratio:g}" for ratio in ratios), "| best |")
    print("|---|---|---|---|" + "---|" * (len(ratios) + 1))
    for cell in cells:
        losses = dict(zip(cell.ratios.tolist(), cell.losses.tolist(), strict=True))
        shown = [f"{losses[ratio]:.3f}" if ratio in losses else "–" for ratio in ratios]
        shown = [f"**{text}**" if losses.get(ratio) == cell.losses.min() else text
                 for ratio, text in zip(ratios, shown, strict=True)]  # fmt: skip
        print(f"| {cell.N:,.0f} | {cell.D / 1e6:.1f}M | {cell.B:g} | {cell.f:g} |", " | ".join(shown),
              f"| {cell.best:.2f} |")  # fmt: skip


def print_rules(cells: list[Cell]) -> None:
    print("\n| bits | cells | rule | mean regret | largest |\n|---|---|---|---|---|")
    for B in sorted({cell.B for cell in cells}):
        some = [cell for cell in cells if cell.B == B]
        rows = {f"{ratio:g}": [cell.regret(np.array(ratio)) for cell in some] for ratio in (1, 0.5, 0.25, 0.125)}
        regrets = regrets_of_rules(some)
        a, t = best_rule(regrets)
        rng = np.random.default_rng(0)
        drawn = [best_rule(regrets[rng.integers(0, len(some), len(some))]) for _ in range(DRAWS)]
        (a_low, t_low), (a_high, t_high) = np.quantile(np.array(drawn), [0.025, 0.975], axis=0)
        at = np.argmin(abs(SHORTEST - a)), np.argmin(abs(FULL_RATE_FROM - t))
        spans = f"a {a_low:.2f} to {a_high:.2f}, t {t_low:.2f} to {t_high:.2f}"
        rows[f"{a:.2f}^(1 - f/{t:.2f}); {spans}"] = list(regrets[:, *at])
        rows["the recipes' default"] = [cell.regret(np.array(qat_lr_ratio("sequential", B, cell.f))) for cell in some]
        for rule, found in rows.items():
            print(f"| {B:g} | {len(some)} | {rule} | {np.mean(found):.4f} | {np.max(found):.4f} |")


def main() -> None:
    records = read_results(Path(sys.argv[1]))
    for scheme in ("sequential", "fused"):
        print(f"\n## {scheme}: loss by the ratio of the QAT phase's rate to that of full precision\n")
        cells = cells_of(records, scheme)
        print_cells(cells)
        if scheme == "sequential":
            print_rules(cells)


if __name__ == "__main__":
    main()
