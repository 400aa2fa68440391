"""Tables of runs: what is read, what is refused and what the refusal tells."""

import numpy as np
import pandas as pd
import pytest

import qatlaw
from qatlaw import synthetic
from qatlaw.errors import InputError
from qatlaw.table import RunTable

ROW = {
    "n_params": 86e6, "bits": 4.0, "tokens_fp": 2e9, "tokens_qat": 3e8, "loss": 3.4, "scheme": "sequential"
}  # fmt: skip


def rows(*changes):
    """One run per change of ROW, each with a token count of its own."""
    return pd.DataFrame([{**ROW, "tokens_fp": ROW["tokens_fp"] + i, **change} for i, change in enumerate(changes)])


def refusal(*changes, drop=()):
    with pytest.raises(InputError) as raised:
        RunTable.from_frame(rows(*changes).drop(columns=list(drop)), "runs.csv")
    return str(raised.value)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_table_survives_its_file(tmp_path, suffix):
    table = synthetic.table(0)
    path = tmp_path / f"runs{suffix}"
    (table.frame.to_csv(path, index=False) if suffix == ".csv" else table.frame.to_parquet(path))
    again = RunTable.read(path)
    pd.testing.assert_frame_equal(again.frame, table.frame)
    assert again.hash == table.hash
    assert again.synthetic


def test_names_as_tracking_writes_them():
    frame = rows({}, {}).rename(columns={"loss": "metrics.final/val_loss", "scheme": "params.scheme"})
    assert RunTable.from_frame(frame).loss.tolist() == [3.4, 3.4]
    assert RunTable.from_frame(frame.rename(columns={"tokens_fp": "Tokens_FP", "bits": "Bits"})).widths == [4]
    both = frame.assign(loss=1.0)
    with pytest.raises(InputError, match="all of them mean loss"):
        RunTable.from_frame(both)


def test_numbers_written_as_text_are_numbers():
    frame = rows({}, {}).assign(bits=["4", "4"])
    assert RunTable.from_frame(frame).column("bits").tolist() == [4.0, 4.0]


def test_missing_columns_are_named():
    told = refusal({}, drop=["tokens_qat", "scheme"])
    assert "tokens_qat, scheme missing" in told
    assert "tokens_qat (0 for full-precision runs)" in told


@pytest.mark.parametrize("wrong", [np.nan, np.inf, "diverged"])
def test_a_loss_that_is_no_number_is_placed(wrong):
    frame = rows({}, {}, {}).astype({"loss": object})
    frame.loc[1, "loss"] = wrong
    with pytest.raises(InputError, match=r"runs\.csv: loss of row 2 = .*finite number"):
        RunTable.from_frame(frame, "runs.csv")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"n_params": 86.0}, "n_params of row 2 = 86.0: parameters"),
        ({"tokens_fp": 2.0, "tokens_qat": 0.3}, "tokens_total of row 2 = 2.3: tokens"),
        ({"n_params": 86_000.0, "tokens_fp": 1e12}, "tokens_per_parameter of row 2"),
        ({"tokens_fp": 2e5, "tokens_qat": 3e4}, "tokens_per_parameter of row 2"),
        ({"bits": 0.5}, "bits of row 2"),
        ({"loss": 29.9}, "A perplexity is exp(loss)"),
    ],
)
def test_a_unit_mixed_up_in_one_row_is_found(change, told):
    assert told in refusal({}, change)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"scheme": "qat"}, "one of fp, sequential, fused, scratch, ptq"),
        ({"scheme": "fp"}, "full precision to the end: its runs have tokens_fp above 0 and tokens_qat = 0"),
        ({"scheme": "scratch"}, "tokens_fp = 0 and tokens_qat above 0"),
        ({"tokens_qat": 0.0}, "tokens_fp above 0 and tokens_qat above 0"),
        ({"tokens_qat": -1e6}, "0 tokens or more"),
    ],
)
def test_a_scheme_that_its_tokens_contradict_is_refused(change, told):
    assert told in refusal({}, change)


def test_the_same_run_twice_is_refused_and_a_second_seed_is_not():
    twice = pd.DataFrame([ROW, {**ROW, "loss": 3.41}])
    with pytest.raises(InputError, match="Add a seed column"):
        RunTable.from_frame(twice)
    assert len(RunTable.from_frame(twice.assign(seed=[0, 1]))) == 2
    with pytest.raises(InputError, match="a run is counted once"):
        RunTable.from_frame(rows({}, {}).assign(run_id="a"))


def test_what_is_no_table_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"a \.csv or \.parquet file"):
        RunTable.read("runs.xlsx")
    with pytest.raises(InputError, match="no such file"):
        RunTable.read(tmp_path / "runs.csv")
    (tmp_path / "runs.parquet").write_text("not one")
    with pytest.raises(InputError, match="cannot be read"):
        RunTable.read(tmp_path / "runs.parquet")
    (tmp_path / "runs.csv").write_text("n_params;bits;loss\n1e6;4;3,1\n")
    with pytest.raises(InputError, match="Write commas"):
        RunTable.read(tmp_path / "runs.csv")
    with pytest.raises(InputError, match="at least one"):
        RunTable.from_frame(rows({}).head(0))


