"""Checkpoints written beside the steps: what is written, when it is told, and what happens where something fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qatscale.engine.checkpoints.files import list_checkpoints, read_manifest, verify_files
from qatscale.engine.checkpoints.reader import CheckpointReader
from qatscale.errors import EXIT_FAILED
from qatscale.tracking.run_folder import RunFolder
from tests.processes import Finished, run
from tests.train.driving import STEPS, assert_same_state, losses, spec
from tests.train.fixed_tokens import write_fixed_tokens

DRIVER = Path(__file__).with_name("checkpointing_driver.py")
EVERY = 3
BESIDE, BETWEEN = "checkpoint.background=true", "checkpoint.background=false"


class Launch:
    """Runs trained in one launch, and what each process has seen."""

    def __init__(self, folder: Path, ranks: int, **runs: dict[str, Any]) -> None:
        data = write_fixed_tokens(folder / "data")
        self.folder, self.names = folder, list(runs)
        listed = [
            spec(name.partition("_")[0], folder, data, f"checkpoint.interval={EVERY * 512}", "checkpoint.keep=9",
                 *run.pop("overrides", ()), **run)
            for name, run in runs.items()
        ]  # fmt: skip
        (folder / "runs.json").write_text(json.dumps(listed))
        self.finished: Finished = run([DRIVER, folder / "runs.json", folder], ranks, cwd=folder)
        seen = [folder / f"seen-{rank}.json" for rank in range(ranks)]
        self.seen = [json.loads(path.read_text()) if path.exists() else [] for path in seen]

    def of(self, name: str, rank: int = 0) -> dict[str, Any]:
        return self.seen[rank][self.names.index(name)]

    def run(self, name: str) -> RunFolder:
        return RunFolder(self.folder / name)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    launch = Launch(
        tmp_path_factory.mktemp("alone"),
        1,
        between={"overrides": [BETWEEN]},
        beside={"overrides": [BESIDE], "slow": {"rank": 0, "seconds": 1.2}},
        broken={"slow": {"rank": 0, "seconds": 1.0}, "error_at": EVERY + 1},
        full={"full_at": EVERY + 1},
    )
    assert launch.finished.codes == [0], launch.finished.output
    return launch


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """The last run's failure ends the processes."""
    slow = {"rank": 1, "seconds": 1.0}
    return Launch(
        tmp_path_factory.mktemp("together"),
        2,
        whole={"overrides": [BETWEEN]},
        stopped={"slow": slow, "signal_at": EVERY + 1},
        stopped_again={},
        full={"full_at": EVERY + 1},
    )


def complete(run: RunFolder) -> list[int]:
    """Steps of the checkpoints that are there, every one of them whole."""
    found = list_checkpoints(run.checkpoints)
    for path in found:
        verify_files(path, CheckpointReader(path).manifest)
    return [read_manifest(path).step for path in found]


@pytest.mark.dist
def test_what_is_written_beside_the_steps_is_the_state_of_its_own_step(alone: Launch) -> None:
    writes = alone.of("beside")["writes"]
    assert any(done > step for step, _, done in writes), "steps were taken while a checkpoint was written"
    assert all(begun == done for _, begun, done in alone.of("between")["writes"])
    assert complete(alone.run("beside")) == complete(alone.run("between")) == [3, 6, 7, 9, 12]
    for one, other in zip(*(list_checkpoints(alone.run(n).checkpoints) for n in ("beside", "between")), strict=True):
        assert_same_state(one, other)
    assert losses(alone.run("beside").path) == losses(alone.run("between").path)


@pytest.mark.dist
def test_one_is_in_flight_and_the_next_one_waits_for_it_and_says_so(alone: Launch) -> None:
    writes = alone.of("beside")["writes"]
    assert [step for step, *_ in writes] == [3, 6, 7, 9, 12], "one after the other"
    assert "the checkpoint of step 7 had to wait " in alone.finished.output


