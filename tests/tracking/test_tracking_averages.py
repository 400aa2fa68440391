"""Points of curves against the losses of every step: each is their mean over the steps it stands for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mlflow.tracking import MlflowClient

from qatscale.tracking.averages import Averages
from qatscale.tracking.curves import curves
from qatscale.tracking.mlflow_sync import Uploader
from qatscale.tracking.run_folder import RunFolder
from tests.tracking.synthetic_runs import MakeRun

SWITCH, STEPS = 113, 200
ENDS = (20, 40, 41, 45, 60, 80, 100, 112, 113, 115, 120, 137, 140, 160, 161, 180, 198, 200)
"""Records every 20 steps, and at phase ends, checkpoints and the switch."""
LOSSES = 3 + np.random.default_rng(0).standard_normal(STEPS) + np.where(np.arange(STEPS) < SWITCH, 0.0, 8.0)
"""Of each step. The switch raises them by 8; everything else is noise, which a mean over n steps divides by √n."""
SECONDS = np.random.default_rng(1).uniform(0.5, 2, STEPS)


def records_of(ends: tuple[int, ...] = ENDS, first: int = 0, **fields: Any) -> list[dict[str, Any]]:
    """As the meter writes them: means of what the steps since the last record did."""
    found = []
    for start, end in zip((first, *ends[:-1]), ends, strict=True):
        found.append(
            {
                "event": "metrics", "step": end, "tokens": 512 * end, "steps": end - start,
                "phase": "stable" if end <= SWITCH else "qat_stable", "loss": LOSSES[start:end].mean(),
                "learning_rate": 1e-3 * end, "tokens_per_second": 512 * (end - start) / SECONDS[start:end].sum(),
                "mfu": None, "data_seconds": 0.1 * SECONDS[start:end].sum(), **fields,
            }
        )  # fmt: skip
    return found


EXPECTED = {
    # the last step of a point: (the first of its steps, steps that no earlier point holds)
    20: (0, 20), 40: (20, 20), 41: (20, 1), 45: (20, 4), 60: (45, 15), 80: (60, 20), 100: (80, 20), 112: (100, 12),
    113: (100, 1), 137: (113, 24), 140: (120, 3), 160: (140, 20), 161: (140, 1), 180: (161, 19), 198: (180, 18),
    200: (180, 2),
}  # fmt: skip
"""115 and 120 lie less than 10 steps after the switch: 137 holds their steps too."""


@pytest.mark.parametrize("old", [False, True])
def test_a_point_is_the_mean_over_its_steps(old: bool) -> None:
    averages, found = Averages(20), {}
    for record in records_of():
        if old:
            del record["steps"]
        if point := averages.add(record):
            found[record["step"]] = point
    assert {step: fresh for step, (fresh, _) in found.items()} == {end: fresh for end, (_, fresh) in EXPECTED.items()}
    for end, (start, _) in EXPECTED.items():
        record = found[end][1]
        assert record["loss"] == pytest.approx(LOSSES[start:end].mean(), rel=1e-12)
        assert record["tokens_per_second"] == pytest.approx(512 * (end - start) / SECONDS[start:end].sum(), rel=1e-12)
        assert record["data_seconds"] == pytest.approx(0.1 * SECONDS[start:end].sum(), rel=1e-12)
        assert (record["step"], record["learning_rate"], record["mfu"]) == (end, 1e-3 * end, None)
    assert sum(fresh for fresh, _ in found.values()) == STEPS


def test_a_resume_takes_back_what_lies_behind_it() -> None:
    averages = Averages(20)
    for record in records_of((20, 40, 47)):
        averages.add(record)
    (again,) = records_of((42,), first=40)
    point = averages.add(again)
    assert point is not None
    assert point[1]["loss"] == pytest.approx(LOSSES[20:42].mean(), rel=1e-12), "without steps 42 to 47"


def test_a_branch_far_from_what_is_known_begins_alone() -> None:
    averages = Averages(20, first_step=100)
    assert averages.add(records_of((105,), first=100)[0]) is None
    point = averages.add(records_of((112,), first=105)[0])
    assert point is not None
    assert point[1]["loss"] == pytest.approx(LOSSES[100:112].mean(), rel=1e-12)


@pytest.fixture
def run(make_run: MakeRun) -> RunFolder:
    folder = make_run(scheme="fused", steps=STEPS, switch=SWITCH, overrides=("log_interval=20",))
    folder.append("start", step=0)
    for record in records_of():
        folder.append(record.pop("event"), **record)
    return folder


def test_a_figure_shows_no_jump_but_the_switch(run: RunFolder) -> None:
    """No point averages over fewer than 10 steps, so none lies further off than noise / √10 explains (3 sigma)."""
    (curve,) = curves([run])
    assert list(curve.tokens / 512) == list(EXPECTED)
    for values in (curve.loss, curve.y):
        level = np.where(curve.tokens / 512 <= SWITCH, 3.0, 11.0)
        assert np.abs(values - level).max() < 3 / np.sqrt(10)
    raw = np.array([record["loss"] for record in run.records("metrics")])
    assert np.abs(raw[np.array(ENDS) <= SWITCH] - 3).max() > 3 / np.sqrt(10), "as logged, one batch is a jump"


@pytest.mark.parametrize("pieces", [1, 5, len(ENDS)])
def test_mlflow_shows_the_same_points(make_run: MakeRun, run: RunFolder, sqlite: str, pieces: int) -> None:
    """However the run grows while it is followed, and by however many processes."""
    records = run.records("metrics")
    folder = make_run("followed", scheme="fused", steps=STEPS, switch=SWITCH, overrides=("log_interval=20",))
    folder.append("start", step=0)
    for part in np.array_split(np.arange(len(records)), pieces):
        for index in part:
            fields = {key: value for key, value in records[index].items() if key not in ("event", "time")}
            folder.append("metrics", **fields)
        uploader = Uploader(folder, sqlite)
        uploader.sync()
    assert uploader.cursor.run_id is not None
    points = {m.step: m.value for m in MlflowClient(sqlite).get_metric_history(uploader.cursor.run_id, "train/loss")}
    assert points == pytest.approx({end: LOSSES[start:end].mean() for end, (start, _) in EXPECTED.items()}, rel=1e-12)
    assert folder.records("metrics")[2]["loss"] == LOSSES[40], "the file keeps every record as it was"
