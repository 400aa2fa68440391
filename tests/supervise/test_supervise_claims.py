"""Claims: one holder at a time, whoever races, dies, stops or lives on another host."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from qatscale.supervise import claims as claims_module
from qatscale.supervise.claims import EXPIRY, Claim, Claims

RACER = """
import sys, time
from pathlib import Path
from qatscale.supervise.claims import Claims
claims = Claims(Path(sys.argv[1]))
until = float(sys.argv[2])
while time.time() < until: pass
print(" ".join(name for name in map(str, range(200)) if claims.take(name, 0, sys.argv[3])))
"""


def taken(folder: Path, name: str = "run", after: int = 0) -> Claim:
    claim = Claims(folder).take(name, after, "me")
    assert claim is not None
    return claim


def test_of_workers_that_race_one_gets_each_run(tmp_path: Path) -> None:
    start = str(time.time() + 3)
    racers = [
        subprocess.Popen([sys.executable, "-c", RACER, str(tmp_path), start, str(i)], stdout=subprocess.PIPE, text=True)
        for i in range(4)
    ]
    won = [racer.communicate()[0].split() for racer in racers]
    assert sorted(name for names in won for name in names) == sorted(map(str, range(200)))


def test_a_claim_that_is_held_is_nobody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = taken(tmp_path)
    assert Claims(tmp_path).take("run", 0, "other") is None
    seen = Claims(tmp_path).attempts()["run"]
    assert (seen.number, seen.state, seen.worker) == (1, "running", "me")
    assert Claims(tmp_path).has_claimed("me")
    assert not Claims(tmp_path).has_claimed("m")
    hour_ago = time.time() - 3600
    monkeypatch.setattr(claims_module.time, "time", lambda: hour_ago)  # somebody set the clock
    claim.close("failed", "diverged")
    for stray in ("run~old.json", "run~0001 (copy).json", "run~3.json"):
        (tmp_path / stray).write_text('{"worker": "stray"}')
    os.mkfifo(tmp_path / "other~0001.json")
    assert Claims(tmp_path).has_claimed("me")
    assert not Claims(tmp_path).has_claimed("stray")
    assert [one.number for one in Claims(tmp_path).history("run")] == [1]
    seen = Claims(tmp_path).attempts()["run"]
    assert (seen.state, seen.reason) == ("failed", "diverged")
    assert seen.ended is not None
    assert seen.ended >= seen.started


@pytest.mark.parametrize(
    "content", [b"", b"[" * 100_000, b"\xff", b"3", b'{"state": 3}', b'{"process": {}}', b'{"process": {"pid": -1}}']
)
def test_a_damaged_claim_expires_like_a_silent_one(content: bytes, tmp_path: Path) -> None:
    taken(tmp_path).path.write_bytes(content)
    claims = Claims(tmp_path)
    assert claims.attempts()["run"].state == "running"
    assert not claims.has_claimed("me")
    assert claims.attempts()["run"].worker == "an unknown host-?"


@pytest.mark.parametrize("content", ["{}", '{"worker": "me"}', '{"state": "running"}'])
def test_a_claim_without_a_process_is_held_by_nobody(content: str, tmp_path: Path) -> None:
    (tmp_path / "run~0001.json").write_text(content)
    assert Claims(tmp_path).attempts()["run"].state == "gone"


def test_a_claim_that_a_full_disk_cuts_off_leaves_nothing(tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limit[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            Claims(tmp_path).take("run", 0, "me")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert list(tmp_path.iterdir()) == []


def test_a_holder_that_was_killed_is_seen_at_once(tmp_path: Path) -> None:
    code = "from pathlib import Path; from qatscale.supervise.claims import Claims; import os, signal\n"
    code += f"assert Claims(Path({str(tmp_path)!r})).take('run', 0, 'gone'); os.kill(os.getpid(), signal.SIGKILL)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    claims = Claims(tmp_path)
    assert claims.attempts()["run"].state == "gone"
    taken(tmp_path, after=1)
    assert [one.state for one in claims.history("run")] == ["gone", "running"]
    assert claims.attempts()["run"].number == 2


def foreign(folder: Path) -> Path:
    """A claim of another host."""
    path = taken(folder).path
    content = json.loads(path.read_text())
    content["process"]["host"] = "another-host"
    path.write_text(json.dumps(content))
    return path


def test_a_holder_on_another_host_is_gone_when_its_file_rests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By this observer's clock: the file's own time may be hours off."""
    path, now = foreign(tmp_path), [1000.0]
    monkeypatch.setattr(claims_module.time, "monotonic", lambda: now[0])
    os.utime(path, (5.0, 5.0))
    claims = Claims(tmp_path)
    for seconds, touched, state in ((0, None, "running"), (EXPIRY - 1, 6.0, "running"), (EXPIRY - 1, None, "running"),
                                    (2, None, "gone"), (1, 7.0, "running")):  # fmt: skip
        now[0] += seconds
        if touched is not None:
            os.utime(path, (touched, touched))
        assert claims.attempts()["run"].state == state


def test_heartbeats_touch_the_file_and_a_successor_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims_module, "HEARTBEAT", 0.05)
    claim, lost = taken(tmp_path), threading.Event()
    os.utime(claim.path, (5.0, 5.0))
    claim.beat_until_closed(lost.set)
    deadline = time.monotonic() + 10
    while claim.path.stat().st_mtime == 5.0 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert claim.path.stat().st_mtime > 5.0
    assert not lost.is_set()
    taken(tmp_path, after=1)
    assert lost.wait(10)
    claim.close("done")
    assert Claims(tmp_path).attempts()["run"].state == "running", "the successor's word counts, not the loser's"


def test_a_claim_that_was_cut_off_in_its_first_write_expires(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(claims_module.time, "monotonic", lambda: now[0])
    (tmp_path / "run~0001.json").write_text("")
    claims = Claims(tmp_path)
    assert claims.attempts()["run"].state == "running"
    now[0] = EXPIRY + 1
    assert claims.attempts()["run"].state == "gone"
