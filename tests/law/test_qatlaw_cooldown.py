"""The cooldown laboratory against a quadratic bowl: bias, variance, paired differences and what the report shows."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t as student

from qatlaw.cooldown import POINT, bias_and_variance, branch_frame, branches_of, differences, interval
from qatlaw.figures.evidence import Drawn, Evidence
from qatlaw.figures.subjects import LABORATORY, SUBJECTS, draw_all
from qatlaw.findings import findings
from qatlaw.names import AVERAGED
from qatlaw.page import compose, html, write_report
from qatlaw.results import read_results, write_results
from qatlaw.runs import Collected, RunRecord, collect
from tests.law.bowl import BIAS, CURVATURE, LOWEST, SPREAD, bowl_records
from tests.law.law_runs import labels_apart

ORDERS = np.array([np.random.default_rng(order).standard_normal(3) for order in range(5)])
"""The noise of each order of the cooldown's data: [orders, axes]."""
LENGTH = 0.1 * (0.3 - 0.2)
"""What the recipe's cooldown of 20 % adds to the distance."""


@pytest.fixture(scope="module")
def records() -> list[RunRecord]:
    return bowl_records()


@pytest.fixture(scope="module")
def runs(records: list[RunRecord]) -> Collected:
    return collect(records, "bowl")


@pytest.fixture(scope="module")
def drawn(runs: Collected) -> dict[str, Drawn]:
    found = (draw(Evidence(runs.table, None, runs.records)) for draw in (SUBJECTS[-1], *LABORATORY))
    return {one.name: one for one in found}


def ends(shape: str, orders: int = 5, more: float = 0.0) -> np.ndarray:
    """Where the full-precision branches of a shape end: [orders, axes]."""
    return BIAS[shape] + LENGTH + more + SPREAD[shape] * ORDERS[:orders]


def losses(weights: np.ndarray) -> np.ndarray:
    return LOWEST + 0.5 * (weights**2 @ CURVATURE)


def table(drawn: dict[str, Drawn], name: str, group: str) -> pd.DataFrame:
    found = drawn[name].table
    assert found is not None
    return found[found["group"] == group]


def test_variance_is_half_the_trace_of_curvature_times_covariance(drawn: dict[str, Drawn]) -> None:
    """And bias is the loss of the branches' mean above the lowest such loss."""
    found = table(drawn, "bias_and_variance", "full precision").set_index("shape")
    assert set(found.index) == set(BIAS)
    middle = {shape: losses(ends(shape).mean(axis=0)) for shape in BIAS}
    for shape in BIAS:
        expected = 0.5 * np.trace(np.diag(CURVATURE) @ np.cov(ends(shape).T, bias=True))
        assert found.loc[shape, "variance"] == pytest.approx(expected, rel=1e-9)
        assert found.loc[shape, "bias"] == pytest.approx(middle[shape] - min(middle.values()), abs=1e-12)
        total = found.loc[shape, ["bias", "variance"]].sum() + min(middle.values())
        assert total == pytest.approx(found.loc[shape, "mean"], abs=1e-12)
    assert (found["branches"] == 5).all(), "three branches of another setting do not count"


def test_pairs_with_the_same_data_share_its_noise(drawn: dict[str, Drawn]) -> None:
    """The interval is that of the differences, which is narrower than that of the losses."""
    found = table(drawn, "cooldown_shapes", "full precision").set_index("shape")
    for shape in BIAS.keys() - {"1-sqrt"}:
        pairs = losses(ends(shape)) - losses(ends("1-sqrt"))
        error = np.std(pairs, ddof=1) / np.sqrt(5)
        assert found.loc[shape, "above"] == pytest.approx(pairs.mean(), abs=1e-12)
        assert found.loc[shape, "half_width"] == pytest.approx(student.ppf(0.975, 4) * error, rel=1e-9)
        assert found.loc[shape, "loss"] == pytest.approx(losses(ends(shape)).mean(), abs=1e-12)
        assert found.loc[shape, "deviation"] == pytest.approx(np.std(losses(ends(shape)), ddof=1), rel=1e-9)
    assert found.loc["lowered_linear 0.76", "pairs"] == 3
    assert list(found.index) == list(found.sort_values("above").index)


