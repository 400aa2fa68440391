"""The ladder's tables in Markdown: optimal fractions, fused against sequential, QAT against PTQ, loss at equal bytes.

    python analysis/studies/ladder-1to1000/tables.py analysis/studies/ladder-1to1000/results.csv

A measured curve is read as `qatlaw.curves` reads it; its regret is its loss at another fraction above its minimum.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from qatlaw.curves import Curve, measured_curves
from qatlaw.fraction import fraction_at
from qatlaw.results import read_results
from qatlaw.runs import RunRecord, collect

FOLDER = Path(__file__).parent
EMBEDDING_BITS = 4
VOCABULARY = 1024
SAME_COST = 0.001
"""Nats that nobody can tell apart."""
DRAWS = 400
"""Resampled sets of curves."""


def print_table(header: list[str], rows: list[list[str]]) -> None:
    print(f"\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def short(tokens: float) -> str:
    return f"{tokens / 1e6:.1f}M"


def optima(curves: list[Curve]) -> None:
    """Measured f* with its error bar beside the closed form's, and what that costs."""
    rows = []
    for curve in curves:
        S = curve.D_total / (curve.N * curve.B / 8)
        closed = float(fraction_at(S))
        measured = curve.optimum_text.partition(" ±")[0] + f" ({curve.low:.2f} to {curve.high:.2f})" * curve.inside
        row = [f"{curve.N:,.0f}", short(curve.D_total), f"{curve.B:g}", f"{S:.0f}", measured]
        row += [f"{closed:.2f}", f"{regret(curve, closed):+.3f}"]
        rows.append([*row, f"{curve.losses.min():.3f}"])
    print_table(["N", "D", "bits", "S", "measured f*", "closed form", "regret", "lowest loss"], rows)


def regret(curve: Curve, f: float) -> float:
    """What the fraction f costs above the curve's minimum, nats; outside the runs what the nearest of them does."""
    lowest, loss = curve.loss_at(np.clip([curve.optimum, f], *curve.fractions[[0, -1]]))
    return float(loss - lowest)


class Constant(NamedTuple):
    """A of the closed form f = exp(-A / ln S), fitted to curves."""

    A: float
    low: float
    high: float
    """95 % of resampled sets of curves."""
    regret: float
    """Mean loss of its fractions above the curves' minima, nats."""
    worst: float


def closed_form_constant(curves: Sequence[Curve]) -> Constant:
    """The A whose fractions cost the curves, of one bit width, least.

    Where the longest phases are best, no A is: then the largest one within 0.001 nats of the lowest cost.
    """
    values = np.geomspace(0.05, 50, 400)
    costs = np.array([[regret(curve, float(fraction_at(curve.S, A))) for A in values] for curve in curves])

    def best(sample: np.ndarray) -> int:
        mean = sample.mean(axis=0)
        return int(np.flatnonzero(mean <= mean.min() + SAME_COST).max()) if mean.argmin() == 0 else int(mean.argmin())

    rng = np.random.default_rng(0)
    chosen = best(costs)
    drawn = [best(costs[rng.integers(0, len(curves), len(curves))]) for _ in range(DRAWS)]
    low, high = np.quantile(values[drawn], [0.025, 0.975])
    own = costs[:, chosen]
    return Constant(float(values[chosen]), float(low), float(high), float(own.mean()), float(own.max()))


def constants(curves: list[Curve]) -> None:
    """A of f = exp(-A / ln S) at each width, beside what the paper's A costs."""
    rows = []
    for B in sorted({curve.B for curve in curves}):
        own = [curve for curve in curves if curve.B == B]
        found = closed_form_constant(own)
        paper = [regret(curve, float(fraction_at(curve.S))) for curve in own]
        measured = f"{found.A:.2f} ({found.low:.2f} to {found.high:.2f})", f"{found.regret:.4f}, {found.worst:.3f}"
        rows.append([f"{B:g}", str(len(own)), *measured, f"{np.mean(paper):.4f}, {np.max(paper):.3f}"])
    print_table(["bits", "curves", "A (95 %)", "regret (mean, worst)", "regret with A = 6.73"], rows)


def by_point(frame: pd.DataFrame) -> list[tuple[tuple[float, float, float], pd.DataFrame]]:
    return list(frame.groupby(["n_params", "tokens_total", "bits"]))


def cell(best: dict[str, pd.Series], scheme: str) -> str:
    if scheme not in best:
        return "–"
    run = best[scheme]
    return f"{run['loss']:.3f}" + (f" (f = {run['fraction']:.2f})" if run["fraction"] else "")


def ends_and_schemes(frame: pd.DataFrame) -> None:
    """Full precision, PTQ of it, and the best sequential and fused QAT run of each point."""
    full = frame[frame["scheme"] == "fp"].set_index(["n_params", "tokens_total"])["loss"].to_dict()
    rows = []
    for (N, D, B), group in by_point(frame[frame["scheme"] != "fp"]):
        best = {scheme: some.loc[some["loss"].idxmin()] for scheme, some in group.groupby("scheme")}
        schemes = [cell(best, scheme) for scheme in ("ptq", "sequential", "fused")]
        both = "fused" in best and "sequential" in best
        gain = f"{best['fused']['loss'] - best['sequential']['loss']:+.3f}" if both else "–"
        base = f"{full[N, D]:.3f}" if (N, D) in full else "–"
        rows.append([f"{N:,.0f}", short(D), f"{B:g}", base, *schemes, gain])
    print_table(["N", "D", "bits", "full precision", "PTQ", "sequential", "fused", "fused − sequential"], rows)


