"""The figure of a comparison: loss over tokens, with each trunk drawn once, and the loss that each run ended with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qatlaw.figures.style import INK, literal, mark, new_figure, series_style, tidy
from qatlaw.files import write_figure
from qatscale.config.amounts import format_amount
from qatscale.tracking.averages import Averages
from qatscale.tracking.compare import own_view, validation_losses, view_label
from qatscale.tracking.records import Record
from qatscale.tracking.run_folder import RunFolder

_TRUNK = "#4D4D4D"
_SKIPPED = 0.08
"""First share of the tokens, which the loss axis ignores, since the steep fall would flatten the rest."""
_WINDOWS = 60
"""Curves are smoothed over this fraction (1/n) of all tokens, which removes noise and keeps jumps visible."""


@dataclass(frozen=True)
class Curve:
    """One run's training loss over its own tokens; a branch's begins at its parent's step."""

    folder: RunFolder
    asked_for: bool
    """False for an ancestor of a run that was asked for."""
    tokens: np.ndarray
    """[points] at the end of each point's steps"""
    loss: np.ndarray
    """[points], means over at least half a logging interval (`tracking.averages`)"""
    x: np.ndarray
    """[points, or points + 1 for a branch, which starts at its parent's last point], tokens of the smoothed curve"""
    y: np.ndarray
    """[like x], smoothed loss"""
    switch: float | None
    """Tokens at the switch, None if this curve does not cross it."""
    cooldowns: tuple[float, ...]
    """Tokens at the start of each cooldown on this curve."""
    width: float
    """Tokens that y is a mean over; 0 = not smoothed."""

    def at(self, tokens: float) -> float:
        """The smoothed loss of the last point up to `tokens`."""
        return float(self.y[max(0, int(np.searchsorted(self.x, tokens, side="right")) - 1)])


