"""The report: which figures there are, what they show, and what a browser sees of the page."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from qatlaw import synthetic
from qatlaw.bit_widths import BIT_WIDTHS
from qatlaw.figures.evidence import Drawn, Evidence, Laws
from qatlaw.figures.style import amount, thinned, width_dash, width_style
from qatlaw.figures.subjects import SUBJECTS
from qatlaw.findings import findings
from qatlaw.fit_file import fit_file, read_fit, write_fit
from qatlaw.fitting import fit
from qatlaw.fraction import fraction_at
from qatlaw.laws import QAT_UNIFIED
from qatlaw.page import Report, compose, html, image, template, write_report
from qatlaw.plan.waste import split_loss, wasted_tokens
from qatlaw.planner_law import synthetic_law
from qatlaw.runs import Collected, LeftOut
from qatlaw.summary import coefficient_rows, comparison_rows, curve_rows, quality_rows, rivals, summarise
from qatlaw.table import RunTable
from qatlaw.tables import load_table
from tests.law.browser import CannotError, Seen, open_page
from tests.law.law_runs import command, finished, labels_apart

NAMES = (
    "optimal_fraction", "u_curves", "law_against_measurement", "residuals", "equal_memory", "against_full_precision",
    "wasted_tokens", "fusion", "cooldown_shapes",
)  # fmt: skip
FUSED_GAP = -0.003


def quickstart() -> RunTable:
    """Four results of a former quickstart (seed 0 of analysis/benchmarks/qat_against_ptq.md)."""
    D, f = 2_000_896, 293 / 977
    rows = [
        ("fp", 16, D, 0, 2.9837),
        ("ptq", 2, D, 0, 3.2805),
        ("sequential", 2, D * (1 - f), D * f, 3.1801),
        ("fused", 2, D * (1 - f), D * f, 3.0879),
    ]
    frame = pd.DataFrame(rows, columns=["scheme", "bits", "tokens_fp", "tokens_qat", "loss"])
    return RunTable.from_frame(frame.assign(n_params=279_104), "quickstart")


def rich(noise: float = 0.0) -> RunTable:
    """The synthetic grid with fused runs, PTQ and QAT from scratch."""
    frame = synthetic.table(0, noise=noise).frame
    full = frame[(frame["scheme"] == "fp") & (frame["seed"] == 0)]
    fused = frame[frame["scheme"] == "sequential"].assign(scheme="fused")
    parts = [frame, fused.assign(loss=fused["loss"] + FUSED_GAP)]
    for bits in synthetic.BITS:
        parts.append(full.assign(scheme="ptq", bits=bits, loss=full["loss"] + 1 / bits))
        scratch = full.assign(scheme="scratch", bits=bits, loss=full["loss"] + 0.5 / bits)
        parts.append(scratch.assign(tokens_qat=full["tokens_fp"], tokens_fp=0.0))
    return RunTable.from_frame(pd.concat(parts, ignore_index=True), "grid")


def made_up_laws(table: RunTable) -> Laws:
    law = synthetic_law()
    return Laws({None: law.law}, law.source, table.ranges, "sequential", demonstration=True)


@pytest.fixture(scope="module")
def full() -> dict[str, Drawn]:
    """Every figure of the rich table under the law it was drawn from, without noise."""
    evidence = Evidence(rich(), made_up_laws(rich()))
    return {one.name: one for one in (draw(evidence) for draw in SUBJECTS)}


@pytest.fixture(scope="module")
def few() -> dict[str, Drawn]:
    """Of the quickstart's runs, without a law."""
    return {one.name: one for one in (draw(Evidence(quickstart(), None)) for draw in SUBJECTS)}


def test_with_runs_enough_every_figure_is_drawn(full: dict[str, Drawn]) -> None:
    assert tuple(full) == NAMES
    for name, one in full.items():
        if name == "cooldown_shapes":
            assert one.lacking == "runs that differ in schedule.shape alone."
            continue
        assert one.figure is not None, one.lacking
        assert one.caption.endswith(".")
        for axes in one.figure.axes:
            place = axes.get_subplotspec()
            bottom = place is None or place.is_last_row()
            assert axes.get_xlabel() or not bottom or not axes.get_visible(), one.name


