"""Figures of the cooldown laboratory: branches of one trunk that differ in shape, AdamW or length of the cooldown."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from qatlaw.bit_widths import bits_label
from qatlaw.cooldown import ADAMW, DESIGN, POINT, bias_and_variance, differences
from qatlaw.figures.evidence import Drawn, Evidence
from qatlaw.figures.style import INK, SOFT, legend_below, mark, new_figure, series_style, tidy

FORMULA = "variance = mean loss of the branches - loss of their averaged weights; bias = the latter above the best one."
_LETTERS = {"beta2": "β₂", "beta1": "β₁", "weight_decay": "decay"}


def _panels(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """(label, rows) of each scheme and bit width, full precision first."""
    for (_, bits, scheme), own in rows.assign(fp=rows["scheme"] != "fp").groupby(["fp", "bits", "scheme"]):
        yield "full precision" if scheme == "fp" else f"{scheme}, {bits_label(bits)}", own


def usual(frame: pd.DataFrame, *free: str) -> pd.DataFrame:
    """The trained runs that have the most frequent value of every column of DESIGN but `free`, within their scheme."""
    rows = frame[(frame["averaged"] == 0) & (frame["cooldown"] > 0)]
    rows = rows if set(free) & set(ADAMW) else rows[rows["usual"]]
    for column in DESIGN:
        if column not in free and column not in ADAMW and len(rows):
            common = rows.groupby(POINT)[column].transform(lambda values: values.mode().iloc[0])
            rows = rows[rows[column] == common]
    return rows


def draw_shapes(evidence: Evidence) -> Drawn:
    """Shapes ranked, a panel a scheme and bit width: loss above 1-sqrt's over pairs with the same data."""
    rows = evidence.branches
    if len(rows):
        rows = usual(rows, "shape")
        rows = rows[rows.groupby([*POINT, "order"])["shape"].transform("nunique") > 1]
    if not len(rows):
        return Drawn(lacking="runs that differ in schedule.shape alone.")
    base = "1-sqrt" if "1-sqrt" in set(rows["shape"]) else rows["shape"].mode()[0]
    panels = [(label, own) for label, own in _panels(rows) if base in set(own["shape"])]
    figure = new_figure(0.9 + 0.27 * rows["shape"].nunique(), 7.4)
    parts = []
    for axes, (label, own) in zip(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels, strict=True):
        found = differences(own, "shape", base).assign(group=label, base=base)
        losses = own.groupby("shape")["loss"]
        found = found.merge(pd.DataFrame({"loss": losses.mean(), "deviation": losses.std()}).reset_index(), on="shape")
        _bars(axes, found, "shape")
        axes.axvline(0, color=SOFT, linewidth=1, zorder=2)
        tidy(axes, title=label, grid="x")
        parts.append(found)
    axes.set_ylim(len(axes.get_yticks()) - 0.5, -0.5)
    figure.supxlabel(f"loss above {base} (10⁻³ nats)", fontsize=8.5, color=INK)
    caption = (
        f"Measured: {len(rows)} runs. A shape stands by its loss above {base}'s, the mean over pairs that differ in "
        "nothing else; bars are Student's 95 % intervals over these pairs, and a single pair has none. The order is "
        "that of the first panel. Branches share a trunk, whose own noise is not in the bars."
    )
    return Drawn(caption, figure, table=pd.concat(parts))


def draw_bias_variance(evidence: Evidence) -> Drawn:
    """One point a shape: the variance part over the bias part of its loss, with lines of equal sum."""
    frame = evidence.branches
    averages = frame[(frame["averaged"] > 1) & (frame["window"] == 0)]
    trained = usual(frame, "shape")
    keys = trained[[*POINT, *ADAMW, "cooldown", "fraction"]].drop_duplicates()
    rows = pd.concat([trained, averages.merge(keys)])
    found = [(label, bias_and_variance(own)) for label, own in _panels(rows)]
    found = [(label, own) for label, own in found if len(own) > 1]
    if not found:
        return Drawn(lacking="averages of branches (`qatscale study average FOLDER`) of two shapes or more.")
    figure = new_figure(3.4, 7.4)
    order = sorted({shape for _, own in found for shape in own["shape"]})
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, (label, own) in zip(panels, found, strict=True):
        x, y = 1e3 * own["bias"].to_numpy(), 1e3 * own["variance"].to_numpy()
        reach = 1.15 * max(float(x.max()), 1e-3)
        low, high = float(y.min()), float(y.max())
        pad = 0.15 * max(high - low, 0.05 * abs(high), 1e-3)
        for total in np.linspace(low, high + reach, 6):
            axes.plot(
                [0, 2 * reach], [total, total - 2 * reach], color=SOFT, linewidth=0.7, linestyle=(0, (4, 3)), zorder=1
            )
        for shape, one, other in zip(own["shape"], x, y, strict=True):
            colour, marker, _ = series_style(order.index(shape))
            mark(axes, [one], [other], marker, colour, shape, size=7, hollow=order.index(shape) >= 6)
        axes.set_xlim(-0.08 * reach, reach)
        axes.set_ylim(low - pad, high + pad)
        tidy(axes, title=label, x="bias (10⁻³ nats)")
    panels[0].set_ylabel("variance (10⁻³ nats)", fontsize=8.5, color=INK)
    legend_below(figure, list(panels), columns=4)
    k = int(found[0][1]["branches"].min())
    caption = (
        f"Measured, with {k} branches a shape that differ in the data of the cooldown alone: {FORMULA} Dashed: equal "
        "sums, the mean loss above the best averaged model. With k branches the variance is (k - 1)/k of its value for "
        "many."
    )
    return Drawn(caption, figure, table=pd.concat([own.assign(group=label) for label, own in found]))