def test_adamw_stands_beside_the_shapes_over_the_same_orders(drawn: dict[str, Drawn]) -> None:
    found = table(drawn, "cooldown_adamw", "full precision").set_index("setting")
    expected = {f"β₂ {beta}": 0.05 * abs(beta - 0.95) for beta in (0.9, 0.98, 0.99, 0.995, 0.999)}
    expected |= {"β₁ 0.8": 0.002, "β₁ 0.95": 0.001, "decay 0": 0.001, "decay 0.05": 0.0005, "decay 0.2": 0.001}
    expected["β₂ 0.99, decay 0"] = expected["β₂ 0.99"] + expected["decay 0"]
    for setting, more in expected.items():
        orders = 5 if setting in ("β₂ 0.99", "decay 0", "β₂ 0.99, decay 0") else 3
        pairs = losses(ends("1-sqrt", orders, more)) - losses(ends("1-sqrt", orders))
        assert found.loc[setting, "above"] == pytest.approx(pairs.mean(), abs=1e-12), setting
        assert found.loc[setting, "pairs"] == orders
    lowered = losses(ends("lowered_linear", 3))  # whose own setting is varied with beta2, one at a time and together
    for setting, more in (("0.76: as usual", 0.0006), (": β₂ 0.999", 0.00245), ("0.76: β₂ 0.999", 0.00305)):
        name = f"lowered_linear{setting if setting[0] == ':' else f' {setting}'}"
        pairs = losses(ends("lowered_linear", 3, more)) - lowered
        assert found.loc[name, "above"] == pytest.approx(pairs.mean(), abs=1e-12), name
        expected[name] = more
    assert set(found.index[found["kind"] == "AdamW"]) == set(expected)
    assert found.loc["linear", "above"] == pytest.approx(
        (losses(ends("linear")) - losses(ends("1-sqrt"))).mean(), abs=1e-12
    )
    assert set(drawn["cooldown_adamw"].table["group"]) == {"full precision", "fused, 2 bits", "fused, 4 bits"}  # type: ignore[index]


def test_the_answer_names_what_ends_lowest(runs: Collected, drawn: dict[str, Drawn]) -> None:
    """In each panel the lowest of the differences, which other tests hold against closed forms."""
    _, shapes, adamw, *_ = findings(Evidence(runs.table, None, runs.records), drawn=list(drawn.values()))
    for group in ("full precision", "fused, 4 bits"):
        for sentence, name, column in ((shapes, "cooldown_shapes", "shape"), (adamw, "cooldown_adamw", "setting")):
            found = table(drawn, name, group).set_index(column)
            above = found.loc[found["kind"] == "AdamW" if "kind" in found else slice(None), "above"]
            assert f"{group}: {above.idxmin()} ({above.min():+.4f} ± " in sentence


def test_lengths_stand_by_scheme_bits_and_length_of_qat(drawn: dict[str, Drawn]) -> None:
    groups = {"full precision", *(f"fused, {b} bits, QAT {q}" for b, q in product((2, 4), ("as long", "50%")))}
    assert set(drawn["cooldown_length"].table["group"]) == groups  # type: ignore[index]
    for group in groups:
        found = table(drawn, "cooldown_length", group).set_index("cooldown")["above"]
        assert found[0.2] == 0
        assert found.idxmin() == 0.3, "the bowl's best length"
        assert found[0.1] == pytest.approx(found[0.5], abs=1e-12) if 0.5 in found and "50" not in group else True


def test_figures_are_drawn_without_one_label_over_another(drawn: dict[str, Drawn]) -> None:
    for one in drawn.values():
        assert one.figure is not None, one.lacking
        labels_apart(one)


def test_averages_stand_above_the_runs_that_cool_down(drawn: dict[str, Drawn]) -> None:
    found = table(drawn, "averaging", "full precision")
    cooled = losses(ends("1-sqrt")).mean()
    uncooled = losses(BIAS["1-sqrt"] + 0.1 * 0.3 + SPREAD["1-sqrt"] * ORDERS[0])
    assert list(found["averaged"]) == [0, 2, 5, 10]
    assert list(found["loss"] - found["cooled"]) == pytest.approx(
        [uncooled - 0.002 * n - cooled for n in (0, 2, 5, 10)]
    )
    assert list(found["window"]) == pytest.approx([0, *(45 * (n - 1) / 2246 for n in (2, 5, 10))])
    groups = set(drawn["averaging"].table["group"])  # type: ignore[index]
    assert {"fused, 2 bits, QAT 20%", "fused, 4 bits, QAT 50%"} < groups