def equal_bytes(frame: pd.DataFrame, hidden: dict[float, int]) -> None:
    """Best loss of each size and width by the bytes of its weights: blocks at B bits, embedding at 4, norms at 16."""
    rows = []
    for (N, D, B), group in by_point(frame):
        embedding = VOCABULARY * hidden[N]
        blocks = N - embedding
        size = (blocks * B + embedding * (EMBEDDING_BITS if B < 16 else 16)) / 8
        rows.append((D, size, [short(D), f"{size / 1e3:.0f}", f"{N:,.0f}", f"{B:g}", f"{8 * size / N:.2f}",
                               f"{group['loss'].min():.3f}"]))  # fmt: skip
    print_table(["D", "kB", "N", "bits", "bits a parameter", "lowest loss"], [row for *_, row in sorted(rows)])


def predictions(curves: list[Curve], file: Path) -> None:
    """What predict.py said before these points were trained, beside what was measured there."""
    measured = {(curve.N, curve.D_total, curve.B): curve for curve in curves}
    rows = []
    for _, row in pd.read_csv(file).iterrows():
        near = [key for key in measured if np.allclose(key, (row["n_params"], row["tokens"], row["bits"]), rtol=0.03)]
        if not near:
            continue
        curve = measured[near[0]]
        shown = [row["law"], f"{curve.N:,.0f}", short(curve.D_total), f"{curve.B:g}", curve.optimum_text]
        if pd.notna(row["f*"]):
            shown += [f"{row['f*']:.2f}", f"{regret(curve, row['f*']):+.3f}"]
        else:
            shown += ["–", "–"]
        losses = [
            (float(name.removeprefix("loss at f=")), value)
            for name, value in row.items()
            if str(name).startswith("loss at f=") and pd.notna(value)
        ]
        errors = [
            value - loss for f, value in losses for at, loss in zip(curve.fractions, curve.losses, strict=True)
            if abs(at - f) < 0.01
        ]  # fmt: skip
        shown += [f"{np.mean(errors):+.3f}", f"{np.mean(np.abs(errors)):.3f}"] if errors else ["–", "–"]
        rows.append(shown)
    header = ["law", "N", "D", "bits", "measured f*", "predicted", "regret", "bias of the loss", "mean error"]
    print_table(header, rows)


def full_precision(frame: pd.DataFrame) -> None:
    """Residual (per degree of freedom) of the paper's base form and of Kaplan et al.'s, arXiv 2001.08361 eq. 1.5."""
    runs = frame[frame["scheme"] == "fp"]
    N, D, loss = runs["n_params"] / 2e5, runs["tokens_total"] / 4e6, runs["loss"].to_numpy()

    def additive(x: np.ndarray) -> np.ndarray:
        return np.exp(x[0]) + np.exp(x[1]) * D ** -np.exp(x[2]) + np.exp(x[3]) * N ** -np.exp(x[4])

    def kaplan(x: np.ndarray) -> np.ndarray:
        return (np.exp(x[0]) * N ** -np.exp(x[1]) + np.exp(x[2]) / D) ** np.exp(x[3])

    rng, rows = np.random.default_rng(0), []
    for name, form, start in (
        ("alpha + beta/D^gamma + zeta/N^eta", additive, [1, -1, 0, -1, 0]),
        ("[(a/N)^b + c/D]^d", kaplan, [2, -1, 0, -1]),
    ):
        starts = np.array(start) + rng.standard_normal((40, len(start)))
        fits = [least_squares(lambda x, form=form: form(x) - loss, x, max_nfev=5000) for x in starts]
        freedom = len(loss) - len(start)
        rows.append([name, str(len(start)), f"{np.sqrt(2 * min(fit.cost for fit in fits) / freedom):.4f}"])
    print_table(["form", "coefficients", "residual"], rows)


def frame_of(records: list[RunRecord]) -> tuple[pd.DataFrame, list[Curve]]:
    table = collect(records, "results.csv").table
    frame = table.frame.assign(
        tokens_total=table.tokens_total, fraction=table.column("tokens_qat") / table.tokens_total
    )
    return frame, sorted(measured_curves(table), key=lambda one: (one.scheme, one.N, one.D_total, one.B))


def main() -> None:
    records = [record for record in read_results(Path(sys.argv[1])) if record.recipe["seed"] == "0"]
    frame, curves = frame_of(records)
    hidden = {record.final["n_params"]: int(record.recipe["model.hidden_size"]) for record in records}
    for scheme in ("sequential", "fused"):
        print(f"\n## {scheme}: optimal fraction")
        own = [curve for curve in curves if curve.scheme == scheme]
        optima(own)
        constants(own)
    if (file := FOLDER / "predictions.csv").exists():
        print("\n## Predicted before they were trained")
        predictions([curve for curve in curves if curve.scheme == "sequential"], file)
    print("\n## Full precision")
    full_precision(frame)
    print("\n## Full precision, PTQ, sequential, fused")
    ends_and_schemes(frame)
    print("\n## Loss at equal bytes")
    equal_bytes(frame, hidden)


if __name__ == "__main__":
    main()
