"""The follower beside real trainers and real, dead and hanging servers."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from qatscale.cli.fit import collect_runs
from qatscale.errors import UserError
from qatscale.tracking.follower import Following, start_follower
from qatscale.tracking.mlflow_sync import TrackingError, track_sync
from qatscale.tracking.refusals import MEMORY, limited_memory, shown
from qatscale.tracking.run_folder import RunFolder
from qatscale.tracking.store import Cursor
from tests.tracking.synthetic_runs import MakeRun, finish, log_metrics

pytestmark = pytest.mark.dist


def the_run(uri: str) -> tuple[str, str]:
    """(id, status) of the only run of a store."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("qatscale")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    return run.info.run_id, run.info.status


def history(uri: str, run_id: str, key: str = "train/loss") -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in MlflowClient(uri).get_metric_history(run_id, key))


def losses(folder: RunFolder) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in folder.records("metrics")]


def wait_for(what: object, condition: object, seconds: float = 60.0) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.1)


def log_of(folder: RunFolder) -> str:
    return (folder.logs / "tracking.log").read_text()


def gone(pid: int) -> bool:
    """Whether a process, ours or an orphan, has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.fixture
def hanging() -> Iterator[str]:
    """The address of a server that takes every connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    taken.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        for connection in taken:
            connection.close()


@pytest.fixture
def nobody() -> str:
    """An address at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_run_is_followed_to_its_end(make_run: MakeRun, sqlite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.5")
    folder = make_run(steps=100)
    folder.append("start", step=0)
    follower = start_follower(folder, sqlite)
    log_metrics(folder, 0, 50)
    wait_for("the first upload", lambda: (c := Cursor.load(folder)) is not None and c.offset > 0)
    run_id, status = the_run(sqlite)
    assert status == "RUNNING"
    wait_for("a system metric", lambda: history(sqlite, run_id, "system/system_memory_usage_percentage"))
    log_metrics(folder, 50, 100)
    finish(folder, {"fp": 2.5})
    assert follower.finish(60) is None
    assert the_run(sqlite) == (run_id, "FINISHED")
    assert history(sqlite, run_id) == losses(folder)
    assert log_of(folder) == "", "nothing went wrong and MLflow made no noise"


TRAINER = """
import sys, time
from qatscale.tracking.follower import start_follower
from qatscale.tracking.run_folder import RunFolder
folder = RunFolder.open(sys.argv[1])
folder.append("start", step=0)
follower = start_follower(folder, sys.argv[2], patience=float(sys.argv[3]))
assert "mlflow" not in sys.modules and "torch" not in sys.modules
for step in range(1, 21):
    folder.append("metrics", step=step, loss=1 / step, phase="stable")
