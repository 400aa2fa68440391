"""k steps + SIGKILL + resume = the uninterrupted run, bit for bit: before, at, after the switch, and inside a save."""

from __future__ import annotations

from pathlib import Path

import pytest

from qatscale.engine.checkpoints.files import list_checkpoints, read_manifest
from qatscale.engine.checkpoints.reader import CheckpointReader, find_checkpoint
from qatscale.tracking.run_folder import RunFolder
from tests.train.driving import STEPS, SWITCH, assert_same_state, drive, losses, spec

KILLS = [
    {"step": 4, "where": "batch"},  # before the switch
    {"step": SWITCH, "where": "batch"},  # switched in memory; the checkpoint of step 7 is from before it
    {"step": 9, "where": "commit"},  # inside a save: the checkpoint of step 9 never came to be
    {"step": 11, "where": "batch"},  # after the switch, in the cooldown
]


@pytest.mark.dist
@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_killed_and_resumed_equals_uninterrupted(stage: int, tmp_path: Path, prepared: Path) -> None:
    own = [f"engine.ds_config=zero{stage}_fp32", "checkpoint.interval=1536"]  # every 3 steps
    if stage == 3:  # also through the change of a mixture, which comes with the switch
        for name in ("web", "code"):
            (tmp_path / "corpora").mkdir(exist_ok=True)
            (tmp_path / "corpora" / name).symlink_to(prepared)
        own += ["data.mix={web: 0.7, code: 0.3}", "data.cooldown_mix={code: 1}"]
        prepared = tmp_path / "corpora"
    whole = [spec("whole", tmp_path, prepared, *own)]
    for kill in KILLS:
        killed = drive([*whole, spec("killed", tmp_path, prepared, *own, kill_at=kill)], tmp_path, ranks=2)
        whole = []  # in the first launch alone
        assert -9 in killed.codes, killed.output
        assert not RunFolder(tmp_path / "killed").is_done
        assert all(CheckpointReader(c) for c in list_checkpoints(tmp_path / "killed" / "checkpoints"))
    resumed = drive([spec("killed", tmp_path, prepared, *own)], tmp_path, ranks=2)
    assert resumed.codes == [0, 0], resumed.output

    assert sorted(losses(tmp_path / "whole")) == list(range(1, STEPS + 1))
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    ends = [find_checkpoint(tmp_path / name) for name in ("killed", "whole")]
    assert read_manifest(ends[1]).step == STEPS
    assert_same_state(*ends)
    finals = [RunFolder(tmp_path / name).final for name in ("killed", "whole")]
    results = [{name: value for name, value in (final or {}).items() if "second" not in name} for final in finals]
    assert results[0] == results[1]
