"""Which peak rate the QAT phase wants, by its share of the tokens: tables and rules from the study's results.

    python analysis/studies/ladder-1to1000/rates.py analysis/studies/ladder-1to1000/results.csv > rates.md

A cell is one model size, token count, bit width and QAT fraction; its runs differ in `qat.lr_ratio` alone, the rate of
the QAT phase over that of full precision. Within a cell the loss is read as a parabola in log2(ratio), fitted to the
best measured ratio and its neighbours. A rule is judged by its regret: the loss at the rule's ratio above the lowest
of the cell. Intervals are percentiles over cells drawn with replacement.
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

POWERS = np.arange(0, 3.01, 0.1)
FACTORS = 2.0 ** np.arange(-4, 3.01, 0.2)
DRAWS = 500


@dataclass(frozen=True)
class Cell:
    N: float
    D: float
    B: float
    f: float
    ratios: NDArray[np.float64]
    """Rising."""
    losses: NDArray[np.float64]

    def loss(self, ratio: float) -> float:
        """Parabola in log2(ratio) through the best measured ratio and its neighbours, to half and double their span."""
        x, y = np.log2(self.ratios), self.losses
        at = int(np.clip(np.argmin(y), 1, len(y) - 2))
        parabola = np.polyfit(x[at - 1 : at + 2], y[at - 1 : at + 2], 2)
        wanted = np.log2(ratio)
        if x[at - 1] <= wanted <= x[at + 1] and parabola[0] > 0:
            return float(np.polyval(parabola, wanted))
        return float(np.interp(wanted, x, y))

    @property
    def lowest(self) -> float:
        return min(self.loss(ratio) for ratio in np.geomspace(self.ratios[0], self.ratios[-1], 60))

    @property
    def best(self) -> float:
        """Ratio of the lowest loss; at an end of the measured ones where it falls towards it."""
        ratios = np.geomspace(self.ratios[0], self.ratios[-1], 60)
        return float(ratios[np.argmin([self.loss(ratio) for ratio in ratios])])

    def regret(self, ratio: float) -> float:
        return max(self.loss(float(np.clip(ratio, self.ratios[0], self.ratios[-1]))) - self.lowest, 0.0)


def cells_of(records: list[RunRecord], scheme: str) -> list[Cell]:
    """Of seed 0, with Adam's moments kept and the default re-warm-up."""
    found: dict[tuple[float, ...], dict[float, float]] = {}
    for record in records:
        recipe, final = record.recipe, record.final
        plain = recipe["seed"] == "0" and recipe["qat.optimizer_state"] == "keep"
        plain &= recipe["qat.warmup_fraction"] == recipe["qat.warmup_tokens"] == "null"
        if final["scheme"] != scheme or not plain or recipe["qat.lr_ratio"] == "auto":
            continue
        key = (final["n_params"], final["tokens_total"], final["bits"], float(recipe["qat.fraction"]))
        found.setdefault(key, {})[float(recipe["qat.lr_ratio"])] = final[VAL_LOSS]
    cells = []
    for key, losses in sorted(found.items()):
        if len(losses) >= 3:
            ratios = sorted(losses)
            cells.append(Cell(*key, np.array(ratios), np.array([losses[ratio] for ratio in ratios])))
    return cells


def power_rule(cells: list[Cell]) -> tuple[float, float, float]:
    """(c, p, mean regret) of ratio = min(1, c f^p) with the least mean regret."""
    scores = [
        (np.mean([cell.regret(min(1.0, c * cell.f**p)) for cell in cells]), c, p) for p in POWERS for c in FACTORS
    ]
    regret, c, p = min(scores)
    return float(c), float(p), float(regret)


def described(cells: list[Cell], c: float, p: float) -> str:
    regrets = np.array([cell.regret(min(1.0, c * cell.f**p)) for cell in cells])
    return f"{regrets.mean():.4f} | {regrets.max():.4f}"


def interval(cells: list[Cell]) -> str:
    """Of c and p: 95 % over cells drawn with replacement. Regrets are computed once."""
    rules = [(c, p) for p in POWERS for c in FACTORS]
    regrets = np.array([[cell.regret(min(1.0, c * cell.f**p)) for c, p in rules] for cell in cells])
    rng = np.random.default_rng(0)
    drawn = [rules[int(np.argmin(regrets[rng.integers(0, len(cells), len(cells))].mean(0)))] for _ in range(DRAWS)]
    low, high = np.quantile(np.array(drawn), [0.025, 0.975], axis=0)
    return f"c {low[0]:.2f} to {high[0]:.2f}, p {low[1]:.2f} to {high[1]:.2f}"


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
    print("\n| cells | rule | mean regret | largest |\n|---|---|---|---|")
    for name, some in [("all", cells), *((f"{B:g} bits", [c for c in cells if c.B == B])
                                         for B in sorted({cell.B for cell in cells}))]:  # fmt: skip
        for constant in (1.0, 0.5, 0.25, 0.125):
            print(f"| {name} | {constant:g} | {described(some, constant, 0.0)} |")
        c, p, _ = power_rule(some)
        print(f"| {name} | min(1, {c:.2f} f^{p:.2f}) ({interval(some)}) | {described(some, c, p)} |")


def main() -> None:
    records = read_results(Path(sys.argv[1]))
    for scheme in ("sequential", "fused"):
        cells = cells_of(records, scheme)
        if cells:
            print(f"\n## {scheme}: loss by the ratio of the QAT phase's rate to that of full precision\n")
            print_cells(cells)
            print_rules(cells)


if __name__ == "__main__":
    main()
