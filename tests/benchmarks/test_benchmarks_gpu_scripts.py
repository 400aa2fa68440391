"""The scripts that wait for a GPU: they can be read, and their record is whole whatever a check does."""

from __future__ import annotations

import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

GPU = Path(__file__).parents[2] / "analysis" / "benchmarks" / "gpu"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, GPU / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    """record.py and main_job.py."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    return load("record"), load("main_job")


def test_arguments(scripts: tuple[ModuleType, ModuleType], capsys: pytest.CaptureFixture[str]) -> None:
    _, main_job = scripts
    options = main_job.arguments(["--device", "cuda", "--out", "records"])
    assert (options.device, options.out, options.seconds) == ("cuda", Path("records"), 450)
    assert options.parts == ("compare", "stop", "speed")
    with pytest.raises(SystemExit):
        main_job.arguments(["--out", "records"])
    assert "--device" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("kind", ["ordinary", "deterministic", "measured"])
def test_every_run_has_a_recipe_that_switches_half_way(
    device: str, kind: str, scripts: tuple[ModuleType, ModuleType], tmp_path: Path
) -> None:
    """What would otherwise show only on the machine: a recipe that is refused."""
    from qatscale.config.ds_config import load_ds_config, merge_ds_config
    from qatscale.config.recipe import load_run_config
    from qatscale.schedule.build import build_timeline

    record, main_job = scripts
    job = main_job.Job(device, record.Record(tmp_path, "r", "R", {}, 10), tmp_path)
    for stage in main_job.STAGES:
        recipe, *overrides = job.run("run", f"zero{stage}_bf16", 2, kind).arguments
        config = load_run_config(recipe, overrides)
        timeline = build_timeline(config)
        assert timeline.steps == job.run("run", "zero1_fp32", 2, kind).steps
        assert timeline.switch_step == timeline.steps // 2
        merge_ds_config(config, load_ds_config(config.engine.ds_config), 1)
        assert config.tokens_per_step == job.size.tokens_per_step[kind == "measured"]


def test_no_check_stops_another_and_the_files_are_whole_after_each(
    scripts: tuple[ModuleType, ModuleType], tmp_path: Path
) -> None:
    record, _ = scripts
    written = record.Record(tmp_path, "name", "Title", {"hardware": "a machine"}, seconds=100)
    written.check("good", lambda: {"loss": 1.5})
    assert json.loads((tmp_path / "name.json").read_text())["failed"] == 0
    written.check("bad", lambda: record.require(False, "too far apart", {"difference": 0.25}))
    written.check("broken", lambda: {"x": 1 / 0})
    written.check("good again", lambda: None)
    written._end = 0
    written.check("too late", lambda: {})
    found = json.loads((tmp_path / "name.json").read_text())
    assert found["hardware"] == "a machine"
    assert [check["passed"] for check in found["checks"]] == [True, False, False, True, False]
    assert found["checks"][1]["numbers"] == {"difference": 0.25}
    assert "ZeroDivisionError" in found["checks"][2]["traceback"]
    assert found["checks"][4]["error"] == "TimeoutError: not begun: the time was over"
    text = (tmp_path / "name.md").read_text()
    assert "| good | yes |" in text
    assert "## Failed: broken" in text
    assert "2 of 5 checks passed" in text


CUT_OFF = """
import sys, time
sys.path.insert(0, {gpu!r})
import record
record.GRACE = 0.5
written = record.Record(__import__("pathlib").Path({out!r}), "name", "Title", {{}}, seconds=0.5)
written.check("good", lambda: {{"loss": 1.5}})
written.check("endless", lambda: time.sleep(60))
written.check("late", lambda: None)
written._end += 100
written.check("killed", lambda: __import__("os").kill(__import__("os").getpid(), 9))
"""


def test_the_record_is_written_even_when_the_script_is_cut_off(tmp_path: Path) -> None:
    """A check that does not end is ended; what ran when the script was killed is named."""
    code = CUT_OFF.format(gpu=str(GPU), out=str(tmp_path))
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == -9
    found = json.loads((tmp_path / "name.json").read_text())
    assert [(check["check"], check["passed"]) for check in found["checks"]] == [
        ("good", True), ("endless", False), ("late", False), ("killed", False),
    ]  # fmt: skip
    assert "beyond the time" in found["checks"][1]["error"]
    assert found["checks"][1]["seconds"] < 30
    assert "not begun" in found["checks"][2]["error"]
    assert found["checks"][3]["error"] == "the script ended while this check ran"
    assert "Failed: killed" in (tmp_path / "name.md").read_text()


def test_corpus_and_comparison(scripts: tuple[ModuleType, ModuleType]) -> None:
    _, main_job = scripts
    tokens = main_job.markov_chains(512, 4, 5000, seed=0)
    assert (tokens.shape, tokens.dtype) == ((4, 5000), np.uint16)
    after = {int(b) for row in tokens for a, b in itertools.pairwise(row) if a == tokens[0, 0]}
    assert 2 <= len(after) <= 8, "a token has 8 followers, the same in every chain"
    assert main_job.largest_difference({1: 2.0, 2: 4.0}, {1: 2.0, 2: 5.0}) == pytest.approx(0.2)
    assert main_job.largest_difference({1: 2.0}, {1: 2.0, 2: 5.0}) == float("inf")
    assert main_job.largest_difference({}, {}) == float("inf")


def test_shell_scripts_are_readable_and_name_what_is_in_the_lock() -> None:
    for script in ("wheels.sh", "setup.sh"):
        subprocess.run(["bash", "-n", GPU / script], check=True)
    lock = (GPU.parents[2] / "requirements.lock").read_text().lower().replace("_", "-")
    for line in (GPU / "requirements.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name = line.replace(">", "=").partition("=")[0]
            assert f"\n{name}==" in lock, name
