"""One process writes a run's folder, wherever a second one is started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from qatscale.errors import EXIT_FAILED, UserError
from qatscale.supervise import claims
from qatscale.supervise.claims import Claim, hold_run

HOLD = """
import sys, time
from pathlib import Path
from qatscale.supervise import claims
claims.HEARTBEAT = 0.1
claims.hold_run(Path(sys.argv[1]), take_over=False, notice=print)
print("held", flush=True)
time.sleep(100)
"""


def held_by_another(run: Path) -> subprocess.Popen[str]:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, run], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def hold(run: Path, *, take_over: bool = False) -> tuple[Claim, list[str]]:
    notices: list[str] = []
    return hold_run(run, take_over=take_over, notice=notices.append), notices


def on_another_host(run: Path, **other: str) -> Path:
    """The claim of a process that nobody here can look for."""
    claim, _ = hold(run)
    claim._closed.set()
    content = json.loads(claim.path.read_text())
    content |= {"worker": "node7-4711", "process": content["process"] | (other or {"host": "node7"})}
    claim.path.write_text(json.dumps(content))
    return claim.path


def test_a_process_of_this_host_is_seen_and_its_end_too(tmp_path: Path) -> None:
    holder = held_by_another(tmp_path)
    with pytest.raises(UserError, match=rf"is being trained by process {holder.pid} on host .*--take-over"):
        hold(tmp_path)
    holder.kill()
    holder.communicate()
    claim, notices = hold(tmp_path)
    claim.close("released")
    assert notices == []


def test_who_was_taken_over_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "HEARTBEAT", 0.5)
    holder = held_by_another(tmp_path)
    claim, notices = hold(tmp_path, take_over=True)
    assert holder.poll() == EXIT_FAILED, "before the other one writes"
    assert "was taken over by another process" in holder.communicate()[1]
    assert len(notices) == 1
    claim.close("released")
    assert json.loads(claim.path.read_text())["state"] == "released"


def test_a_process_of_another_host_is_known_by_its_heartbeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = on_another_host(tmp_path)
    beat = threading.Timer(1.5, os.utime, [path])
    beat.start()
    with pytest.raises(UserError, match="is being trained by process 4711 on host node7"):
        hold(tmp_path)
    beat.join()
    monkeypatch.setattr(claims, "EXPIRY", 1.5)
    claim, notices = hold(tmp_path)
    claim.close("released")
    assert "names process 4711 on host node7, which cannot be seen from here; watching its heartbeat" in notices[0]


def test_a_host_that_started_again_is_not_another_one_of_its_name(tmp_path: Path) -> None:
    path = on_another_host(tmp_path, boot_id="another")
    beat = threading.Timer(0.5, os.utime, [path])
    beat.start()
    with pytest.raises(UserError, match="is being trained by process 4711"):
        hold(tmp_path)
    beat.join()
    before = psutil.boot_time() - 60
    os.utime(path, (before, before))
    claim, notices = hold(tmp_path)
    claim.close("released")
    assert notices == []


def test_a_claim_that_says_nothing_is_named_and_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "EXPIRY", 0.5)
    for number, (make, said) in enumerate((
        (Path.touch, "is empty"),
        (os.mkfifo, "cannot be read (not a file)"),
        (lambda path: path.symlink_to("/dev/zero"), "cannot be read (not a file)"),
    )):  # fmt: skip
        place = tmp_path / f"{number}/writers/writer~0001.json"
        place.parent.mkdir(parents=True)
        make(place)
        claim, notices = hold(tmp_path / str(number))
        claim.close("released")
        assert f"{place} {said}; watching its heartbeat" in notices[0]
        assert claim.path.name == "writer~0002.json"


def test_the_holder_of_a_damaged_claim_is_known_by_its_heartbeat(tmp_path: Path) -> None:
    path = on_another_host(tmp_path)
    path.write_text("")
    beat = threading.Timer(0.5, os.utime, [path])
    beat.start()
    with pytest.raises(UserError, match=r"is being trained by a process that .*0001.json does not name"):
        hold(tmp_path)
    beat.join()


def test_who_claims_a_run_whose_claim_was_removed_ends_its_holder(tmp_path: Path) -> None:
    holder = held_by_another(tmp_path)
    (tmp_path / "writers/writer~0001.json").unlink()
    claim, _ = hold(tmp_path)
    assert claim.path.name == "writer~0001.json"
    assert holder.wait(30) == EXIT_FAILED
    assert "was taken over by another process" in holder.communicate()[1]
    claim.close("released")
    assert json.loads(claim.path.read_text())["process"]["pid"] == os.getpid()