def test_a_table_on_disk_gives_the_same_figures(records: list[RunRecord], runs: Collected, tmp_path: Path) -> None:
    """results.csv keeps all of it; averages are no measurements for a law; the page links the numbers."""
    write_results(tmp_path / "results.csv", records)
    again = collect(read_results(tmp_path / "results.csv"), "bowl")
    columns = [*POINT, "shape", "beta2", "weight_decay", "cooldown", "fraction", "order", "averaged", "window", "loss"]
    pd.testing.assert_frame_equal(branch_frame(again.records)[columns], branch_frame(records)[columns])
    assert len(set(runs.table.trunks)) == 1, "orders of the cooldown's data are branches of one trunk"
    averages = sum(AVERAGED in record.final for record in records)
    assert sum("averaged" in one.reason for one in runs.left_out) == averages > 50
    report = compose(again, law="synthetic", compare=False)
    page = html(report)
    write_report(report, tmp_path)
    for draw in report.drawn:
        if draw.table is not None:
            numbers = pd.read_csv(tmp_path / "figures" / f"{draw.name}.csv")
            assert len(numbers) == len(draw.table)
            assert f'href="figures/{draw.name}.csv"' in page
    assert "variance = mean loss of the branches" in page


def test_settings_of_a_shape_are_in_its_name_where_they_differ(records: list[RunRecord]) -> None:
    """Also those of a shape that is yet to come; the branches stay those of one trunk."""
    usual = records[0].recipe
    of_most = RunRecord("a", "a", "FINISHED", records[0].final, {**usual, "schedule.power": "2.0"})
    for key, value in (("power", "3.0"), ("knots", "[1, 0]"), ("min_lr_ratio", "0.1")):
        other = RunRecord("b", "b", "FINISHED", of_most.final, {**of_most.recipe, f"schedule.{key}": value})
        frame = branch_frame([of_most, other, of_most])
        assert list(frame["shape"]) == ["1-sqrt", f"1-sqrt {value}", "1-sqrt"]
        assert len(frame[POINT].drop_duplicates()) == 1
    assert branch_frame([]).empty


def test_the_usual_adamw_is_that_of_most_runs(records: list[RunRecord]) -> None:
    """Also where the recipe's cooldown has an AdamW of its own, as shipped recipes do."""

    def own(record: RunRecord) -> RunRecord:
        recipe, rest = record.recipe, {"optimizer.betas": "[0.5, 0.5]"}
        for phase in ("cooldown", "qat_cooldown"):
            key = f"schedule.phases.{phase}.betas"
            rest[key] = recipe[key] if recipe.get(key, "null") != "null" else recipe["optimizer.betas"]
        return replace(record, recipe=recipe | rest)

    frame, other = branch_frame(records), branch_frame([own(record) for record in records])
    assert list(other["usual"]) == list(frame["usual"]) == list((frame["beta2"] == 0.95) & (frame["beta1"] == 0.9)
                                                                 & (frame["weight_decay"] == 0.1))  # fmt: skip


def test_runs_without_such_branches_have_the_usual_figures(records: list[RunRecord]) -> None:
    few = [record for record in records if record.recipe["data.cooldown_seed"] == "0" and AVERAGED not in record.final]
    found = collect(few, "few")
    last = draw_all(Evidence(found.table, None, found.records))[-1]
    assert last.name == "cooldown_shapes"
    shapes = table({"cooldown_shapes": last}, "cooldown_shapes", "full precision").set_index("shape")
    assert shapes.loc["linear", "above"] == pytest.approx((losses(ends("linear", 1)) - losses(ends("1-sqrt", 1)))[0])
    assert set(shapes["pairs"]) == {1}
    assert all(len(group) == 1 for group in branches_of(few))


def test_single_values_have_no_interval() -> None:
    assert interval(np.array([2.0]))[0] == 2
    assert np.isnan(interval(np.array([2.0]))[1])
    frame = pd.DataFrame({"shape": ["a", "b"], "loss": [1.0, 3.0], "order": [0, 1], **dict.fromkeys(POINT, "x")})
    assert list(differences(frame, "shape", "a")["shape"]) == ["a"], "nothing is compared across other data"
    assert bias_and_variance(frame.assign(averaged=0)).empty
