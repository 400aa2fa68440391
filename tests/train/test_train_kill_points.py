"""A few of the random kill points of analysis/benchmarks/kill_points.py, by the same script, and that it would tell."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "analysis" / "benchmarks"
COUNT = 4


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the script writes. Draws of seed 0: two file operations of saves, a time in a save, a time in a step."""
    folder = tmp_path_factory.mktemp("kills")
    command = [SCRIPTS / "kill_points.py", "--count", COUNT, "--seed", 0, "--layouts", "ZeRO-3", "--out", folder]
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in launcher}
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.dist
def test_no_kill_costs_more_than_an_interval_and_a_write_and_every_run_ends_as_if_it_had_not_been_killed(
    out: Path,
) -> None:
    found = json.loads((out / "kill_points.json").read_text())
    assert found["wrong"] == []
    assert len(found["kills"]) == COUNT
    assert sum(run["kills"] for run in found["runs"]) == COUNT
    assert sum(kill["inside"] for kill in found["kills"]) >= 2
    assert all(0 <= kill["steps"] - kill["newest"] <= 8 for kill in found["kills"])
    text = (out / "kill_points.md").read_text()
    assert f"# {COUNT} random kills" in text
    assert "Wrong: nothing." in text


@pytest.mark.dist
def test_the_script_tells_unreadable_checkpoints_lost_steps_and_other_ends(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    import kill_points
    from killing import Ended, Measures

    whole = out / "runs" / "whole-ZeRO-3"
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    assert kill_points.differences(copy, whole) == []
    newest = sorted((copy / "checkpoints").iterdir())[-1]
    shard = sorted(newest.glob("shard-*"))[0]
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    assert any("differs" in what for what in kill_points.differences(copy, whole))

    ended = Ended(True, False, kill_points.STEPS, (-9, -9), False, "", Measures(0, 0, (0, 0)))
    kill = kill_points._look(copy, 1, "ZeRO-3", "a point", ended)
    assert ["was altered" in what for what in kill.wrong] == [True]
    oldest, *others = sorted((copy / "checkpoints").iterdir())
    for other in others:
        shutil.rmtree(other)
    kill = kill_points._look(copy, 1, "ZeRO-3", "a point", ended)
    assert kill.wrong == [f"lost {kill_points.STEPS - int(oldest.name[-8:])} steps, with an interval of 4"]
    (copy / "done.json").unlink()
    assert kill_points.differences(copy, whole) == ["it did not come to its end"]