@pytest.mark.dist
def test_a_checkpoint_is_on_record_once_it_is_complete_and_all_before_the_end(alone: Launch) -> None:
    records = alone.run("beside").records("checkpoint", "metrics", "validation", "final")
    events = [(record["event"], record["step"]) for record in records]
    assert [step for event, step in events if event == "checkpoint"] == [3, 6, 7, 9, 12]
    assert events.index(("checkpoint", 3)) > events.index(("metrics", 4)), "written while step 4 was taken"
    assert events.index(("checkpoint", STEPS)) < events.index(("validation", STEPS))
    for record in alone.run("beside").records("checkpoint"):
        assert read_manifest(Path(record["path"])).step == record["step"]


@pytest.mark.dist
def test_after_an_error_of_the_loop_the_checkpoint_in_flight_is_completed_and_told(alone: Launch) -> None:
    assert alone.of("broken")["error"] == "ValueError: made to fail"
    run = alone.run("broken")
    assert complete(run) == [3]
    events = [(record["event"], record["step"]) for record in run.records("checkpoint", "failed")]
    assert events == [("checkpoint", 3), ("failed", EVERY + 1)]
    assert_same_state(*(list_checkpoints(alone.run(name).checkpoints)[0] for name in ("broken", "between")))


@pytest.mark.dist
def test_a_full_disk_ends_the_run(alone: Launch) -> None:
    error = alone.of("full")["error"]
    assert error.startswith("OSError: the checkpoint of step 6 was not written: process 0: [Errno 27] File too large: ")
    assert complete(alone.run("full")) == [3]
    assert alone.run("full").status == "failed"


@pytest.mark.dist
def test_a_full_disk_of_one_process_ends_the_job_on_all(together: Launch) -> None:
    assert together.finished.codes == [EXIT_FAILED, EXIT_FAILED], together.finished.output
    run = together.run("full")
    assert "the checkpoint of step 6 was not written: process 1: File too large" in together.finished.output
    assert "the checkpoint of step 6 was not written: process 1: " in run.records("failed")[-1]["error"]
    assert run.status == "failed"
    assert [record["step"] for record in run.records("checkpoint")] == [3]
    assert complete(run) == [3]
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-00000003"], "nothing half is left"


@pytest.mark.dist
def test_a_signal_during_a_write_completes_it_and_saves_where_the_run_stops(together: Launch) -> None:
    assert together.of("stopped", rank=1)["writes"][0][0] == 3
    assert [seen[1]["status"] for seen in together.seen] == ["stopped", "stopped"]
    run = together.run("stopped")
    (stopped,) = run.records("stopped")
    saved = [record["step"] for record in run.records("checkpoint") if record["time"] < stopped["time"]]
    assert saved == [3, stopped["step"]]
    assert [seen[2]["status"] for seen in together.seen] == ["done", "done"], "the same command goes on"
    assert losses(run.path) == losses(together.run("whole").path)
    for name in ("step-00000003", f"step-{STEPS:08d}"):
        assert_same_state(run.checkpoints / name, together.run("whole").checkpoints / name)


@pytest.mark.slow
@pytest.mark.dist
def test_a_writer_that_hangs_ends_the_job_and_is_named(tmp_path: Path) -> None:
    """Both loops wait for the first checkpoint when the second is due; one thread hangs and the other waits for it."""
    hung = {"slow": {"rank": 1, "seconds": 3600}, "stall": 20, "overrides": ["engine.stall_timeout=10"]}
    launch = Launch(tmp_path, 2, hung=hung)
    assert launch.finished.codes == [EXIT_FAILED, EXIT_FAILED], launch.finished.output
    assert "rank 1 on host " in launch.finished.output
    assert " hung at step 6: no progress for " in launch.finished.output
    assert "and waited for\n" in launch.finished.output
    assert "write_shard" in launch.finished.output.partition("and waited for\n")[2], "where the thread stood"
    failed = launch.run("hung").records("failed")[-1]
    assert (failed["rank"], failed["step"]) == (1, 6)
    assert complete(launch.run("hung")) == []