def test_with_few_runs_what_cannot_be_drawn_says_what_it_needs(few: dict[str, Drawn]) -> None:
    assert tuple(few) == NAMES
    assert {name for name, one in few.items() if one.figure is not None} == {
        "optimal_fraction", "u_curves", "against_full_precision", "fusion",
    }  # fmt: skip
    for one in few.values():
        assert one.figure is not None or "law" in one.lacking or "schedule.shape" in one.lacking
    assert "are not optima" in few["optimal_fraction"].caption
    assert "extrapolation" in few["optimal_fraction"].warnings[0]


def line(drawn: Drawn, label: str, axes: int = 0) -> np.ndarray:
    """[2, points] of the line with this label."""
    assert drawn.figure is not None
    found = [one for one in drawn.figure.axes[axes].get_lines() if one.get_label() == label]
    assert len(found) == 1, (label, [one.get_label() for one in drawn.figure.axes[axes].get_lines()])
    return np.array(found[0].get_data(), dtype=np.float64)


def test_the_closed_form_and_the_measured_optima_are_where_they_belong(full: dict[str, Drawn]) -> None:
    S, f = line(full["optimal_fraction"], "closed form")
    inside = np.isfinite(f)
    assert f[inside] == pytest.approx(fraction_at(S[inside]))
    assert S[inside].min() >= 35, "dotted, not solid, where it extrapolates"
    S, f = line(full["optimal_fraction"], "measured, 2 bits")
    law = synthetic.law()
    for size in synthetic.SIZES:  # any size gives the same S; the law's own optimum hardly depends on the size
        predicted = law.optimal_fraction(size, S * size * 2 / 8, 2.0)
        assert np.abs(f - predicted).max() < 0.03, "curves without noise: the read-off's own error is 0.01"


def test_differences_to_full_precision_and_of_fusion_are_those_of_the_runs(
    full: dict[str, Drawn], few: dict[str, Drawn]
) -> None:
    assert few["against_full_precision"].figure is not None
    (axes,) = few["against_full_precision"].figure.axes
    shown = sorted(y for one in axes.get_lines() for x, y in np.array(one.get_data(), np.float64).T if x == 2_000_896)
    assert shown == pytest.approx([3.0879 - 2.9837, 3.1801 - 2.9837, 3.2805 - 2.9837])
    assert few["fusion"].figure is not None
    assert line(few["fusion"], "279K")[1] == pytest.approx([3.0879 - 3.1801])
    assert line(full["fusion"], "86M")[1] == pytest.approx(FUSED_GAP)


def test_residuals_of_the_law_that_made_the_runs_are_zero_but_of_scratch_there_are_none(full: dict[str, Drawn]) -> None:
    """The law does not describe QAT from scratch, so that no residual of it is shown."""
    x, y = line(full["residuals"], "4 bits", axes=3)
    assert len(x) == 180
    assert np.abs(y).max() < 1e-10


def test_wasted_tokens_are_those_of_the_planner(full: dict[str, Drawn]) -> None:
    D, share = line(full["wasted_tokens"], "1 bit")
    inside = np.isfinite(share)
    expected = 100 * wasted_tokens(synthetic.law(), synthetic.SIZES[0], D[inside], 0.1, 1.0)
    assert share[inside] == pytest.approx(expected)
    f = synthetic.law().optimal_fraction(synthetic.SIZES[0], D[-1], 1.0)
    assert f > 0.3
    assert share[inside][-1] > 10, "at 1.4T tokens and 1 bit the rule is far off"
    assert split_loss(synthetic.law(), 86e6, 1.4e12, 0.1, 1.0) > split_loss(synthetic.law(), 86e6, 1.4e12, f, 1.0)


def test_a_model_at_equal_memory_fills_the_budget(full: dict[str, Drawn]) -> None:
    assert full["equal_memory"].figure is not None
    (axes,) = full["equal_memory"].figure.axes
    budgets = [one.get_label() for one in axes.get_lines() if not str(one.get_label()).startswith("_")]
    sizes = [text.get_text() for text in axes.texts]
    for budget, row in zip(budgets, np.array(sizes).reshape(len(budgets), -1), strict=True):
        bytes_ = float(budget.split()[0]) * 1e6
        for bits, told in zip(synthetic.BITS, row, strict=True):
            assert told == amount(bytes_ * 8 / bits)


