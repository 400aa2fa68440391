"""A spike of the gradient: its update is withheld, counted, and passed over as `optimizer.on_spike` says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qatscale.engine.checkpoints.files import step_folder
from qatscale.engine.checkpoints.reader import CheckpointReader
from qatscale.engine.spikes import SpikeState
from qatscale.tracking.run_folder import RunFolder
from tests.processes import Finished, run
from tests.train.driving import STEPS, assert_same_state, losses, spec
from tests.train.fixed_tokens import write_fixed_tokens

DRIVER = Path(__file__).with_name("spikes_driver.py")
AT = 8
"""The batch whose gradient is spoiled, in full precision."""
MORE = ["checkpoint.interval=512", "checkpoint.keep=12"]


def test_batches_that_are_left_out_are_passed_over() -> None:
    assert [SpikeState().batch_of(step) for step in range(3)] == [0, 1, 2]
    assert [SpikeState(left_out=(0, 3, 4)).batch_of(step) for step in range(5)] == [1, 2, 5, 6, 7]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fixed_tokens(tmp_path_factory.mktemp("tokens") / "data")


def drive(
    folder: Path, data: Path, *overrides: str, spoil: dict[int, str], ranks: int = 1, passes_over: Sequence[int] = ()
) -> Finished:
    own = spec(folder.name, folder.parent, data, *MORE, "qat.fraction=0.25", *overrides)
    content: dict[str, Any] = {"overrides": own["overrides"], "spoil": spoil, "passes_over": passes_over}
    file = folder.with_suffix(".json")
    file.write_text(json.dumps(content))
    return run([DRIVER, file], ranks, cwd=folder.parent)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("ranks", "ds_config", "spoiled"),
    [(1, "zero1_fp32", "nan"), (2, "zero3_fp32", "nan"), (2, "zero2_fp32", "1000"), (1, "zero1_bf16", "1000")],
)
def test_a_skipped_update_changes_nothing(ranks: int, ds_config: str, spoiled: str, data: Path, tmp_path: Path) -> None:
    more = [f"engine.ds_config={ds_config}", "optimizer.on_spike=skip", "optimizer.spike_factor=5"]
    ended = drive(tmp_path / "run", data, *more, spoil={AT: spoiled}, ranks=ranks)
    assert ended.codes == [0] * ranks, ended.output
    folder = RunFolder(tmp_path / "run")
    (spike,) = folder.records("spike")
    assert (spike["step"], spike["action"]) == (AT + 1, "skip")
    assert "its update was not applied" in ended.output
    before, after = (CheckpointReader(step_folder(folder.checkpoints, step)) for step in (AT, AT + 1))
    for name in before.manifest.parameters:
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            assert before.parameter(name, kind).equal(after.parameter(name, kind))
    assert max(record.adam_steps for record in after.manifest.parameters.values()) == AT
    assert after.manifest.spikes.count == 1
    assert list(losses(folder.path)) == list(range(1, STEPS + 1))


@pytest.mark.dist
def test_a_rollback_continues_as_a_run_that_never_read_the_batch(data: Path, tmp_path: Path) -> None:
    more = ["optimizer.on_spike=rollback", "optimizer.spike_factor=5", f"checkpoint.interval={3 * 512}"]
    ended = drive(tmp_path / "run", data, *more, spoil={AT: "nan"})
    assert ended.codes == [0], ended.output
    assert "rolled back to the checkpoint of step 6" in ended.output
    without = drive(tmp_path / "without", data, *more, spoil={}, passes_over=[AT])
    assert without.codes == [0], without.output
    assert losses(tmp_path / "run") == losses(tmp_path / "without")
    one, other = (step_folder(tmp_path / name / "checkpoints", STEPS) for name in ("run", "without"))
    assert_same_state(one, other)
    assert CheckpointReader(one).manifest.spikes.left_out == (AT,)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("action", "limit", "spoiled", "said"),
    [
        ("stop", 1, [AT], "times its running mean at step 9"),
        ("skip", 1, [AT - 1, AT], "times its running mean at step 9, one more than optimizer.spike_limit = 1"),
        ("rollback", 1, [AT], "step 9 is a spike before the first checkpoint"),
    ],
)
def test_a_run_ends_at_a_spike_or_at_one_too_many(
    action: str, limit: int, spoiled: list[int], said: str, data: Path, tmp_path: Path
) -> None:
    more = [f"optimizer.on_spike={action}", f"optimizer.spike_limit={limit}", "optimizer.spike_factor=5"]
    more += ["checkpoint.interval=100K"] if action == "rollback" else []
    ended = drive(tmp_path / "run", data, *more, spoil=dict.fromkeys(spoiled, "1000"))
    assert ended.codes == [1]
    assert said in RunFolder(tmp_path / "run").records("failed")[-1]["error"]