def test_rows_on_different_text_are_named_by_their_numbers():
    """A table without names: rows count from 1, as in all that is said of a table."""
    text = {"validation_fingerprint": ["a", "a", "b"], "validation_tokens": [1e6, 1e6, 1e6]}
    with pytest.raises(InputError, match=r"2 on 1,000,000 tokens of split a \(row 1, row 2\); 1 on .* \(row 3\)"):
        RunTable.from_frame(rows({}, {}, {}).assign(**text), "runs.csv").check_text()
    unknown = {"validation_fingerprint": ["a", None, ""], "validation_tokens": [1e6, None, "many"]}
    RunTable.from_frame(rows({}, {}, {}).assign(**unknown)).check_text()


def test_the_hash_is_of_the_runs_and_not_of_their_order():
    table = synthetic.table(0)
    shuffled = RunTable.from_frame(table.frame.sample(frac=1, random_state=1), "elsewhere")
    assert shuffled.hash == table.hash
    changed = table.frame.copy()
    changed.loc[5, "loss"] *= 1 + 1e-12
    assert RunTable.from_frame(changed).hash != table.hash


def test_selections_keep_full_precision_runs():
    table = synthetic.table(0)
    four = table.of_width(4)
    assert len(four) == 180 + 37
    assert four.widths == [4.0]
    fused = RunTable.from_frame(table.frame.assign(scheme=table.frame["scheme"].replace("sequential", "fused")))
    assert len(fused.of_scheme("sequential")) == 37
    with pytest.raises(InputError, match=r"^scheme = 'fp'"):
        table.of_scheme("fp")


def test_the_synthetic_grid_is_as_described():
    frame = synthetic.settings()
    assert len(frame) == 757
    assert (frame["scheme"] == "fp").sum() == 37
    assert frame["n_params"].min() == 86e6
    assert frame["n_params"].max() == 2.2e9
    total = frame["tokens_fp"] + frame["tokens_qat"]
    assert total.min() == 2.3e9
    assert total.max() == 1.4e12
    assert sorted(frame.loc[frame["scheme"] != "fp", "bits"].unique()) == [1, 2, 4, 6]
    table = synthetic.table(7)
    exact = synthetic.law().form.loss_at(synthetic.law().theta, table.points)
    noise = np.log(table.loss / exact)
    # 757 normal draws: mean and standard deviation within four of their standard errors.
    assert abs(noise.mean()) < 4 * 0.002 / 757**0.5
    assert abs(noise.std() - 0.002) < 4 * 0.002 / (2 * 757) ** 0.5


def test_ranges_are_of_the_runs():
    ranges = synthetic.table(0).ranges
    assert ranges["n_params"] == (86e6, 2.2e9)
    assert ranges["bits"] == (1.0, 6.0)  # of quantized runs: full precision is no width
    assert ranges["s_total"][0] == pytest.approx(2.3e9 / (86e6 * 6 / 8))


OWN = {
    "params": [86e6, 86e6, 86e6, 194e6], "bits": [4, 4, np.nan, 4], "tokens": 2e9, "qat_fraction": [0.1, 0.3, 0, 1],
    "val_loss": 3.4,
}  # fmt: skip


def test_a_table_with_names_of_its_own(tmp_path):
    pd.DataFrame(OWN).to_csv(tmp_path / "own.csv", index=False)
    columns = {"n_params": "params", "loss": "val_loss"}
    runs = qatlaw.read_table(tmp_path / "own.csv", columns, scheme="fused")
    assert runs["tokens_qat"].tolist() == pytest.approx([2e8, 6e8, 0, 2e9])
    assert (runs["tokens_fp"] + runs["tokens_qat"]).tolist() == pytest.approx([2e9] * 4)
    assert runs["scheme"].tolist() == ["fused", "fused", "fp", "scratch"]
    assert runs["bits"].tolist() == [4, 4, 16, 4]
    assert runs.attrs["source"] == "own.csv"
    # A column of our name that means something else gives way.
    both = pd.DataFrame(OWN).assign(loss=9.0)
    assert RunTable.from_frame(both, "", columns, "fused").loss.tolist() == [3.4] * 4


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({}, "n_params, loss, scheme missing. Try --column n_params=params --column loss=val_loss "),
        ({"los": "val_loss"}, "--column = 'los': .* Did you mean 'loss'"),
        ({"loss": "val_los"}, "--column loss = 'val_los': .* Did you mean 'val_loss'"),
        ({"n_params": "params", "loss": "val_loss"}, "scheme missing. .*--scheme fused"),
    ],
)
def test_the_nearest_name_is_offered(columns, told):
    with pytest.raises(InputError, match=told):
        RunTable.from_frame(pd.DataFrame(OWN), "own.csv", columns)


def test_one_column_is_not_offered_for_the_tokens_of_both_phases():
    frame = pd.DataFrame(OWN).rename(columns={"tokens": "total_tokens", "qat_fraction": "qat_frac"})
    with pytest.raises(InputError, match="--column tokens=total_tokens --column qat_fraction=qat_frac "):
        RunTable.from_frame(frame, "own.csv")


def test_a_fraction_in_per_cent_is_refused():
    columns = {"n_params": "params", "loss": "val_loss"}
    with pytest.raises(InputError, match=r"qat_fraction of row 1 \(4 such rows\) = 15\.0.*Write 15 % as 0.15"):
        RunTable.from_frame(pd.DataFrame(OWN | {"qat_fraction": 15.0}), "own.csv", columns, "fused")