def draw_adamw(evidence: Evidence) -> Drawn:
    """AdamW in the cooldown beside the shapes: loss above the usual setting's, over pairs with the same data."""
    rows = usual(evidence.branches, *ADAMW)
    panels = [
        (label, own) for label, own in _panels(rows) if len(own[ADAMW].drop_duplicates()) > 1 and own["usual"].any()
    ]
    if not panels:
        return Drawn(lacking="branches that differ in schedule.phases.cooldown.betas or weight_decay.")
    shapes = dict(_panels(usual(evidence.branches, "shape")))
    figure = new_figure(0.8 + 0.21 * max(len(own[ADAMW].drop_duplicates()) + 12 for _, own in panels), 7.4)
    parts, spans = [], []
    for axes, (label, own) in zip(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels, strict=True):
        base = own[own["usual"]].iloc[0]
        texts = own.apply(lambda row, base=base: _text(row, base), axis=1)
        adamw = differences(own.assign(setting=texts), "setting", "as usual").query("setting != 'as usual'")
        adamw = adamw.sort_values("setting", ascending=False)
        elsewhere = [_at_another_shape(rows) for rows in _other_shapes(evidence, label, base["shape"])]
        beside = shapes[label][shapes[label]["order"].isin(set(own.loc[~own["usual"], "order"]))]
        by_shape = differences(beside, "shape", base["shape"]).query("shape != @base['shape']")
        by_shape = by_shape.rename(columns={"shape": "setting"})
        of_adamw = pd.concat([adamw, *elsewhere]).assign(kind="AdamW")
        found = pd.concat([by_shape.assign(kind="shape"), of_adamw], ignore_index=True)
        for series, kind in enumerate(("shape", "AdamW")):
            _bars(axes, found[found["kind"] == kind], "setting", series, kind)
        axes.axvline(0, color=SOFT, linewidth=1, zorder=2)
        tidy(axes, title=label, x="above the recipe's (10⁻³ nats)", grid="x")
        spans.append(f"{label}: shapes {_span(by_shape):.4f}, AdamW {_span(adamw):.4f}")
        parts.append(found.assign(group=label))
    axes.set_ylim(len(axes.get_yticks()) - 0.5, -0.5)
    legend_below(figure, list(figure.axes))
    caption = (
        "Measured: loss above that of the usual cooldown (of `as usual` at the shape, where a line names one), the "
        "mean over pairs with the same trunk and data, with Student's 95 % intervals. Span of the means in nats, the "
        f"recipe's included: {'; '.join(spans)}."
    )
    return Drawn(caption, figure, table=pd.concat(parts))


def _other_shapes(evidence: Evidence, label: str, shape: str) -> Iterator[pd.DataFrame]:
    """Branches of a panel under each other shape for which AdamW's settings differ, with all values of its setting."""
    rows = dict(_panels(usual(evidence.branches, "shape", *ADAMW)))[label]
    for name, own in rows.groupby(rows["shape"].str.partition(" ")[0]):
        if name != shape and not own["usual"].all():
            yield own


def _at_another_shape(rows: pd.DataFrame) -> pd.DataFrame:
    """Differences to that shape's usual run: its own setting and AdamW's, alone and together."""
    base = rows[rows["usual"]].sort_values("shape").iloc[0]
    texts = rows.apply(lambda row: f"{row['shape']}: {_text(row, base)}", axis=1)
    usual_text = f"{base['shape']}: as usual"
    return differences(rows.assign(setting=texts), "setting", usual_text).query("setting != @usual_text")


def _bars(axes: Any, found: pd.DataFrame, column: str, series: int = 0, label: str = "_") -> None:
    """Differences in thousandths with their intervals, a line for each text of `column`."""
    colour, marker, _ = series_style(series)
    x, half = 1e3 * found["above"].to_numpy(), 1e3 * found["half_width"].fillna(0).to_numpy()
    places = found[column].to_numpy()
    axes.errorbar(x, places, xerr=half, fmt="none", ecolor=colour, elinewidth=1.3, capsize=2.5, zorder=4)
    mark(axes, x, places, marker, colour, label)