def smoothed(values: np.ndarray, weights: np.ndarray, window: int, switch: int | None = None) -> np.ndarray:
    """Moving mean over `window` (odd) points around each, never across the index `switch`.

    Windows are shorter at the ends and symmetric, so that the start of a steep fall is not drawn too low. NaN where a
    window has no finite value. weights: the points' numbers of steps.
    """
    out = np.full(len(values), np.nan)
    for index in range(len(values)):
        start, end = (0, len(values)) if switch is None else (0, switch) if index < switch else (switch, len(values))
        back = min(window // 2, index - start)
        ahead = min(back, end - 1 - index)
        around = slice(index - back, index + ahead + 1)
        finite = np.isfinite(values[around])
        if finite.any():
            shares = weights[around][finite] / weights[around][finite].sum()
            out[index] = shares @ values[around][finite]
    return out


def curves(folders: Iterable[RunFolder]) -> list[Curve]:
    """Curves of these runs and of their ancestors, parents first.

    An ancestor that is not among `folders` ends at its last branch. One whose folder no longer exists is left out.
    """
    asked = {folder.path.resolve(): folder for folder in folders}
    drawn: dict[Path, tuple[RunFolder, int | None]] = {path: (folder, None) for path, folder in asked.items()}
    waiting = list(asked.values())
    while waiting:
        branch = waiting.pop()
        if (ancestor := branch.parent) is None or (path := ancestor.path.resolve()) in asked:
            continue
        until = drawn[path][1] if path in drawn else 0
        drawn[path] = (ancestor, max(branch.run["parent"]["step"], until or 0))
        waiting.append(ancestor)
    # a trunk first, so that its branches are drawn over it; branches in the order asked for
    ordered = sorted(drawn.items(), key=lambda item: 0 if item[1][0].parent is None else 1 + (item[0] in asked))
    longest = max((_tokens(folder, folder.timeline["steps"]) for folder, _ in drawn.values()), default=0.0)
    found = [_curve(folder, path in asked, until, longest / _WINDOWS) for path, (folder, until) in ordered]
    return [curve for curve in found if len(curve.tokens)]


def _tokens(folder: RunFolder, step: int) -> float:
    return float(step * folder.timeline["tokens_per_step"])


def _curve(folder: RunFolder, asked_for: bool, until: int | None, width: float) -> Curve:
    """`width`: tokens to smooth over."""
    timeline, parent = folder.timeline, folder.run["parent"]
    per_step, switch_step = timeline["tokens_per_step"], timeline["switch_step"]
    own = [r for r in folder.records("metrics") if until is None or r["step"] <= until]
    first = parent["step"] if parent else 0
    last = own[-1]["step"] if own else 0
    # the records before the branch take part in the means of its first points
    before = _before(folder)
    averages = Averages(folder.recipe["log_interval"], 0 if before else first)
    points = [point for record in [*before, *own] if (point := averages.add(record))]
    all_steps = np.array([record["step"] for _, record in points], dtype=int)
    all_losses = np.array([record["loss"] for _, record in points], dtype=float)
    weights = np.array([fresh for fresh, _ in points], dtype=float)
    branch = int(np.searchsorted(all_steps, first, side="right"))
    steps, loss = all_steps[branch:], all_losses[branch:]
    spacing = float(np.median(np.diff(steps))) * per_step if len(steps) > 1 else width
    window = max(1, round(width / spacing)) // 2 * 2 + 1
    # the last step of a record of step s is s - 1, so it is quantized from s > switch_step on
    switch_index = None if switch_step is None else int(np.searchsorted(all_steps, switch_step, side="right"))
    smooth = smoothed(all_losses, weights, window, switch_index)
    starts = [s["start"] for s in timeline["segments"] if s["phase"].endswith("cooldown")]
    attached = min(branch, 1)
    return Curve(
        folder=folder, asked_for=asked_for, tokens=steps * float(per_step), loss=loss,
        x=all_steps[branch - attached :] * float(per_step), y=smooth[branch - attached :],
        switch=_tokens(folder, switch_step) if switch_step is not None and first <= switch_step < last else None,
        cooldowns=tuple(_tokens(folder, start) for start in starts if first <= start < last),
        width=window * spacing if window > 1 else 0.0,
    )  # fmt: skip


def _before(folder: RunFolder) -> list[Record]:
    """The metrics of the ancestors of `folder`, up to the branch; empty where their folders no longer exist."""
    if (ancestor := folder.parent) is None:
        return []
    records = [*_before(ancestor), *ancestor.records("metrics")]
    return [record for record in records if record["step"] <= folder.run["parent"]["step"]]


def draw_loss_curves(folders: Iterable[RunFolder], path: Path | str) -> None:
    """Draw the comparison into an image file, in the format of its ending. Keeps matplotlib's global state."""
    write_figure(loss_curves(list(folders)), Path(path), dpi=200)


def loss_curves(folders: Sequence[RunFolder]) -> Figure:
    """Left: loss over tokens with switches and cooldowns. Right: the validation losses that each run ended with."""
    shown = curves(folders)
    results = [(c, view, loss) for c in shown if c.asked_for for view, loss in _results(c.folder)]
    figure = new_figure(max(4.0, 1.0 + 0.42 * len(results)), width=9.2)
    left, right = figure.subplots(1, 2, width_ratios=(2.1, 1))
    styles = _styles(shown)
    _draw_curves(left, shown, styles)
    _draw_results(right, results, {curve.folder.path: colour for curve, (colour, _) in zip(shown, styles, strict=True)})
    return figure


def _styles(shown: Sequence[Curve]) -> list[tuple[str, Any]]:
    """(colour, dashes) of each curve; grey for a trunk, which others are branched from."""
    parents = {parent.path.resolve() for curve in shown if (parent := curve.folder.parent)}
    styles, index = [], 0
    for curve in shown:
        if curve.folder.path.resolve() in parents:
            styles.append((_TRUNK, "solid"))
        else:
            colour, _, _ = series_style(index)
            _, _, dashes = series_style(index + index // 6)  # each round of six colours has other dashes
            styles.append((colour, dashes))
            index += 1
    return styles


def _results(folder: RunFolder) -> list[tuple[str, float]]:
    """(view, loss) of every view that was measured, the run's own one first."""
    losses, own = validation_losses(folder), own_view(folder.scheme)
    return sorted(losses.items(), key=lambda item: (item[0] != own, item[1]))


def _draw_curves(axes: Axes, shown: Sequence[Curve], styles: Sequence[tuple[str, Any]]) -> None:
    for order, (curve, (colour, dashes)) in enumerate(zip(shown, styles, strict=True)):
        if curve.width:
            axes.plot(curve.tokens, curve.loss, color=colour, linewidth=0.6, alpha=0.22, zorder=1)
        line = {"color": colour, "linestyle": dashes, "label": literal(curve.folder.name)}
        axes.plot(curve.x, curve.y, **line, linewidth=1.7, zorder=3 + order)
        for start in curve.cooldowns:
            mark(axes, start, curve.at(start), "o", colour, hollow=True, size=7, zorder=30)
        if curve.switch is not None:
            mark(axes, curve.switch, curve.at(curve.switch), "D", colour, size=7, zorder=31)
    if any(curve.switch is not None for curve in shown):
        mark(axes, [], [], "D", INK, "switch to QAT", size=7)
    if any(curve.cooldowns for curve in shown):
        mark(axes, [], [], "o", INK, "cooldown starts", hollow=True, size=7)
    _scale(axes, shown)
    widths = [curve.width for curve in shown if curve.width]
    smoothing = f", mean over {format_amount(float(f'{max(widths):.2g}'))} tokens" if widths else ""
    axes.xaxis.set_major_formatter(lambda value, _: format_amount(value))
    tidy(axes, "Loss over tokens", "tokens", f"training loss (nats per token{smoothing})")
    if shown:
        axes.legend(frameon=False, fontsize=8, loc="best", handlelength=3.2)


def _scale(axes: Axes, shown: Sequence[Curve]) -> None:
    """Scale the axes to where the runs differ; the steep fall of the first steps is cut off."""
    if not shown:
        return
    end = max(curve.tokens[-1] for curve in shown)
    axes.set_xlim(0, end * 1.02)
    late = np.concatenate([curve.y[curve.x > _SKIPPED * end] for curve in shown])
    late = late[np.isfinite(late)]
    if len(late) and late.max() > late.min():
        pad = 0.06 * (late.max() - late.min())
        axes.set_ylim(late.min() - pad, late.max() + 2 * pad)


def _draw_results(axes: Axes, results: Sequence[tuple[Curve, str, float]], styles: dict[Path, str]) -> None:
    """One row per (run, view), with a dot and its value; a loss beyond the range is an arrow at its end."""
    own = [loss for curve, view, loss in results if view == own_view(curve.folder.scheme)]
    low, high = _range(own, [loss for _, _, loss in results])
    for row, (curve, view, loss) in enumerate(results):
        marker = ">" if loss > high else "s" if view.startswith("ptq") else "o"
        hollow = view != own_view(curve.folder.scheme)
        mark(axes, min(loss, high), row, marker, styles[curve.folder.path], hollow=hollow, size=7)
        place: dict[str, Any] = {"xytext": (9, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(f"{loss:.3f}", (min(loss, high), row), **place, fontsize=8, color=INK)
    axes.set_yticks(range(len(results)), [f"{literal(c.folder.name)}\n{view_label(v)}" for c, v, _ in results])
    axes.set_ylim(max(len(results), 1) - 0.5, -0.5)
    for loss in (loss for curve, view, loss in results if view == curve.folder.scheme == "fp"):
        axes.axvline(loss, color=_TRUNK, linewidth=0.9, linestyle=(0, (2, 2)), zorder=1)  # what quantization costs
    if high > low:
        axes.set_xlim(low - 0.12 * (high - low), high + 0.38 * (high - low))  # room for the value
    else:
        axes.text(0.5, 0.5, "no validation yet", transform=axes.transAxes, ha="center", color=INK)
        axes.set_xticks([])
    tidy(axes, "Where each run ended", "validation loss (nats per token)", grid="x")


def _range(own: Sequence[float], losses: Sequence[float]) -> tuple[float, float]:
    """The losses that decide the range: all but those that lie further above the runs' own views than these differ.

    A view that a run was not trained for may lie nats above, and would flatten all other differences.
    """
    finite, judged = [x for x in losses if np.isfinite(x)], [x for x in own if np.isfinite(x)]
    if not finite:
        return 0.0, 0.0
    low, worst = min(finite), max(judged, default=max(finite))
    most = worst + max(2 * (worst - low), 0.1 * worst)
    high = max(loss for loss in finite if loss <= most)
    return low, max(high, low + max(0.02 * abs(low), 1e-6))
