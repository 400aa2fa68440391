"""What a report says first: a few sentences, each with a number that was measured on its runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qatlaw.amounts import amount
from qatlaw.bit_widths import bits_label
from qatlaw.figures.evidence import Drawn, Evidence
from qatlaw.fraction import closed_form
from qatlaw.summary import Summary
from qatlaw.table import MIXED_SCHEMES, SCHEMES, RunTable
from qatlaw.text import plural


def findings(evidence: Evidence, summaries: Sequence[Summary] = (), drawn: Sequence[Drawn] = ()) -> list[str]:
    """The answer, for a reader who reads nothing else. A sentence whose runs are missing is left out."""
    laboratory = [_best_of(one, *LABORATORY[one.name]) for one in drawn if one.name in LABORATORY]
    general = [_optimum(evidence), _cost(evidence), _fusion(evidence), _law(summaries)]
    return [sentence for sentence in (_best(evidence.table), *laboratory, *general) if sentence]


LABORATORY = {
    "cooldown_shapes": ("cooldown shape", "shape"),
    "cooldown_adamw": ("change of AdamW in the cooldown", "setting"),
}
"""By figure: what it compares, and the column of its table that names it."""


def _best_of(drawn: Drawn, subject: str, column: str) -> str:
    """What ends lowest in each panel of a figure that compares branches, with its interval; "" without repeats."""
    if drawn.table is None:
        return ""
    rows = drawn.table.dropna(subset="half_width").reset_index(drop=True)
    rows = rows[rows["kind"] == "AdamW"] if "kind" in rows else rows
    if rows.empty:
        return ""
    best = rows.loc[rows.groupby("group", sort=False)["above"].idxmin()]
    parts = [
        f"{row['group']}: {row[column]}"
        + (f" ({row['above']:+.4f} ± {row['half_width']:.4f})" if row["above"] else ", the usual one")
        for _, row in best.iterrows()
    ]
    return f"The best {subject}, with its loss above the usual one's in nats and its 95 % interval: {'; '.join(parts)}."


def _best(table: RunTable) -> str:
    frame = table.frame
    counts = frame["scheme"].value_counts()
    kinds = ", ".join(f"{counts[scheme]} {scheme}" for scheme in SCHEMES if scheme in counts)
    best = frame.loc[frame["loss"].idxmin()]
    total = best["tokens_fp"] + best["tokens_qat"]
    kind = "full precision" if best["scheme"] == "fp" else f"{best['scheme']} at {bits_label(best['bits'])}"
    return (
        f"{len(frame)} results were compared ({kinds}); the lowest loss is {best['loss']:.4f} nats, of {kind} with "
        f"{amount(best['n_params'])} parameters and {amount(total)} tokens."
    )


def _optimum(evidence: Evidence) -> str:
    """The measured optimal fractions by width, and the mean distance of the closed form."""
    curves = [curve for curve in evidence.curves if curve.inside]
    if not curves:
        return ""
    parts = []
    for bits in sorted({curve.B for curve in curves}):
        own = [curve.optimum for curve in curves if bits == curve.B]
        ends = f"{min(own):.2f}" if len(own) == 1 else f"{min(own):.2f} to {max(own):.2f}"
        parts.append(f"{ends} at {bits_label(bits)}")
    closed = [(curve.optimum, closed_form(curve.N, curve.D_total, curve.B)) for curve in curves]
    away = [abs(optimum - published) for optimum, published in closed if published is not None]
    beside = f"; the published closed form is {np.mean(away):.2f} away on average" if away else ""
    inside = f"{len(curves)} of {len(evidence.curves)} curves have their minimum inside"
    return f"The measured optimal QAT fraction is {', '.join(parts)} ({inside}){beside}."


def _cost(evidence: Evidence) -> str:
    """Loss above full precision of the best QAT and of PTQ, by width, over the cells that have both."""
    parts, known = [], evidence.frame.dropna(subset="gap")
    for bits in evidence.widths:
        costs = []
        for name, schemes in {"QAT": MIXED_SCHEMES, "PTQ": ("ptq",)}.items():
            own = known[(known["bits"] == bits) & known["scheme"].isin(schemes)]
            if len(own):
                costs.append(f"{own.groupby(['n_params', 'D'])['gap'].min().median():.3f} by {name}")
        if costs:
            parts.append(f"{' and '.join(costs)} at {bits_label(bits)}")
    if not parts:
        return ""
    return f"Above full precision of the same size and tokens, quantization costs {'; '.join(parts)} (median nats)."


def _fusion(evidence: Evidence) -> str:
    pairs = evidence.fusion_pairs
    if pairs.empty:
        return ""
    gap = (pairs["fused"] - pairs["sequential"]).median()
    verb = "lowers" if gap < 0 else "raises"
    return (
        f"Fusing the cooldown with QAT {verb} the loss by {abs(gap):.3f} nats (median of {plural(len(pairs), 'pair')})."
    )


def _law(summaries: Sequence[Summary]) -> str:
    if not summaries:
        return ""
    first = summaries[0]
    quality = first.result.quality
    text = f"The law {first.label} meets its {quality.runs} runs within {quality.mae:.4f} nats on average"
    if error := first.fractions.get("all"):
        text += f" and their optimal fractions within {error.mae:.2f}"
    return f"{text}."
