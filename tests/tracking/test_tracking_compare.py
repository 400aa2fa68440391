"""Tables of runs, and the figure: what is drawn is what was logged."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from qatscale.tracking.compare import (
    comparison_table,
    list_runs,
    median_speeds,
    run_folders,
    run_row,
    runs_table,
    tokens_per_second,
    validation_losses,
    view_label,
)
from qatscale.tracking.curves import curves, draw_loss_curves, loss_curves, smoothed
from qatscale.tracking.run_folder import RunFolder, perplexity
from tests.law.law_runs import command
from tests.tracking.synthetic_runs import TOKENS_PER_STEP, MakeRun, finish, log_metrics, loss_at


@dataclass(frozen=True)
class Study:
    """A trunk and three branches, at the same total tokens."""

    trunk: RunFolder
    fp: RunFolder
    sequential: RunFolder
    fused: RunFolder

    @property
    def branches(self) -> list[RunFolder]:
        return [self.fp, self.sequential, self.fused]


@pytest.fixture
def study(make_run: MakeRun) -> Study:
    trunk = make_run("trunk", steps=1000)
    trunk.append("start", step=0)
    log_metrics(trunk, 0, 800)
    trunk.append("stopped", step=800, signal="SIGTERM")
    fp = make_run("fp", steps=1000, cooldown=200, parent=(trunk, 800))
    fp.append("start", step=800)
    log_metrics(fp, 800, 1000)
    finish(fp, {"fp": 2.25, "ptq2": 5.5, "ptq4": 2.375})
    sequential = make_run("sequential", scheme="sequential", steps=1000, switch=500, cooldown=100, parent=(trunk, 400))
    sequential.append("start", step=400)
    log_metrics(sequential, 400, 1000)
    finish(sequential, {"fp": 3.0, "quantized": 2.5625})
    fused = make_run("fused", scheme="fused", steps=1000, switch=500, cooldown=200, parent=(trunk, 500))
    fused.append("start", step=500)
    log_metrics(fused, 500, 1000)
    finish(fused, {"fp": 2.875, "quantized": 2.5})
    return Study(trunk, fp, sequential, fused)


def text(table: Table, width: int = 200) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(table)
    return out.getvalue()


def test_runs_are_listed_oldest_first_with_what_they_are(study: Study) -> None:
    rows = {row.name: row for row in list_runs(run_folders(study.trunk.path.parent))[0].values()}
    assert list(rows) == ["trunk", "fp", "sequential", "fused"]
    trunk, fused = rows["trunk"], rows["fused"]
    assert (trunk.scheme, trunk.bits, trunk.qat_fraction, trunk.status) == ("fp", None, 0.0, "stopped")
    assert (trunk.step, trunk.steps, trunk.tokens) == (800, 1000, 800 * TOKENS_PER_STEP)
    assert (trunk.val_loss, trunk.parent) == (None, None)
    assert (fused.scheme, fused.bits, fused.qat_fraction, fused.status) == ("fused", 2, 0.5, "done")
    assert (fused.val_loss, fused.parent) == (2.5, "trunk@500")
    assert fused.tokens == fused.tokens_total == 1000 * TOKENS_PER_STEP


def test_the_list_is_a_table_and_an_empty_folder_an_empty_list(study: Study, tmp_path: Path) -> None:
    shown = text(runs_table(list(list_runs(run_folders(study.trunk.path.parent))[0].values())))
    for cell in ("trunk@500", "50.0%", "800/1,000", "409.6K/512K", "2.5000", "stopped", "done"):
        assert cell in shown
    assert run_folders(tmp_path / "none") == []


def test_a_comparison_has_every_view_and_both_speeds(study: Study) -> None:
    rows = {row.name: row for row in map(run_row, study.branches)}
    assert rows["fp"].losses == {"fp": 2.25, "ptq2": 5.5, "ptq4": 2.375}
    assert rows["fused"].losses == {"fp": 2.875, "quantized": 2.5}
    assert perplexity(rows["fused"].losses["quantized"]) == math.exp(2.5)
    assert (rows["fused"].switch_step, rows["fp"].switch_step) == (500, None)
    assert (rows["fused"].tokens_per_second_fp, rows["fused"].tokens_per_second_qat) == (8000, 5000)
    assert rows["fp"].tokens_per_second_qat is None
    shown = text(comparison_table(list(rows.values())))
    for cell in ("full precision", "quantized", "PTQ 2-bit", "PTQ 4-bit", "5.5000", f"({math.exp(2.5):.4g})", "8,000"):
        assert cell in shown


def test_a_run_that_is_not_done_is_judged_by_its_last_validation(make_run: MakeRun) -> None:
    folder = make_run(scheme="fused", steps=200, switch=80, cooldown=20)
    folder.append("start", step=0)
    assert validation_losses(folder) == {}
    assert tokens_per_second(folder) == (None, None)
    log_metrics(folder, 0, 50)
    assert tokens_per_second(folder) == (None, None), "40 steps after the warm-up are no speed of record"
    log_metrics(folder, 50, 80)
    assert tokens_per_second(folder) == (8000, None)
    log_metrics(folder, 80, 160)
    assert tokens_per_second(folder) == (8000, 5000)
    for step, view, loss in ((80, "fp", 3.0), (160, "fp", 2.9), (160, "quantized", 2.7)):
        folder.append("validation", step=step, tokens=0, view=view, loss=loss, perplexity=math.exp(loss))
    assert validation_losses(folder) == {"fp": 2.9, "quantized": 2.7}
    assert run_row(folder).val_loss == 2.7


def test_speeds_leave_warm_up_out_and_count_steps_not_lines() -> None:
    """Two intervals of warm-up, then 40 steps at 100, and 20, in more lines, at 400."""
    steps = [(5, 1.0, True), (10, 2.0, True), (50, 100.0, False), *((50 + i, 400.0, False) for i in range(1, 21))]
    records = [{"step": s, "phase": "stable", "tokens_per_second": v, "warmup": w} for s, v, w in steps]
    assert median_speeds(records) == {"tokens_per_second_fp": 100.0, "tokens_per_second_qat": None}
    assert median_speeds(records[:-11])["tokens_per_second_fp"] is None, "49 steps"
    assert median_speeds([*records, records[-1] | {"step": 2**60}])["tokens_per_second_fp"] == 400.0


def test_a_loss_that_no_float_can_raise_e_to() -> None:
    assert perplexity(1000.0) == math.inf
    assert math.isnan(perplexity(math.nan))
    assert view_label("ptq1.58") == "PTQ 1.58-bit"


# the curves


def test_a_trunk_is_drawn_once_and_its_branches_start_on_it(study: Study) -> None:
    found = {curve.folder.name: curve for curve in curves(study.branches)}
    assert list(found) == ["trunk", "fp", "sequential", "fused"]
    trunk = found["trunk"]
    assert not trunk.asked_for
    assert trunk.tokens[-1] == 800 * TOKENS_PER_STEP, "to its last branch"
    for branch in (found["fp"], found["sequential"], found["fused"]):
        start = branch.folder.run["parent"]["step"] * TOKENS_PER_STEP
        assert branch.x[0] == start
        assert len(branch.x) == len(branch.tokens) + 1
        assert branch.y[0] == pytest.approx(trunk.at(start), abs=0.02)


def test_a_trunk_that_is_asked_for_is_drawn_to_its_end(study: Study) -> None:
    log_metrics(study.trunk, 800, 900)
    ends = {
        asked: curves([*study.branches, *more])[0].tokens[-1]
        for asked, more in {False: [], True: [study.trunk]}.items()
    }
    assert ends == {False: 800 * TOKENS_PER_STEP, True: 900 * TOKENS_PER_STEP}


def test_a_branch_of_a_branch_and_a_trunk_that_is_gone(make_run: MakeRun) -> None:
    trunk = make_run("trunk", steps=100)
    trunk.append("start", step=0)
    log_metrics(trunk, 0, 100)
    middle = make_run("middle", steps=200, parent=(trunk, 100))
    middle.append("start", step=100)
    log_metrics(middle, 100, 150)
    leaf = make_run("leaf", steps=200, parent=(middle, 150))
    leaf.append("start", step=150)
    log_metrics(leaf, 150, 200)
    assert [curve.folder.name for curve in curves([leaf])] == ["trunk", "middle", "leaf"]
    trunk.run_file.unlink()
    alone = curves([leaf])
    assert [curve.folder.name for curve in alone] == ["middle", "leaf"]
    assert alone[0].x[0] == 110 * TOKENS_PER_STEP, "its own first point"


def test_marks_lie_where_the_timeline_says(study: Study) -> None:
    found = {curve.folder.name: curve for curve in curves(study.branches)}

    def steps(curve: str) -> tuple[float | None, list[float]]:
        switch = found[curve].switch
        return switch and switch / TOKENS_PER_STEP, [start / TOKENS_PER_STEP for start in found[curve].cooldowns]

    assert steps("trunk") == (None, [])
    assert steps("fp") == (None, [800])
    assert steps("sequential") == (500, [400, 900])
    assert steps("fused") == (500, [800])


def test_smoothing_is_a_mean_that_keeps_lines_and_does_not_cross_the_switch() -> None:
    line, even = np.arange(20.0), np.full(20, 4.0)
    np.testing.assert_allclose(smoothed(line, even, 5)[:18], line[:18])
    jump = np.array([1.0] * 10 + [5.0] * 10)
    np.testing.assert_allclose(smoothed(jump, even, 5, switch=10), jump, rtol=1e-15)
    assert smoothed(jump, even, 5)[10] == pytest.approx((2 * 1 + 3 * 5) / 5)
    np.testing.assert_array_equal(smoothed(line, even, 1), line)
    holes = smoothed(np.array([1.0, np.nan, 3.0, np.inf, np.nan, np.nan, np.nan]), even[:7], 3)
    assert holes[1] == 2.0
    assert np.isnan(holes[5])


def test_a_point_counts_as_often_as_it_has_steps() -> None:
    values, steps = np.array([3.0, 9.0, 3.0]), np.array([20.0, 2.0, 18.0])
    assert smoothed(values, steps, 3)[1] == pytest.approx((20 * 3 + 2 * 9 + 18 * 3) / 40)


def test_the_curve_is_the_logged_loss_where_points_are_few(make_run: MakeRun) -> None:
    folder = make_run(steps=200)
    folder.append("start", step=0)
    log_metrics(folder, 0, 200)
    (curve,) = curves([folder])
    assert curve.width == 0
    np.testing.assert_array_equal(curve.x, np.arange(10, 201, 10) * TOKENS_PER_STEP)
    np.testing.assert_array_equal(curve.y, [loss_at(step, 200, None, 0, 2) for step in range(10, 201, 10)])


def test_the_figure_says_what_is_in_it(study: Study) -> None:
    left, right = loss_curves(study.branches).axes
    names = [label.get_text() for label in left.get_legend().get_texts()]
    assert names == ["trunk", "fp", "sequential", "fused", "switch to QAT", "cooldown starts"]
    assert left.get_ylabel() == "training loss (nats per token, mean over 15K tokens)"
    assert left.get_xlabel() == "tokens"
    dots = {
        label.get_text(): line.get_xdata()[0]
        for label, line in zip(
            right.get_yticklabels(), [x for x in right.lines if x.get_marker() != "None"], strict=True
        )
    }
    assert dots == {
        "fp\nfull precision": 2.25,
        "fp\nPTQ 4-bit": 2.375,
        "fp\nPTQ 2-bit": 3.0,
        "sequential\nquantized": 2.5625,
        "sequential\nfull precision": 3.0,
        "fused\nquantized": 2.5,
        "fused\nfull precision": 2.875,
    }
    assert [line.get_xdata()[0] for line in right.lines if line.get_marker() == ">"] == [3.0], "5.5 is off the scale"
    assert {"2.250", "2.375", "5.500", "2.562", "2.500"} <= {note.get_text() for note in right.texts}
    low, high = right.get_xlim()
    assert low < 2.25
    assert 3.0 < high < 4.0
    curve_styles = {
        (line.get_color(), str(line.get_linestyle())) for line in left.lines if line.get_label() in names[:4]
    }
    assert len(curve_styles) == 4, "told apart by colour, and by dashes without it"


def test_many_runs_are_told_apart(make_run: MakeRun) -> None:
    folders = [make_run(f"run{index}", steps=20) for index in range(20)]
    for folder in folders:
        folder.append("start", step=0)
        log_metrics(folder, 0, 20)
    lines = [line for line in loss_curves(folders).axes[0].lines if str(line.get_label()).startswith("run")]
    assert len({(line.get_color(), str(line._unscaled_dash_pattern)) for line in lines}) == 20


def test_the_axis_shows_where_the_runs_differ(study: Study) -> None:
    low, high = loss_curves(study.branches).axes[0].get_ylim()
    late = [r["loss"] for folder in study.branches for r in folder.records("metrics")]
    assert low < min(late)
    assert high < study.trunk.records("metrics")[0]["loss"], "the fall of the first steps leaves through the top"


def test_the_image_holds_the_curves_in_their_colours(study: Study, tmp_path: Path) -> None:
    import matplotlib
    from matplotlib.image import imread

    backend = matplotlib.get_backend()
    draw_loss_curves(study.branches, tmp_path / "figure.png")
    image = imread(tmp_path / "figure.png")[..., :3]
    assert image.shape[1] > image.shape[0] > 600
    for colour in ("#4D4D4D", "#0072B2", "#D55E00", "#009E73"):
        wanted = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        assert (np.abs(image - wanted).max(axis=-1) < 0.02).sum() > 300, colour
    assert matplotlib.get_backend() == backend


def test_a_run_without_validation_and_no_run_at_all_can_be_drawn(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run(steps=100)
    folder.append("start", step=0)
    log_metrics(folder, 0, 50)
    right = loss_curves([folder]).axes[1]
    assert [note.get_text() for note in right.texts] == ["no validation yet"]
    draw_loss_curves([folder], tmp_path / "one.png")
    draw_loss_curves([make_run("empty")], tmp_path / "none.png")
    assert (tmp_path / "none.png").stat().st_size > 1000


def test_losses_that_are_not_finite_leave_a_gap(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run(steps=100)
    folder.append("start", step=0)
    log_metrics(folder, 0, 50)
    folder.append("metrics", step=60, phase="stable", loss=math.nan, tokens_per_second=1.0)
    finish(folder, {"fp": math.inf})
    draw_loss_curves([folder], tmp_path / "nan.png")
    assert run_row(folder).val_loss == math.inf


DAMAGE = {
    "run.json": [
        "",
        "{",
        "[]",
        "null",
        '{"name": "x"}',
        '{"name": 1, "id": 2, "created": [], "parent": 3, "n_params": ""}',
    ],
    "recipe.yaml": ["", "qat: [", "7", "qat: 3\ndata: {}"],
    "timeline.json": ["", "{}", '{"steps": "x", "tokens_per_step": 1, "switch_step": null, "segments": []}'],
    "done.json": ["", "[]", '{"metrics": 3}'],
    "metrics.jsonl": ["no json\n", "[]\n", '{"event": "metrics", "step": "x"}\n'],
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_run_is_named_and_the_others_are_shown(
    name: str, make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = make_run("good"), make_run("bad")
    for folder in (good, bad):
        folder.append("start", step=0)
        log_metrics(folder, 0, 100)
        finish(folder, {"fp": 2.625})
    output = str(good.path.parent)
    whole = (bad.path / name).read_text()
    for content in DAMAGE[name]:
        (bad.path / name).write_text(content)
        for arguments in (["runs", output], ["compare", str(bad.path), str(good.path)]):
            assert command(*arguments) == 0, content
            shown = capsys.readouterr()
            assert "2.6250" in shown.out
            assert "warning: left out" in shown.err
            assert "runs/bad" in shown.err
    assert command("compare", str(bad.path)) == 2
    assert "Traceback" not in capsys.readouterr().err
    (bad.path / name).write_text(whole)
    assert command("runs", output) == 0
    assert capsys.readouterr().out.count("2.6250") == 2
