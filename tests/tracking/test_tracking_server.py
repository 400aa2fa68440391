"""A real MLflow server: what it gets over HTTP, and what its page shows in a browser."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from mlflow.tracking import MlflowClient

from qatscale.tracking.follower import start_follower
from qatscale.tracking.mlflow_sync import TrackingError, Uploader, track_sync
from qatscale.tracking.store import where_to_look
from tests.law.browser import CannotError, open_address
from tests.tracking.synthetic_runs import MakeRun, finish, log_metrics
from tests.tracking.test_tracking_follower import history, log_of, losses, wait_for

pytestmark = pytest.mark.dist


def test_a_real_server(make_run: MakeRun, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over HTTP, artifacts too; and what went into a SQLite file directly is shown by the command that we name."""
    import shlex
    import shutil

    from qatscale.tracking.store import ui_command

    home = tmp_path / "server"
    home.mkdir()
    monkeypatch.chdir(home)  # where the server keeps the artifacts that it is sent
    shutil.copy(template, home / "mlflow.db")
    uri = f"sqlite:///{home}/mlflow.db"
    beside = make_run("beside", steps=100)
    beside.append("start", step=0)
    direct = track_sync(beside, uri)

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [*shlex.split(ui_command(uri)), "--port", str(port), "--workers", "1"]
    # the server's job queue starts several more processes
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (home / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        wait_for("the server", lambda: server.poll() is not None or _answers(address), 120)
        folder = make_run("run", steps=100)
        folder.append("start", step=0)
        follower = start_follower(folder, address)
        log_metrics(folder, 0, 100)
        folder.append("metrics", step=101, loss=float("nan"), phase="stable")
        folder.append("metrics", step=102, loss=float("-inf"), phase="stable")
        finish(folder, {"fp": 2.5})
        assert follower.finish(90) is None, log_of(folder)
        client = MlflowClient(address)
        run_id = track_sync(folder)
        assert client.get_run(run_id).info.status == "FINISHED"
        assert history(address, run_id)[:10] == losses(folder)[:10]
        assert {step for step, _ in history(address, run_id)} == {*range(10, 101, 10), 101, 102}
        assert len(history(address, run_id)) == 12
        assert {a.path for a in client.list_artifacts(run_id)} >= {"recipe.yaml", "timeline.json"}
        shown = urlopen(f"{address}/get-artifact?path=recipe.yaml&run_uuid={direct}").read()
        assert shown == (beside.path / "recipe.yaml").read_bytes()
        branch = make_run("branch", scheme="fused", steps=100, switch=60, parent=(folder, 50), resolved=0.4)
        branch.append("start", step=50)
        log_metrics(branch, 50, 100)
        finish(branch, {"fp": 2.75, "quantized": 2.625})
        track_sync(branch, address)
        with swallowing_proxy(address) as (proxy, swallows):
            lost = make_run("lost", steps=100)
            lost.append("start", step=0)
            uploader = Uploader(lost, proxy)
            log_metrics(lost, 0, 50)
            uploader.sync()
            swallows.set()
            log_metrics(lost, 50, 80)
            uploader.sync()
            swallows.clear()
            log_metrics(lost, 80, 100)
            uploader.sync()
            assert len(history(address, uploader.cursor.run_id)) == 7
            finish(lost, {"fp": 2.5})
            swallows.set()
            with pytest.raises(TrackingError, match="confirmed metrics and does not have them"):
                track_sync(lost)
            swallows.clear()
            assert history(address, track_sync(lost)) == losses(lost)
        look_at_the_page(where_to_look([folder]), tmp_path)
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@contextmanager
def swallowing_proxy(address: str) -> Iterator[tuple[str, threading.Event]]:
    """The address of a proxy of the server that, while the event is set, says {} to metrics in the server's place."""
    swallows = threading.Event()

    class Proxy(BaseHTTPRequestHandler):
        def pass_on(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            answer = b"{}"
            if not (swallows.is_set() and self.path.endswith("/runs/log-batch")):
                kind = {"Content-Type": self.headers["Content-Type"] or "application/json"}
                answer = urlopen(Request(address + self.path, body or None, kind, method=self.command)).read()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    for method in ("GET", "POST", "PUT", "PATCH"):
        setattr(Proxy, f"do_{method}", Proxy.pass_on)
    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{proxy.server_port}", swallows
        proxy.shutdown()


def look_at_the_page(said: list[str], folder: Path) -> None:
    """The link opens on the runs, branches among them, and on charts of their losses; one click away are columns."""
    (line,) = said
    link = line.removeprefix("MLflow: ")
    try:
        page = open_address(link, folder)
    except CannotError as reason:
        pytest.skip(str(reason))
    assert "Model training" in page
    assert "Evaluation runs" not in page, "no page about language models' traces"
    assert all(name in page for name in ("run", "branch"))
    order = ["train/loss", "validation (2)", "val/loss_quantized", "final (", "final/val_loss", "train ("]
    charts = page.partition("training (1)")[2]
    places = [charts.find(text) for text in order]
    assert -1 not in places
    assert places == sorted(places)
    assert "2.63" in page, "the bar of the branch's final loss"
    table = open_address(link.replace("CHART", "TABLE"), folder)
    for shown in ("scheme", "bits", "qat.fraction", "final/val_loss", "branch", "fused", "0.4", "2.625", "2.75"):
        assert shown in table


def _answers(address: str) -> bool:
    try:
        with urlopen(f"{address}/health", timeout=1) as answer:
            return answer.status == 200
    except OSError:
        return False
