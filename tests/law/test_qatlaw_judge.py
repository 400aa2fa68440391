"""Published laws, tables of runs with their provenance, and the verdicts of one on the other."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from qatlaw.__main__ import main
from qatlaw.curves import measured_curves
from qatlaw.errors import InputError
from qatlaw.fraction import closed_form
from qatlaw.judge import (
    FULL,
    errors,
    judge,
    measured_gaps,
    precisions,
    published,
    refitted,
    unheld,
    verdict_rows,
)
from qatlaw.laws import KUMAR_2024
from qatlaw.laws.named import NAMED, Asked
from qatlaw.planner_law import load_law
from qatlaw.table import RunTable
from qatlaw.tables import JudgedTable, Provenance, load_table, table_names

CHEN = published(NAMED["chen-w4a16"])
LADDER = "analysis/studies/ladder-1to1000/rates.csv"


def asked(N, D, bits, a_bits=16.0, group=32.0, method="", ptq=False):
    shape = np.broadcast_shapes(*(np.shape(value) for value in (N, D, bits, a_bits, group)))
    values = (np.broadcast_to(np.asarray(value, float), shape) for value in (N, D, bits, a_bits, group))
    return Asked(*values, np.full(shape, method), np.full(shape, ptq))


def gap(law, runs):
    return law.loss(runs) - law.loss(runs.in_full_precision)


def scratch_table(loss, name="made", sizes=(5e7, 1e8, 2e8, 4e8), tokens=(2e9, 5e9, 1e10, 3e10), widths=(2, 4)):
    """Full precision and QAT from scratch on a grid of its own; loss(frame) in nats."""
    cells = [(N, D, B) for N in sizes for D in tokens for B in (16, *widths)]
    frame = pd.DataFrame(cells, columns=["n_params", "D", "bits"])
    full = frame["bits"] == 16
    frame["scheme"] = np.where(full, "fp", "scratch")
    frame["tokens_fp"], frame["tokens_qat"] = frame["D"] * full, frame["D"] * ~full
    frame = frame.assign(n_non_embedding=frame["n_params"], a_bits=16, group=128.0, method="")
    frame["effective_bits"] = np.nan
    return JudgedTable(
        name, Provenance(title=name, source="a test"), RunTable.from_frame(frame.assign(loss=loss(frame)))
    )


def run(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    assert ended.value.code == 0
    return capsys.readouterr().out


# --- the checks of the sources ---


def test_chen_meets_the_weight_only_gaps_of_quest():
    """To the digits that the source of the comparison prints: 30, 50, 100, 200M parameters, 100 tokens each."""
    runs = load_table("quest-runs").runs
    own = runs.where(precisions(runs) == "W4")
    loss, full = CHEN.losses(own)
    assert np.round(loss - full, 4).tolist() == [0.0384, 0.0353, 0.0309, 0.0273]
    assert np.round(measured_gaps(runs)[precisions(runs) == "W4"], 4).tolist() == [0.0401, 0.0372, 0.0295, 0.0269]
    assert own.frame["group"].tolist() == own.frame["hidden_size"].tolist()


def test_chen_meets_the_gap_of_the_pilot():
    runs = load_table("pilot-1to1000").runs
    (row,) = np.flatnonzero(precisions(runs) == "W4")
    assert runs.column("tokens_qat")[row] / runs.tokens_total[row] == pytest.approx(0.85)
    assert measured_gaps(runs)[row] == pytest.approx(0.086, abs=5e-4)
    told = gap(NAMED["chen-w4a16"], asked([86_304, 53_536], 2.3e6, 4))
    assert np.round(told, 3).tolist() == [0.080, 0.095]


def test_quests_coefficients_are_those_of_its_runs():
    """In sample, for every precision that the law has a share for: a wrong digit or N would show."""
    table = load_table("quest-runs")
    verdicts = judge([published(NAMED["quest"])], [table])
    assert {one.precision for one in verdicts} == {
        label for label in precisions(table.runs) if "FourEight" not in label
    }
    runs = sum(one.loss.runs for one in verdicts)
    assert sum(one.loss.mae * one.loss.runs for one in verdicts) / runs < 0.01  # 0.13 with the tables counted in N
    assert all(one.fitted_here and one.rank is None for one in verdicts)


def test_chens_errors_of_weights_and_activations_nearly_add():
    """The source: the error of W4A4 is .906 of the sum of those of W4A16 and W16A4, over its own range."""
    cells = [(N, D) for N in (74e6, 297e6, 973e6) for D in (10e9, 50e9, 200e9)]
    N, D = np.array(cells).T
    both = gap(NAMED["chen-w4a4"], asked(N, D, 4, 4, group=128.0))
    sums = gap(NAMED["chen-w4a16"], asked(N, D, 4, group=128.0)) + gap(NAMED["chen-w16a4"], asked(N, D, 16, 4, 128.0))
    assert np.mean(both / sums) == pytest.approx(0.906, abs=0.03)


# --- laws ---


def test_kumar_is_the_paper_s_formula():
    N, D = 1e8, 5e9
    share = (1 - math.exp(-4 / 2.6745)) * (1 - math.exp(-8 / 2.2102)) * (1 - math.exp(-16 / 0.9578))
    loss = 4.299e3 / (N * share) ** 0.4965 + 1.806e4 / D**0.4965 + 2.7648
    assert NAMED["kumar"].loss(asked(N, D, 4, 8)) == pytest.approx(loss, rel=1e-12)
    after = 0.0598 * D**0.5068 / N**0.3439 * math.exp(-3 / 0.5907)
    assert gap(NAMED["kumar"], asked(N, D, 3, ptq=True)) == pytest.approx(after, rel=1e-9)


@pytest.mark.parametrize("name", NAMED)
def test_a_law_says_what_it_describes_and_its_gap_is_positive_there(name):
    law = NAMED[name]
    runs = law.asked(4e8, 1e11, law.widths, 128.0)
    assert np.isfinite(law.loss(runs)).all()
    assert ("second-hand" in law.label) == law.second_hand == ("second-hand" in law.source) or name == "kumar"
    full = law.loss(runs.in_full_precision)
    assert np.isnan(full).all() if name == "spectra" else (law.loss(runs) > full).all()
    with pytest.raises(InputError, match="contains no QAT fraction"):
        load_law(name)


def test_laws_are_silent_about_what_they_do_not_describe():
    assert np.isnan(
        NAMED["chen-w4a16"].loss(asked(1e8, 1e10, [3, 4, 4, 4], [16, 8, 4, 16], [32, 32, 32, np.nan]))
    ).all()
    assert np.isnan(NAMED["quest"].loss(asked(1e8, 1e10, [5, 4, 8], [16, 8, 16]))).all()
    assert np.isnan(NAMED["spectra"].loss(asked(1e8, 1e10, [2, 16]))).all()
    assert np.isnan(NAMED["kumar"].loss(asked(1e8, 1e10, 4, 4, method="FP4"))).all()
    assert "N = 86.3K" in str(NAMED["chen-w4a16"].outside(asked(86_304, 1e11, 4)))
    assert NAMED["chen-w4a16"].outside(asked(1e8, 1e11, 4)) is None


@pytest.mark.parametrize("law", NAMED)
def test_a_plan_by_a_law_has_its_losses(law, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    words = f"bit-widths --params 396M --tokens 100B --law {law}" + " --group-size 64" * law.startswith("chen")
    found = json.loads(run(f"{words} --json", capsys))
    named = NAMED[law]
    rows = found["plan"]["rows"]
    assert [row["bits"] for row in rows] == list(named.widths)
    loss = [float(named.loss(named.asked(396e6, 1e11, [bits], 64.0))[0]) for bits in named.widths]
    assert [row["loss"] for row in rows] == pytest.approx(loss)
    assert found["overrides"] == []
    text = run(words, capsys)
    assert max(map(len, text.splitlines())) <= 80
    assert "no QAT fraction" in text
    assert ("second-hand" in text.splitlines()[0]) == named.second_hand


# --- tables ---


@pytest.mark.parametrize("name", [*table_names(), LADDER])
def test_a_table_has_the_schema_and_its_provenance(name):
    table = load_table(name)
    frame = table.runs.frame
    assert {"n_params", "n_non_embedding", "a_bits", "group", "effective_bits", "method"} <= set(frame.columns)
    assert table.about.title
    assert table.about.source
    assert ("second-hand" in table.label) == table.about.second_hand
    known = frame["n_non_embedding"].notna()
    assert (frame["n_non_embedding"] < frame["n_params"])[known].all()
    low = frame["bits"].where(frame["scheme"] != "fp", 16)
    assert (frame["effective_bits"] >= low)[known].all()


def test_the_table_of_quest_is_the_source_s():
    table = load_table("quest-runs")
    frame = table.runs.frame
    assert len(frame) == 104
    assert "Copyright (c) 2024 EPFL Machine Learning and Optimization Laboratory" in table.about.licence
    assert frame["loss"].iloc[0] == 3.718682765960694
    # Two tables of 50,304 rows beside what the source counts.
    assert (frame["n_params"] == frame["n_non_embedding"] + 2 * 50_304 * frame["hidden_size"]).all()
    matrices = frame["layers"] * (4 * frame["hidden_size"] ** 2 + 3 * frame["hidden_size"] * frame["intermediate_size"])
    assert (frame["n_non_embedding"] == matrices + (2 * frame["layers"] + 1) * frame["hidden_size"]).all()


def test_the_pilots_points_are_its_best_rates():
    runs = load_table("pilot-1to1000").runs
    frame = runs.frame.assign(f=runs.column("tokens_qat") / runs.tokens_total)
    own = frame[(frame["scheme"] == "sequential") & (frame["bits"] == 4) & frame["f"].between(0.09, 0.11)]
    assert own["loss"].tolist() == [3.941]
    assert runs.frame["n_params"].unique().tolist() == [86_304]


def test_bitcpm4_contradicts_the_closed_form():
    runs = load_table("bitcpm4").runs
    assert closed_form(5e6, 2e9, 1.58) == pytest.approx(0.413, abs=5e-4)
    assert runs.frame.sort_values("loss")["scheme"].iloc[0] == "scratch"


def test_a_gap_is_that_to_the_runs_own_seed():
    rows = [("fp", 16, 2e6, 0, 3.0, 0), ("fp", 16, 2e6, 0, 3.2, 1), ("fp", 16, 4e6, 0, 2.0, 0)]
    rows += [("sequential", 4, 1e6, 1e6, 3.3, 1), ("scratch", 4, 0, 2e6, 3.4, 0), ("scratch", 4, 0, 8e6, 3.4, 0)]
    frame = pd.DataFrame(rows, columns=["scheme", "bits", "tokens_fp", "tokens_qat", "loss", "seed"])
    gaps = measured_gaps(RunTable.from_frame(frame.assign(n_params=1e5)))
    assert gaps == pytest.approx([np.nan, np.nan, np.nan, 0.1, 0.4, np.nan], nan_ok=True)


def test_what_is_no_table_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"neither a table of this package \(bitcpm4"):
        load_table("nothing")
    frame = load_table("quest-runs").runs.frame[
        ["n_params", "bits", "tokens_fp", "tokens_qat", "loss", "scheme", "settings"]
    ]
    frame.head(3).to_csv(tmp_path / "runs.csv", index=False)
    plain = load_table(str(tmp_path / "runs.csv")).runs.frame
    assert plain["effective_bits"].isna().all()
    assert (plain["a_bits"] == 16).all()


def test_a_curve_that_bends_down_has_its_minimum_at_the_lower_end():
    """Short phases at a rate of their own can beat longer ones: such a curve was read as lowest at its higher end."""
    for losses, lowest in (((3.745, 3.768, 3.795, 3.780), 0.05), ((3.780, 3.795, 3.768, 3.745), 0.65)):
        rows = [(1e6 * (1 - f), 1e6 * f, loss) for f, loss in zip((0.05, 0.15, 0.35, 0.65), losses, strict=True)]
        frame = pd.DataFrame(rows, columns=["tokens_fp", "tokens_qat", "loss"])
        (curve,) = measured_curves(RunTable.from_frame(frame.assign(n_params=86_304, bits=4, scheme="sequential")))
        assert (curve.optimum, curve.inside) == (lowest, False)


# --- verdicts ---


def test_the_law_of_the_runs_is_right_and_first():
    law = NAMED["chen-w4a16"]
    table = scratch_table(lambda frame: NAMED["kumar"].loss(Asked.from_frame(frame)), widths=(4,))
    verdicts = {one.law: one for one in judge([CHEN, published(NAMED["kumar"])], [table]) if one.precision == "W4"}
    assert verdicts["kumar"].loss.mae == pytest.approx(0, abs=1e-12)
    assert verdicts["kumar"].rank == 1
    assert verdicts[law.name].rank == 2
    # By the formulas, without the code that judges.
    runs = Asked.from_frame(table.runs.frame[table.runs.frame["bits"] == 4])
    off = gap(law, runs) - gap(NAMED["kumar"], runs)
    found = verdicts[law.name].gap
    assert (found.bias, found.mae) == pytest.approx((off.mean(), np.abs(off).mean()))
    assert found.relative == pytest.approx(np.abs(off).mean() / gap(NAMED["kumar"], runs).mean())


def test_an_interval_covers_the_mean_of_trunks():
    """Runs of a trunk share an error; 95 % nominal, at least 90 % of 2,000 draws, with 3 and with 8 trunks."""
    rng = np.random.default_rng(0)
    for trunks in (3, 8):
        labels = np.repeat(np.arange(trunks), 4)
        held = 0
        for _ in range(2000):
            off = 0.3 + rng.standard_normal(trunks)[labels] + 0.5 * rng.standard_normal(4 * trunks)
            one = errors(off, np.zeros_like(off), labels)
            held += abs(one.bias - 0.3) <= one.margin
        assert 0.90 <= held / 2000 <= 0.98
    assert errors(np.ones(8), np.zeros(8), np.repeat([0, 1], 4)).margin is None


def test_laws_of_qat_from_scratch_do_not_speak_of_mixed_runs():
    table = load_table("pilot-1to1000")
    mixed = [one for one in judge([published(law) for law in NAMED.values()], [table]) if "sequential" in one.precision]
    assert mixed == []


def test_a_refit_predicts_another_table():
    truth = KUMAR_2024.bind(
        {"alpha": 1.8, "beta": 600.0, "gamma": 0.35, "zeta": 400.0, "eta": 0.34, "gamma_w": 2.5}
    )  # fmt: skip

    def loss(frame):
        return truth.loss(frame["n_params"], frame["tokens_fp"], frame["tokens_qat"], frame["bits"])

    here, there = scratch_table(loss, "here"), scratch_table(loss, "there", sizes=(8e8, 2e9), tokens=(6e10, 2e11))
    laws, notes = refitted(here)
    assert {"chen_2025", "kumar_2024"} == {law.name for law in laws}
    assert any(note.startswith("qat_unified cannot be fitted on here") for note in notes)
    verdicts = judge(laws, [here, there])
    first = next(one for one in verdicts if (one.table, one.precision, one.rank) == ("there", "W2", 1))
    assert first.law == "kumar_2024"
    assert first.gap.mae < 1e-4
    assert all(one.fitted_here == (one.table == "here") for one in verdicts)


def test_where_nobodys_law_holds_is_named():
    far = scratch_table(
        lambda frame: NAMED["kumar"].loss(Asked.from_frame(frame)) + 0.5 * (frame["bits"] == 2), widths=(2,)
    )
    near = scratch_table(lambda frame: NAMED["kumar"].loss(Asked.from_frame(frame)), "near", widths=(2,))
    (place,) = unheld(judge([published(NAMED["kumar"])], [far, near]))
    assert place.startswith("made W2 (")


def test_laws_of_one_scheme_speak_of_that_alone():
    table = load_table("pilot-1to1000")
    laws, _ = refitted(load_table(LADDER))
    law = next(one for one in laws if one.name == "qat_unified")
    told = {one.precision for one in judge([law], [table])}
    assert "W2 sequential" in told
    assert "W2 fused" not in told


# --- the command ---


def test_the_command_fits_80_columns_and_writes_what_it_prints(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = run(f"judge --out {tmp_path}", capsys)
    assert max(len(line) for line in text.splitlines() if str(tmp_path) not in line) <= 80
    assert "bitcpm4 (second-hand)" in text
    assert "spectra (second-hand)" in text
    found = json.loads((tmp_path / "judge.json").read_text(), parse_constant=pytest.fail)
    assert found == json.loads(run("judge --json", capsys))
    page = (tmp_path / "judge.html").read_text()
    assert "EPFL Machine Learning and Optimization Laboratory" in page
    assert (tmp_path / "judged.png").read_bytes()[:4] == b"\x89PNG"
    by_place = {(one["table"], one["precision"], one["law"]): one for one in found["verdicts"]}
    assert by_place["quest-runs", "W4", "chen-w4a16"]["rank"] == 1
    assert by_place["quest-runs", FULL, "quest"]["gap"] is None


def test_one_s_own_law_and_table_are_judged(tmp_path, capsys):
    from qatlaw.fit_file import fit_file, write_fit
    from qatlaw.fitting import fit
    from qatlaw.laws import QAT_UNIFIED

    runs = load_table(LADDER).runs.of_scheme("sequential")
    write_fit(tmp_path / "own.json", fit_file(fit(QAT_UNIFIED, runs, starts=4), scheme="sequential"))
    found = json.loads(run(f"judge {LADDER} pilot-1to1000 --law {tmp_path / 'own.json'} --law quest --json", capsys))
    ranks = {(one["table"], one["precision"], one["law"]): one["rank"] for one in found["verdicts"]}
    assert ranks["pilot-1to1000", "W2 sequential", "own"] == 1
    assert ranks["ladder-1to1000/rates", "W2 sequential", "own"] is None  # the runs that it was fitted on


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("nothing", "TABLE = 'nothing'"),
        ("--law nothing", "--law = 'nothing'"),
        ("--refit nothing", "TABLE = 'nothing'"),
    ],
)
def test_wrong_words_are_refused(words, named, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["judge", *words.split()])
    assert ended.value.code == 2
    assert named in capsys.readouterr().err


def test_rows_hold_every_verdict():
    verdicts = judge([CHEN, published(NAMED["kumar"])], [load_table("quest-runs")])
    short, full = verdict_rows(verdicts), verdict_rows(verdicts, full=True)
    assert len(short) == len(full) == len(verdicts) + 1
    assert {len(row) for row in full} == {len(short[0]) + 4}