print(follower.child.pid, flush=True)
time.sleep(600)
"""


@contextmanager
def trainer(folder: RunFolder, uri: str, patience: float = 60.0) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A trainer that has logged 20 steps and goes on, in a process group of its own; and its follower's process id."""
    command = [sys.executable, "-c", TRAINER, str(folder.path), uri, str(patience)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert child.stdout is not None
    follower = int(child.stdout.readline())
    try:
        yield child, follower
    finally:
        for pid in (child.pid, follower):
            if not gone(pid):
                os.kill(pid, signal.SIGKILL)
        child.wait()


def test_a_killed_trainer_leaves_a_run_that_says_so(make_run: MakeRun, sqlite: str) -> None:
    folder = make_run(steps=100)
    with trainer(folder, sqlite) as (child, follower):
        os.killpg(child.pid, signal.SIGKILL)  # the whole group, as a launcher does
        child.wait()
        wait_for("the follower's end", lambda: gone(follower))
    run_id, status = the_run(sqlite)
    assert status == "KILLED"
    assert history(sqlite, run_id) == [(step, 1 / step) for step in range(1, 21)]


def test_a_resume_takes_over_from_a_follower_that_is_still_at_it(
    make_run: MakeRun, sqlite: str, hanging: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    folder = make_run(steps=100)
    with trainer(folder, hanging) as (child, old):
        wait_for("a failed attempt", lambda: "attempt failed" in log_of(folder))
        child.kill()
        child.wait()
        assert not gone(old), "it still tries"
        folder.append("resume", step=10)
        new = start_follower(folder, sqlite)
        log_metrics(folder, 10, 100)
        finish(folder, {"fp": 2.5})
        assert new.finish(60) is None
        assert gone(old)
    assert "another process continues this run" in log_of(folder)
    run_id, status = the_run(sqlite)
    assert status == "FINISHED"
    assert history(sqlite, run_id) == losses(folder)


@pytest.fixture
def endless() -> Iterator[str]:
    """The address of a server whose every answer goes on for ever."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer(connection: socket.socket) -> None:
            with connection, suppress(OSError):
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
                while True:
                    connection.sendall(b" " * (1 << 20))

        def accept() -> None:
            with suppress(OSError):
                while True:
                    threading.Thread(target=answer, args=[server.accept()[0]], daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_fit_waits_no_longer_than_an_upload(hanging: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qatscale.tracking.refusals.STALL", 0.5)
    address = hanging.replace("http://", "http://me:pass-w0rd@")
    began = time.monotonic()
    with pytest.raises(UserError, match="cannot be reached") as error:
        collect_runs("qatscale", None, None, address)
    assert time.monotonic() - began < 8, "not the 10 s of a request"
    assert "pass-w0rd" not in str(error.value)


def test_an_answer_has_a_largest_size() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    with limited_memory():
        with pytest.raises(MemoryError) as error:
            bytearray(2 * MEMORY)
        most, _ = resource.getrlimit(resource.RLIMIT_AS)
        with limited_memory():
            assert resource.getrlimit(resource.RLIMIT_AS)[0] == most, "a limit that is set already stays"
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert shown(error.value) == "an answer of more than 2 GiB"


@pytest.mark.parametrize("kind", ["hanging", "nobody", "endless"])
def test_a_server_that_does_not_answer_costs_the_trainer_seconds(
    make_run: MakeRun, sqlite: str, kind: str, request: pytest.FixtureRequest
) -> None:
    address = request.getfixturevalue(kind)
    folder = make_run(steps=1000)
    folder.append("start", step=0)
    began = time.monotonic()
    follower = start_follower(folder, address)
    assert follower.child is not None
    assert time.monotonic() - began < 10.0, "the start of a process"
    line = follower.first_answer()
    assert line is not None
    assert "uploads are tried again" in line
    log_metrics(folder, 0, 1000, interval=1)
    finish(folder, {"fp": 2.5})

    began = time.monotonic()
    line = follower.finish()
    assert time.monotonic() - began < 8.0, "nobody waits the 10 s of a store that does answer"
    assert line is not None
    assert f"`qatscale track-sync {folder.path}` uploads the rest" in line
    if kind == "nobody":
        assert "Connection refused" in line
    most = peak_memory(follower.child.pid)
    assert most < 3 << 30, f"{most / 2**30:.1f} GiB"

    # track-sync takes over at once, with a store that answers: everything, once
    began = time.monotonic()
    run_id = track_sync(folder, sqlite)
    assert time.monotonic() - began < 60
    wait_for("the follower's end", lambda: gone(follower.child.pid), 30)
    assert the_run(sqlite) == (run_id, "FINISHED")
    assert history(sqlite, run_id) == losses(folder)
    assert len(losses(folder)) == 1000


def peak_memory(pid: int) -> int:
    """Bytes that a process held at most."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


CURES = {
    "deleted": ("mlflow experiments restore --experiment-id 1", "was deleted"),
    "file": ("tracking.uri=sqlite:///mlflow.db", "maintenance mode"),
    "no database": ("tracking.uri=sqlite:///FILE", "is no SQLite database"),
}


@pytest.mark.parametrize("kind", CURES)
def test_a_refusal_is_said_before_the_first_step_with_its_cure(
    make_run: MakeRun, sqlite: str, kind: str, tmp_path: Path
) -> None:
    folder = make_run(steps=100)
    folder.append("start", step=0)
    uri = f"file:{tmp_path}/mlruns"
    if kind == "deleted":
        uri, client = sqlite, MlflowClient(sqlite)
        client.delete_experiment(client.create_experiment("qatscale"))
    if kind == "no database":
        (tmp_path / "mlflow.db").write_text("the notes of somebody")
        uri = f"sqlite:///{tmp_path}/mlflow.db"
    follower = start_follower(folder, uri)
    line = follower.first_answer()
    assert line is not None
    cure, problem = CURES[kind]
    assert line.startswith("warning: MLflow does not take this run")
    assert follower.refusal() == line
    assert cure in line
    finish(folder, {"fp": 2.5})
    began = time.monotonic()
    last = follower.finish()
    assert last is not None
    assert cure in last, "the closing line carries the last error"
    assert "continues" not in last, "a refused upload is not tried again"
    assert time.monotonic() - began < 8
    with pytest.raises(TrackingError, match=problem):
        track_sync(folder)
    if kind == "deleted":
        client.restore_experiment("1")
        run_id = track_sync(folder)
        assert the_run(sqlite) == (run_id, "FINISHED")


def test_a_password_in_the_address_is_used_and_never_written(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server takes one password only; no file of the run holds it, and none of the processes shows it."""
    asked: list[str | None] = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.headers.get("Authorization"))
            self.send_error(403)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://me:pass-w0rd@127.0.0.1:{server.server_port}"
        folder = make_run(overrides=(f"tracking.uri={address}",))
        folder.append("start", step=0)
        follower = start_follower(folder, address)
        assert follower.child is not None
        said = f"{follower.first_answer()} {Path(f'/proc/{follower.child.pid}/cmdline').read_text()}"
        finish(folder, {"fp": 2.5})
        said += str(follower.finish())
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        asked.clear()
        with pytest.raises(TrackingError, match="MLFLOW_TRACKING_USERNAME") as error:
            track_sync(folder)
        said += str(error.value)
        server.shutdown()
    assert asked[0] == f"Basic {b64encode(b'me:pass-w0rd').decode()}", (
        "the environment has what the run does not record"
    )
    kept = "".join(path.read_text() for path in folder.path.rglob("*") if path.is_file())
    assert "pass-w0rd" not in kept + said
    assert f"http://127.0.0.1:{server.server_port}" in kept


def test_while_a_follower_uploads_nobody_else_does(make_run: MakeRun, sqlite: str, hanging: str) -> None:
    folder = make_run(steps=100)
    with trainer(folder, hanging) as (_, follower):
        wait_for("the follower", lambda: _locked(folder))
        with pytest.raises(TrackingError, match="run is being uploaded right now"):
            track_sync(folder, sqlite)
        assert not gone(follower)


def _locked(folder: RunFolder) -> bool:
    import fcntl

    with (folder.logs / "tracking.log").open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_follower_that_is_told_to_end_uploads_what_is_there(make_run: MakeRun, sqlite: str) -> None:
    folder = make_run(steps=100)
    folder.append("start", step=0)  # by this process, which lives on
    log_metrics(folder, 0, 100)
    following = Following(folder, sqlite, patience=60.0)
    following.give_up_in(0.0)  # what SIGTERM does, with some seconds of grace
    assert following.run() is False
    run_id, status = the_run(sqlite)
    assert status == "RUNNING"
    assert history(sqlite, run_id) == losses(folder)


def test_sigterm_reaches_the_follower(make_run: MakeRun, sqlite: str) -> None:
    folder = make_run(steps=100)
    with trainer(folder, sqlite) as (child, follower):
        wait_for("the first upload", lambda: (c := Cursor.load(folder)) is not None and c.offset > 0)
        os.kill(follower, signal.SIGTERM)
        os.kill(child.pid, signal.SIGTERM)  # a launcher that ends a failed job sends it to both
        child.wait()
        wait_for("the follower's end", lambda: gone(follower), 20)
    assert the_run(sqlite)[1] == "KILLED"


@pytest.mark.parametrize("where", ["recipe", "environment"])
def test_no_tracking_is_no_process(make_run: MakeRun, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run()
    folder.append("start", step=0)
    if where == "environment":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    follower = start_follower(folder, "none" if where == "recipe" else None)
    assert follower.child is None
    assert follower.finish() is None
    assert not (folder.logs / "tracking.log").exists()
