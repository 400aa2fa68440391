"""64 processes of a job as threads over a real store, by the script that records 1,024: nothing grows as the square."""

from __future__ import annotations

from pathlib import Path

import pytest
from thousand import HOST, Job, agree, alarm, open_checkpoint, open_data, write_checkpoint, write_data

from qatscale.data.reader import MAPS

RANKS = 64


@pytest.fixture(autouse=True)
def own_address(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # restored at the end


def test_votes_and_checkpoints_take_a_few_calls_a_process() -> None:
    found = agree(Job(RANKS))
    assert found["a vote"]["calls"] <= 2 * RANKS + 5
    assert found["a checkpoint"]["calls"] <= 3 * 3 * RANKS
    assert found["a checkpoint"]["megabytes"] < 0.1, "36 KB from each process to each would be 147 MB"


@pytest.mark.parametrize("failing", [0, 43])
def test_every_process_learns_of_the_first_failure_through_one_of_its_host(failing: int, tmp_path: Path) -> None:
    costs, failures = alarm(Job(RANKS), tmp_path, failing)
    assert len(failures) == RANKS
    assert {(failure.rank, failure.error) for failure in failures} == {(failing, "ValueError: a bad batch")}
    reads = RANKS // HOST * RANKS + 10 * RANKS  # one process a host reads all, and the others read that one
    assert costs["an alarm"]["megabytes"] < 2.5e-3 * reads
    assert costs["the start"]["megabytes"] < 1


def test_a_checkpoint_is_opened_by_its_table(tmp_path: Path) -> None:
    saved, table = write_checkpoint(tmp_path, RANKS, "86m")
    assert table["table_megabytes"] < 0.1
    assert open_checkpoint(saved, RANKS, 5)["peak_megabytes"] < 2


def test_many_shards_are_read_through_few_descriptors(tmp_path: Path) -> None:
    found = open_data(write_data(tmp_path / "data", 300))
    assert max(process["descriptors"] for process in found.values()) <= MAPS