def _text(row: pd.Series, base: pd.Series) -> str:
    """What a run's AdamW has that the base's has not."""
    return ", ".join(f"{_LETTERS[key]} {row[key]:g}" for key in ADAMW if row[key] != base[key]) or "as usual"


def _span(found: pd.DataFrame) -> float:
    return float(max(found["above"].max(), 0) - min(found["above"].min(), 0)) if len(found) else math.nan


def draw_lengths(evidence: Evidence) -> Drawn:
    """Loss over the cooldown's share of the tokens, a line a scheme, bit width and length of QAT."""
    rows = usual(evidence.branches, "cooldown", "fraction")
    within = (rows["scheme"] != "fp") & ((rows["fraction"] - rows["cooldown"]).abs() < 5e-3)
    rows = rows.assign(qat=np.where(rows["scheme"] == "fp", "", np.where(within, ", QAT as long", rows["fraction"].map(
        lambda share: f", QAT {share:.0%}"))))  # fmt: skip
    lines = [(label + qat, own) for label, all_ in _panels(rows) for qat, own in all_.groupby("qat", sort=False)]
    lines = [(label, own) for label, own in lines if own["cooldown"].nunique() > 1]
    base = rows["cooldown"].mode().iloc[0] if len(rows) else 0.0
    lines = [(label, own) for label, own in lines if (own["cooldown"] == base).any()]
    if not lines:
        return Drawn(lacking="branches that differ in schedule.cooldown_fraction.")
    figure = new_figure(3.6, 6.0)
    axes, parts = figure.add_subplot(), []
    for place, (label, own) in enumerate(lines):
        colour, marker, dashes = series_style(place)
        found = differences(own, "cooldown", base).sort_values("cooldown")
        x, y = found["cooldown"], 1e3 * found["above"]
        half = 1e3 * found["half_width"].fillna(0)
        axes.errorbar(x, y, yerr=half, color=colour, linestyle=dashes, linewidth=1.2, capsize=2.5)
        mark(axes, x, y, marker, colour, label)
        means = found["cooldown"].map(own.groupby("cooldown")["loss"].mean())
        parts.append(found.assign(loss=means, group=label, base=base))
    axes.axhline(0, color=SOFT, linewidth=1, zorder=2)
    tidy(axes, x="cooldown's share of the tokens", y=f"loss above that at {base:.0%} (10⁻³ nats)")
    legend_below(figure, [axes], columns=2)
    caption = (
        f"Measured: loss above that of the cooldown over {base:.0%} of the tokens, the mean over orders of the "
        "cooldown's data, with Student's 95 % intervals. `QAT as long`: the fused run is quantized from the cooldown's "
        "start; otherwise QAT has the share of the tokens that is named."
    )
    return Drawn(caption, figure, table=pd.concat(parts))


def draw_averages(evidence: Evidence) -> Drawn:
    """Averages over the end of a run that never cools down, above the run that does."""
    frame = evidence.branches
    windows = frame[(frame["averaged"] > 1) & (frame["window"] > 0)]
    cooled = usual(frame, "fraction").groupby([*POINT, "fraction"])["loss"].mean().rename("cooled").reset_index()
    ends = frame[(frame["averaged"] == 0) & (frame["cooldown"] == 0)].assign(window=0.0)
    rows = pd.concat([windows, ends]).merge(cooled, on=[*POINT, "fraction"])
    lines = [
        (f"{label}, QAT {share:.0%}" if share else label, own.sort_values("window"))
        for label, all_ in _panels(rows) for share, own in all_.groupby("fraction") if len(own) > 1
    ]  # fmt: skip
    if not lines:
        return Drawn(lacking="averages (`qatscale study average FOLDER`) of a run without a cooldown.")
    figure = new_figure(3.6, 6.0)
    axes = figure.add_subplot()
    for place, (label, own) in enumerate(lines):
        colour, marker, dashes = series_style(place)
        above = own["loss"] - own["cooled"]
        axes.plot(own["window"], above, color=colour, linestyle=dashes, linewidth=1.2)
        mark(axes, own["window"], above, marker, colour, label)
        anew = own[own["scheme"] != "fp"].dropna(subset="recalibrated")
        mark(axes, anew["window"], anew["recalibrated"] - anew["cooled"], marker, colour, hollow=True, zorder=4)
    mark(axes, [], [], "o", SOFT, "scales calibrated anew", hollow=True)
    axes.axhline(0, color=SOFT, linewidth=1, zorder=2)
    tidy(axes, x="tokens averaged over, share of all", y="loss above the cooled run (nats)")
    legend_below(figure, [axes], columns=2)
    caption = (
        "Measured: the weights of the last checkpoints of a run at the stable rate, averaged, above the mean loss of "
        "the runs that cool down over the same tokens (the zero line). At 0 stands the run's last checkpoint itself. "
        "Filled: scales averaged in log space; hollow: scales calibrated anew on the averaged weights."
    )
    return Drawn(caption, figure, table=pd.concat([own.assign(group=label) for label, own in lines]))
