"""How people name a checkpoint: its folder, a run's, RUN@STEP; and what they are told where none is."""

from __future__ import annotations

from pathlib import Path

import pytest

from qatscale.engine.checkpoints.files import step_folder
from qatscale.engine.checkpoints.folders import MANIFEST
from qatscale.engine.checkpoints.reader import find_checkpoint
from qatscale.errors import UserError


@pytest.fixture(params=["trunk", "a@b", "step-00000007"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A run with checkpoints of steps 7 and 40; its path may hold what else has a meaning."""
    run = tmp_path / "me@home" / request.param
    for step in (7, 40):
        folder = step_folder(run / "checkpoints", step)
        folder.mkdir(parents=True)
        (folder / MANIFEST).touch()
    (run / "run.json").touch()
    return run


def test_every_way_to_name_one(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seven, forty = (step_folder(run / "checkpoints", step) for step in (7, 40))
    assert find_checkpoint(f"{run}@7") == seven
    assert find_checkpoint(seven) == seven
    assert find_checkpoint(f"{seven}/") == seven
    if run.name != seven.name:  # a run that calls itself so is taken for a checkpoint
        assert find_checkpoint(run) == forty
    monkeypatch.chdir(seven)
    assert find_checkpoint(".").samefile(seven)
    monkeypatch.chdir(run)
    assert find_checkpoint(".@7").samefile(seven)


def test_what_is_told_where_none_is(run: Path) -> None:
    empty = run.parent / "empty"
    (empty / "new").mkdir(parents=True)
    (empty / "new" / "run.json").touch()
    (empty / "export").mkdir()
    for name in ("config.json", "export.json"):
        (empty / "export" / name).touch()
    for what, said in [
        (run / "nothing", "does not exist"),
        (empty / "new" / "run.json", "is a file; give the folder of a run"),
        ("org/model", "hf download org/model --local-dir model"),
        (f"{run}@8", "no checkpoint at step 8; there are: 7, 40"),
        (f"{run}@last", "no checkpoint at step last"),
        (run / "checkpoints", "holds no run.json"),
        (run.parent, f"holds runs; give one: {run}"),
        (empty / "new", "has none yet"),
        (empty / "export", "is an export"),
    ]:
        with pytest.raises(UserError, match=said) as caught:
            find_checkpoint(what)
        assert caught.value.value == str(what)