def test_the_answer_has_the_numbers_of_the_runs() -> None:
    sentences = findings(Evidence(quickstart(), None))
    assert len(sentences) == 3
    assert "lowest loss is 2.9837 nats, of full precision with 279K parameters and 2M tokens" in sentences[0]
    assert "0.104 by QAT and 0.297 by PTQ at 2 bits" in sentences[1]
    assert "lowers the loss by 0.092 nats (median of 1 pair)" in sentences[2]
    sentences = findings(Evidence(rich(), None))
    assert len(sentences) == 4
    curves = Evidence(rich(), None).curves
    optima = [curve.optimum for curve in curves if curve.inside and curve.B == 1]
    assert f"{min(optima):.2f} to {max(optima):.2f} at 1 bit" in sentences[1]


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.1), what is left of a colour in a grey print."""
    channels = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return float(np.dot(channels, (0.2126, 0.7152, 0.0722)))


def test_bit_widths_are_told_apart_without_colour() -> None:
    widths = BIT_WIDTHS
    assert len({width_style(bits)[1] for bits in widths}) == len(widths), "a marker each"
    assert len({width_style(bits)[0] for bits in widths}) == len(widths)
    assert len({str(width_dash(bits, (1, 2, 4, 6))) for bits in (1, 2, 4, 6)}) == 4
    for bits in widths:
        assert 1.05 / (luminance(width_style(bits)[0]) + 0.05) > 2, f"{bits} bits on white paper"


def test_no_label_lies_over_another(full: dict[str, Drawn], few: dict[str, Drawn]) -> None:
    for one in (*full.values(), *few.values()):
        labels_apart(one)


def test_rows_and_amounts() -> None:
    assert [amount(2.3e9), amount(86e6)] == ["2.3B", "86M"]
    assert thinned([1, 2, 3, 4, 5], 3) == [1, 3, 5]
    table = str(template("pieces.html.jinja").module.html_table([("a", "b<"), ("x & y", "1.5"), ("z", "–")]))
    assert '<th class="n">b&lt;</th>' in table
    assert "<td>x &amp; y</td>" in table


def test_a_page_names_what_makes_it_a_demonstration() -> None:
    table = RunTable.from_frame(quickstart().frame.assign(synthetic=True), "a demonstration")
    page = html(Report(Evidence(table, made_up_laws(table)), "today"))
    assert "drawn from a made-up law" in page
    assert "Plan nothing by it" in page


def test_a_law_on_effective_bits_is_drawn_over_nominal_ones(tmp_path: Path) -> None:
    """At the widths of the runs it says what the law itself says of their effective bits."""
    table = load_table("ladder-1to1000").runs
    file = tmp_path / "fit.json"
    runs = table.of_scheme("sequential")
    write_fit(file, fit_file(fit(QAT_UNIFIED, runs.on_effective_bits, starts=1)))
    laws = compose(Collected(table), law=str(file), scheme="sequential").evidence.laws
    assert laws is not None
    stored = read_fit(file).law
    D_fp, D_qat, N = (runs.column(name)[runs.quantized] for name in ("tokens_fp", "tokens_qat", "n_params"))
    nominal, effective = (runs.column(name)[runs.quantized] for name in ("bits", "effective_bits"))
    assert laws.by_width[None].loss(N, D_fp, D_qat, nominal) == pytest.approx(stored.loss(N, D_fp, D_qat, effective))


def test_the_page_of_a_fit_shows_its_numbers(tmp_path: Path) -> None:
    """Coefficients with their intervals, and the comparison, as the command line prints them."""
    table = synthetic.table(0)
    table = table.where(np.arange(len(table)) % 2 == 0)
    (summary,) = summarise(QAT_UNIFIED, table, "sequential", resamples=20, starts=4)
    compared = rivals(table, "sequential", starts=1)
    laws = Laws({None: summary.result.law}, "qat_unified, fitted on these runs", table.ranges, "sequential")
    report = Report(
        Evidence(table, laws), "today", [summary], compared, [LeftOut("bad<run>", "diverged: its loss is not finite")]
    )
    page = write_report(report, tmp_path).read_text()
    for rows in (coefficient_rows(summary), quality_rows(summary), curve_rows(summary), comparison_rows(compared)):
        assert str(template("pieces.html.jinja").module.html_table(rows)) in page
    assert {row[0] for row in coefficient_rows(summary)[1:]} == set(synthetic.COEFFICIENTS)
    assert comparison_rows(compared)[1][0] in ("qat_unified", "qat_per_bits"), "rivals know no split"
    assert "bad&lt;run&gt;" in page
    assert not re.findall(r'(?:src|href)="(?!data:|#|runs.csv")', page), "nothing is loaded from elsewhere"
    assert pd.read_csv(tmp_path / "runs.csv")["loss"].tolist() == table.loss.tolist(), "all runs, also as a file"
    again = SUBJECTS[0](report.evidence)
    assert again.figure is not None
    assert image(again.figure, "svg") == report.svg[again.name], "the same runs give the same bytes"
    for one in report.drawn:
        for ending in ("svg", "png"):
            assert (tmp_path / "figures" / f"{one.name}.{ending}").exists() == (one.figure is not None)


def seen(arguments: Sequence[str], folder: Path) -> Seen:
    """The page of a report, in a browser."""
    assert command("report", *arguments, "--out", str(folder / "report")) == 0
    try:
        return open_page(folder / "report" / "report.html", folder)
    except CannotError as reason:
        pytest.skip(str(reason))


def test_the_report_of_the_quickstarts_runs_in_a_browser(tmp_path: Path) -> None:
    """Its trunk and its three branches, as run folders with the final numbers of the record."""
    runs, law = tmp_path / "runs", synthetic.law()
    finished(runs, "trunk", "quickstart", law, "qat.scheme=fp", "schedule.cooldown_fraction=0", loss=3.34)
    for scheme, loss in (("fp", 2.9837), ("sequential", 3.1801), ("fused", 3.0879)):
        finished(runs, scheme, "quickstart", law, f"qat.scheme={scheme}", loss=loss)
    page = seen(["--runs", str(runs)], tmp_path)
    assert page.console == [], "no error, no warning"
    facts = page.facts
    drawn = ["optimal_fraction", "u_curves", "against_full_precision", "fusion"]
    assert [name for name in facts["sections"] if name] == ["answer", *drawn, "runs"]
    assert [image["section"] for image in facts["images"]] == drawn
    assert facts["lacking"] == ["answer"], "one box says what is missing"
    for missing in ("Loss law", "Law against measurement", "Residuals", "Tokens wasted by the 10 % rule"):
        assert missing in facts["text"]
    assert all(image["width"] > 300 and image["shown"] > 300 for image in facts["images"])
    assert all(name.startswith("data:") for name in facts["loaded"])
    assert facts["page"] <= facts["window"], "nothing sticks out"
    for told in ("without a cooldown", "3.0879", "extrapolation", "lowers the loss by 0.092 nats", "0.104 by QAT"):
        assert told in facts["text"]
    phone = open_page(tmp_path / "report" / "report.html", tmp_path, width=390).facts
    assert phone["window"] == 390
    assert phone["page"] <= 390, "tables and figures scroll within the page"
    assert phone["tables"]
    points = 7.4 * 72
    assert all(image["shown"] / points * 7.5 > 8.5 for image in phone["images"] if image["width"] > 600), "pixels"


def test_the_report_of_many_runs_in_a_browser(tmp_path: Path) -> None:
    table = rich(0.0005).frame
    table[table["n_params"] < 4e8].to_csv(tmp_path / "runs.csv", index=False)
    page = seen(["--table", str(tmp_path / "runs.csv"), "--law", "synthetic", "--scheme", "sequential"], tmp_path)
    assert page.console == []
    assert [image["section"] for image in page.facts["images"]] == list(NAMES[:-1])
    assert page.facts["text"].count("arXiv 2509.22935.") >= 7, "the figures of the paper that ours correspond to"
    assert page.facts["page"] <= page.facts["window"]
    assert "made-up" in json.dumps(page.facts["text"])
